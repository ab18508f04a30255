"""Data sets of one's own: ``.npz`` files, and functions that return arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewire.errors import InputError, nearest

PARTS = ("x_train", "y_train", "x_test", "y_test")


def read(path: Path) -> dict[str, Any]:
    """The four arrays of an ``.npz`` file.

    Raises:
        InputError: it cannot be read, or an array is missing.
    """
    if not path.is_file():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"no file {path}{nearest(path.name, beside)}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in PARTS if name not in file]
            if missing:
                raise InputError(
                    f"{path} has no {missing[0]}{nearest(missing[0], file)}; needed are {', '.join(PARTS)}"
                )
            return {name: file[name] for name in PARTS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def parts(where: str, made: Any) -> dict[str, Any]:
    """The four arrays in what a function returned: a dict or object with them, or a tuple of them in this order."""
    if isinstance(made, Mapping):
        found = {name: made[name] for name in PARTS if name in made}
    elif isinstance(made, tuple | list) and len(made) == len(PARTS):
        found = dict(zip(PARTS, made, strict=True))
    else:
        found = {name: getattr(made, name) for name in PARTS if hasattr(made, name)}
    if len(found) < len(PARTS):
        raise InputError(f"{where} returned {type(made).__name__}, not {', '.join(PARTS)}")
    return found


def tensors(where: str, arrays: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked: x as float32, or int64 where it is ids; y as int64.

    Bytes are images: they get mean 0 and deviation 1 by the training images' numbers, and (N, H, W) a channel.
    Floats are taken as they are.

    Raises:
        InputError: shapes or types do not go together.
    """
    try:
        x_train, y_train, x_test, y_test = (torch.as_tensor(np.asarray(arrays[name])) for name in PARTS)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    for x, y, half in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        if x.dim() < 2 or not len(x):
            raise InputError(f"{where}: x_{half} has shape {tuple(x.shape)}, not (N, ...)")
        if y.is_floating_point() or y.is_complex() or not 1 <= y.dim() <= x.dim() or y.shape[0] != x.shape[0]:
            raise InputError(
                f"{where}: y_{half} has shape {tuple(y.shape)} and type {str(y.dtype).removeprefix('torch.')}, not "
                f"whole numbers of shape ({len(x)},)"
            )
        if int(y.long().min()) < 0:  # torch has no minimum of some unsigned types
            raise InputError(f"{where}: y_{half} has a label below zero")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise InputError(f"{where}: x_{half} has numbers that are not finite")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise InputError(f"{where}: x_train and x_test differ in shape or type")
    if x_train.dtype is torch.uint8:
        if x_train.dim() == 3:
            x_train, x_test = x_train.unsqueeze(1), x_test.unsqueeze(1)
        x_train, x_test = standardised(x_train.float(), x_test.float())
    elif x_train.is_floating_point():
        x_train, x_test = x_train.float(), x_test.float()
    else:
        x_train, x_test = x_train.long(), x_test.long()
    return x_train, y_train.long(), x_test, y_test.long()


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both scaled in place by the training images' mean and deviation: of the test images nothing is looked at."""
    std, mean = torch.std_mean(train)
    for x in (train, test):
        x.sub_(mean).div_(std)
    return train, test
