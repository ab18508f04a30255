"""Data: IDX files, the held-out split, scaling."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rewire.ablation import InputError, idx, load
from rewire.ablation.data import split

from .conftest import idx_bytes


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_reads_what_was_written(tmp_path: Path, suffix: str) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / f"images{suffix}"
    raw = idx_bytes(array)
    path.write_bytes(gzip.compress(raw) if suffix else raw)

    np.testing.assert_array_equal(idx.read(path, 3), array)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file"),
        (idx_bytes(np.zeros((2, 2), np.uint8)), "not an IDX file of 3-dimensional"),
        (b"\x00\x00\x0d\x03" + bytes(12), "not an IDX file"),  # floats
        (idx_bytes(np.zeros((2, 3, 4), np.uint8))[:9], "inside its header"),
        (idx_bytes(np.zeros((2, 3, 4), np.uint8))[:-1], "2×3×4 but holds 23"),
        (idx_bytes(np.zeros((2, 3, 4), np.uint8)) + b"\x00", "2×3×4 but holds 25"),
    ],
)
def test_idx_refuses_damaged_files(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(raw)

    with pytest.raises(InputError, match=says):
        idx.read(path, 3)


def test_idx_refuses_damaged_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8)))
    broken = bytearray(packed)
    broken[20] ^= 0xFF
    for number, raw in enumerate((packed[:-12], b"plain text", bytes(broken))):
        path = tmp_path / f"{number}.gz"
        path.write_bytes(raw)
        with pytest.raises(InputError, match="cannot read"):
            idx.read(path, 1)


def test_split_is_disjoint_complete_stratified_and_fixed() -> None:
    labels = np.repeat(np.arange(10), 50)
    train, test = split(labels)

    assert not set(train) & set(test)
    assert sorted([*train, *test]) == list(range(500))
    assert np.bincount(labels[test]).tolist() == [10] * 10
    np.testing.assert_array_equal(split(labels)[1], test)


def test_digits_are_whole_and_hold_out_a_fifth() -> None:
    data = load("digits")

    assert len(data.x_train) + len(data.x_test) == 1797
    assert 0.19 < len(data.x_test) / 1797 < 0.21
    assert data.shape == (1, 8, 8)
    assert data.y_train.dtype == torch.int64
    torch.testing.assert_close(data.x_train.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.x_train.std(), torch.tensor(1.0), atol=1e-5, rtol=0)
    # No test image is also a training image.
    trained_on = {image.numpy().tobytes() for image in data.x_train}
    assert not any(image.numpy().tobytes() in trained_on for image in data.x_test)


def test_fashion_reads_gzipped_and_plain_files_alike(fashion_dir: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in fashion_dir.iterdir():
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (plain / path.name.removesuffix(".gz")).write_bytes(raw)

    one, other = load("fashion-mnist", fashion_dir), load("fashion-mnist", plain)

    assert one.x_train.shape == (60, 1, 12, 12)
    assert one.y_test.tolist() == [*range(10), *range(10)]
    assert torch.equal(one.x_train, other.x_train)
    assert torch.equal(one.x_test, other.x_test)


def test_fashion_scales_test_images_with_the_training_numbers(fashion_dir: Path) -> None:
    whole = load("fashion-mnist", fashion_dir)
    brighter = fashion_dir.parent / "brighter"
    shutil.copytree(fashion_dir, brighter)
    white = np.full((20, 12, 12), 255, np.uint8)
    (brighter / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(white)))

    assert torch.equal(load("fashion-mnist", brighter).x_train, whole.x_train)
    assert load("fashion-mnist", brighter).x_test.min() > 1


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("t10k-labels-idx1-ubyte", np.zeros(19, np.uint8), "20 t10k images but 19 labels"),
        ("train-labels-idx1-ubyte", np.full(60, 10, np.uint8), "label is 10"),
        ("t10k-images-idx3-ubyte.gz", np.zeros((20, 9, 9), np.uint8), r"\(12, 12\), t10k images \(9, 9\)"),
    ],
)
def test_fashion_refuses_files_that_do_not_belong_together(
    fashion_dir: Path, name: str, array: np.ndarray, says: str
) -> None:
    raw = idx_bytes(array)
    (fashion_dir / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)

    with pytest.raises(InputError, match=says):
        load("fashion-mnist", fashion_dir)


def test_fashion_names_the_missing_file(fashion_dir: Path) -> None:
    (fashion_dir / "t10k-labels-idx1-ubyte").unlink()

    with pytest.raises(InputError, match="no t10k-labels-idx1-ubyte or"):
        load("fashion-mnist", fashion_dir)


def test_a_misspelt_folder_gets_its_neighbour(fashion_dir: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'fashion'"):
        load("fashion-mnist", fashion_dir.parent / "fashoin")
