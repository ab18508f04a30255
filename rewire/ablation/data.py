"""Data sets, whole in memory: ours are images (N, C, H, W) as float32 with mean 0 and deviation 1, and labels (N,)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rewire.errors import nearest
from rewire.specs.from_python import find

from . import idx, npz
from .inputs import InputError

Labels = npt.NDArray[np.int64]
_NAMES = ("digits", "fashion-mnist")
IN_A_FOLDER = ("fashion-mnist",)  # these need to be told where their files are


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Training and held-out test samples (N, ...) with their labels as int64: (N,), or more for one per position."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) for images."""
        return tuple(self.x_train.shape[1:])


def names() -> list[str]:
    """Names of data sets of ours."""
    return list(_NAMES)


def check(name: str) -> None:
    """Raise an :class:`InputError` unless :func:`load` knows what ``name`` is. Nothing is loaded."""
    if name.endswith(".npz"):
        if not Path(name).is_file():
            npz.read(Path(name))  # says what is wrong
    elif ":" in name:
        _factory(name)
    elif name not in _NAMES:
        known = f"{', '.join(_NAMES)}; or FILE.npz or package.module:function"
        raise InputError(f"unknown data set {name!r}{nearest(name.lower(), _NAMES)}; known are {known}")


@lru_cache(maxsize=4)
def load(name: str, folder: Path | None = None) -> Dataset:
    """The data set called ``name``; ``folder`` holds its files where it needs any.

    ==========================  ===========================================================================
    ``digits``                  8×8 digits that come with scikit-learn
    ``fashion-mnist``           28×28 articles, from four IDX files in ``folder``
    ``path/to/file.npz``        with x_train, y_train, x_test and y_test (:mod:`.npz`)
    ``package.module:function`` that returns these four; the current directory is importable
    ==========================  ===========================================================================

    Kept in memory, because every cell of a grid asks for it. Treat the tensors as read-only.

    Raises:
        InputError: the name is unknown, the folder or a file is missing, or a file is damaged.
    """
    check(name)
    if name == "digits":
        if folder is not None:
            raise InputError("digits come with scikit-learn and take no data directory")
        return _digits()
    if name not in _NAMES:
        if folder is not None:
            raise InputError(f"{name} takes no data directory")
        arrays = npz.read(Path(name)) if name.endswith(".npz") else npz.parts(name, _factory(name)())
        x_train, y_train, x_test, y_test = npz.tensors(name, arrays)
        return Dataset(name, x_train, y_train, x_test, y_test, 1 + int(max(y_train.max(), y_test.max())))
    if folder is None:
        raise InputError(f"{name} needs --data-dir, the folder with its four IDX files")
    return _fashion(folder)


def split(labels: Labels, test_share: float = 0.2) -> tuple[Labels, Labels]:
    """Indices (train, test) of a stratified split that is the same everywhere and for every seed.

    The split is data, not chance: seeds vary initialisation and order, never what is held out.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    test = np.concatenate(
        [
            rng.permutation(members)[: round(test_share * len(members))]
            for members in (np.flatnonzero(labels == label) for label in np.unique(labels))
        ]
    )
    train = np.setdiff1d(np.arange(len(labels), dtype=np.int64), test)
    return train, np.sort(test)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("digits need scikit-learn: pip install 'rewire[data]'") from error
    bunch = load_digits()
    images, labels = bunch.images.astype(np.float32), bunch.target.astype(np.int64)
    train, test = split(labels)
    return _dataset("digits", images[train], labels[train], images[test], labels[test])


def _fashion(folder: Path) -> Dataset:
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise InputError(f"no data directory {folder}{nearest(folder.name, beside)}")
    parts: list[npt.NDArray[np.uint8]] = []
    for half in ("train", "t10k"):
        images = idx.read(idx.find(folder, f"{half}-images-idx3-ubyte"), 3)
        labels = idx.read(idx.find(folder, f"{half}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels) or not images.size:
            raise InputError(f"{folder}: {len(images)} {half} images but {len(labels)} labels")
        if labels.max() > 9:
            raise InputError(f"{folder}: a {half} label is {labels.max()}, above 9")
        parts += [images, labels]
    if parts[0].shape[1:] != parts[2].shape[1:]:
        raise InputError(f"{folder}: train images are {parts[0].shape[1:]}, t10k images {parts[2].shape[1:]}")
    return _dataset("fashion-mnist", *parts)


def _dataset(
    name: str,
    x_train: npt.NDArray[np.generic],
    y_train: npt.NDArray[np.generic],
    x_test: npt.NDArray[np.generic],
    y_test: npt.NDArray[np.generic],
) -> Dataset:
    train, test = npz.standardised(*(torch.from_numpy(x).float().unsqueeze(1) for x in (x_train, x_test)))
    return Dataset(name, train, torch.from_numpy(y_train).long(), test, torch.from_numpy(y_test).long(), 10)


def _factory(name: str) -> Callable[[], object]:
    module, _, function = name.partition(":")
    return find(module, function, gives="data")
