"""Small stand-ins for real data, written as real files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest


def idx_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    """``array`` as an IDX file, written from the format's description and not with our reader."""
    header = b"\x00\x00\x08" + struct.pack(">B", array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def fashion_dir(tmp_path: Path) -> Path:
    """A folder with four tiny IDX files, two gzipped: 60 training and 20 test images of 12×12."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for half, count in (("train", 60), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (count, 12, 12)).astype(np.uint8)
        # Something to learn: each class lights up its own row.
        images[np.arange(count), labels] = 250
        (folder / f"{half}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder
