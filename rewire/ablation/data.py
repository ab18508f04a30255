"""Data sets, whole in memory: images (N, C, H, W) as float32 with mean 0 and deviation 1, labels (N,)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rewire.errors import nearest

from . import idx
from .inputs import InputError, one_of

Labels = npt.NDArray[np.int64]
_NAMES = ("digits", "fashion-mnist")


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Training and held-out test images (N, C, H, W) with their labels (N,) as int64."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        _, channels, height, width = self.x_train.shape
        return channels, height, width


def names() -> list[str]:
    """Names that :func:`load` takes."""
    return list(_NAMES)


@lru_cache(maxsize=4)
def load(name: str, folder: Path | None = None) -> Dataset:
    """The data set called ``name``; ``folder`` holds its files where it needs any.

    Kept in memory, because every cell of a grid asks for it. Treat the tensors as read-only.

    Raises:
        InputError: the name is unknown, the folder or a file is missing, or a file is damaged.
    """
    one_of("data set", name, _NAMES)
    if name == "digits":
        if folder is not None:
            raise InputError("digits come with scikit-learn and take no data directory")
        return _digits()
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
    train, test = (torch.from_numpy(x).float().unsqueeze(1) for x in (x_train, x_test))
    # The test images are scaled with the training images' numbers: nothing of them is looked at.
    std, mean = torch.std_mean(train)
    train.sub_(mean).div_(std)
    test.sub_(mean).div_(std)
    return Dataset(name, train, torch.from_numpy(y_train).long(), test, torch.from_numpy(y_test).long(), 10)
