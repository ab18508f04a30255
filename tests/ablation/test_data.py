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


def arrays(**changes: object) -> dict[str, object]:
    rng = np.random.default_rng(0)
    found: dict[str, object] = {
        "x_train": rng.normal(size=(6, 4)),
        "y_train": np.arange(6) % 3,
        "x_test": rng.normal(size=(3, 4)),
        "y_test": np.arange(3),
    }
    return {name: value for name, value in (found | changes).items() if value is not None}


def as_tuple() -> tuple[object, ...]:
    return tuple(arrays().values())


def test_npz_and_functions_give_the_same(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays())  # type: ignore[arg-type]
    one, other = load(str(tmp_path / "a.npz")), load("tests.ablation.test_data:as_tuple")
    np.testing.assert_array_equal(one.x_train, np.float32(arrays()["x_train"]))
    assert torch.equal(one.x_train, other.x_train) and torch.equal(one.y_test, other.y_test)
    assert one.classes == 3 and one.shape == (4,) and one.y_train.dtype == torch.int64


def test_npz_images_are_scaled_and_ids_are_not(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", **arrays(x_train=images, x_test=images[:3]))  # type: ignore[arg-type]
    data = load(str(tmp_path / "images.npz"))
    expected = (images - images.mean()) / images.astype(np.float64).std(ddof=1)
    np.testing.assert_allclose(data.x_train[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(data.x_test[:, 0], expected[:3], atol=1e-5)

    ids = np.arange(24, dtype=np.int32).reshape(6, 4)
    np.savez(tmp_path / "ids.npz", **arrays(x_train=ids, x_test=ids[:3], y_train=ids, y_test=ids[:3]))  # type: ignore[arg-type]
    data = load(str(tmp_path / "ids.npz"))
    assert data.x_train.dtype == torch.int64 and data.y_train.shape == (6, 4) and data.classes == 24


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"y_test": None}, "has no y_test"),
        ({"y_train": np.zeros(5, int)}, r"y_train has shape \(5,\)"),
        ({"y_train": np.zeros(6)}, "y_train has shape"),
        ({"y_train": np.full(6, -1)}, "below zero"),
        ({"x_test": np.zeros((3, 5))}, "differ in shape or type"),
        ({"x_train": np.full((6, 4), np.nan)}, "not finite"),
        ({"x_train": np.zeros(6)}, r"x_train has shape \(6,\)"),
        ({"x_train": np.array([object()])}, "cannot read"),
    ],
)
def test_npz_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays(**changes))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=says):
        load(str(tmp_path / "a.npz"))


def test_other_files_are_no_npz(tmp_path: Path) -> None:
    for number, raw in enumerate((b"", b"text", b"PK\x03\x04 broken")):
        (tmp_path / f"{number}.npz").write_bytes(raw)
        with pytest.raises(InputError, match="cannot read"):
            load(str(tmp_path / f"{number}.npz"))
    (tmp_path / "array.npz").write_bytes(b"")
    np.save(tmp_path / "array", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(InputError, match="cannot read"):
        load(str(tmp_path / "array.npz"))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16])
def test_labels_of_every_whole_type(tmp_path: Path, kind: type[np.integer]) -> None:
    np.savez(tmp_path / "a.npz", **arrays(y_train=np.arange(6).astype(kind) % 3, y_test=np.arange(3, dtype=kind)))  # type: ignore[arg-type]
    data = load(str(tmp_path / "a.npz"))
    assert data.y_train.tolist() == [0, 1, 2, 0, 1, 2] and data.classes == 3
