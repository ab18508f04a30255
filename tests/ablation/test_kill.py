"""Stopped at any moment and gone on with: as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import rewire
from rewire.ablation import Grid, How, StorageError, open_run, read, run_grid
from rewire.ablation import files as files_module

HERE = {"PYTHONPATH": str(Path(rewire.__file__).parents[1])}


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """A tiny data set: 48 and 24 samples of 12 numbers in 3 classes."""
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    arrays: dict[str, Any] = {}
    for half, count in (("train", 48), ("test", 24)):
        arrays[f"y_{half}"] = np.arange(count) % 3
        arrays[f"x_{half}"] = (rng.normal(size=(count, 12)) + arrays[f"y_{half}"][:, None]).astype(np.float32)
    np.savez(path, **arrays)
    return path


def timeless(folder: Path) -> dict[str, Any]:
    """All results by id, without what is measured in seconds and bytes; fails where a cell has two."""
    found: dict[str, Any] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["id"] not in found
        for name in ("step_ms", "step_ratio", "memory_mb", "seconds"):
            assert record.pop(name) is not None
        for epoch in record["history"]:
            del epoch["seconds"]
        found[record["id"]] = record
    return found


# -- stopped at every write, in one process ------------------------------------------------------------


class Killed(BaseException):
    """What no handler of ours catches: the process is gone."""


@contextmanager
def dies_at(number: int, monkeypatch: pytest.MonkeyPatch, torn: bool) -> Iterator[list[int]]:
    """The operation on files with this number does not happen; a torn write happens in part. Counts them."""
    count = [0]

    def counted(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                if name == "write" and torn:
                    real(args[0], args[1][: len(args[1]) // 2])
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(files_module.os, name, wrapped)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        for name in ("write", "fsync", "replace"):
            counted(name)
        yield count


def ablate(grid: Grid, folder: Path) -> None:
    with open_run(folder, grid, "test") as run:
        run_grid(run, Console(file=open(os.devnull, "w")), How(workers=0, every=0))  # noqa: SIM115


@pytest.mark.parametrize("together", [0, 2])
def test_stopped_at_any_write_and_gone_on_with(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    grid = read(
        {"model": "mlp", "rule": ["dfa"], "seeds": 2, "data": str(npz), "epochs": 2, "batch_size": 24}
        | {"controls": False, "together": together}
    )
    with dies_at(0, monkeypatch, False) as count:
        ablate(grid, tmp_path / "undisturbed")
    expected = timeless(tmp_path / "undisturbed")
    assert len(expected) == 2 and count[0] > 30

    for number in range(1, count[0] + 1, 5):
        folder = tmp_path / str(number)
        with dies_at(number, monkeypatch, torn=number % 2 == 0), pytest.raises(Killed):
            ablate(grid, folder)
        ablate(grid, folder)
        assert timeless(folder) == expected, number


def test_a_full_disk_is_one_error_and_loses_nothing(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = read({"model": "mlp", "rule": "fa", "seeds": 3, "data": str(npz), "epochs": 1, "controls": False})
    ablate(grid, tmp_path / "undisturbed")
    folder = tmp_path / "full"
    real = os.write
    lines = [0]

    def full(handle: int, data: bytes) -> int:
        lines[0] += 1
        return real(handle, data[:10]) if lines[0] == 2 else real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="No space left on device"):
            ablate(grid, folder)

    assert (folder / "results.jsonl").read_bytes().count(b"\n") == 1
    assert (folder / "results.jsonl").read_bytes().endswith(b"\n")
    ablate(grid, folder)
    assert timeless(folder) == timeless(tmp_path / "undisturbed")


# -- kill -9 on real processes -------------------------------------------------------------------------


def command(npz: Path, folder: Path, seeds: int, epochs: int, workers: int, together: int) -> list[str]:
    return [
        *(sys.executable, "-m", "rewire", "ablate", "--model", "mlp", "--rules", "fa dfa brsf", "--seeds", str(seeds)),
        *("--data", str(npz), "--batch-size", "16", "--optimizer", "adam sgd", "--no-controls"),
        *("--epochs", str(epochs), "--checkpoint-seconds", "0.1", "--workers", str(workers), "--out", str(folder)),
        *(("--together", str(together)) if together else ()),
    ]


def kill_again_and_again(arguments: list[str], folder: Path, times: int, rng: random.Random) -> int:
    """Start, kill at some moment, and so on; how many of the kills met the run with something done and not all."""
    useful = 0
    while times:
        process = subprocess.Popen(
            arguments,
            env=os.environ | HERE,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Wait for the first sign of work, however slow the machine is at importing torch.
        before = size(folder)
        end = time.monotonic() + 120
        while size(folder) == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        if process.poll() is None:
            useful += 1
        if rng.random() < 0.5:
            os.kill(process.pid, signal.SIGKILL)  # workers have to notice by themselves
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        times -= 1
    return useful


def size(folder: Path) -> tuple[int, float]:
    """Something that changes when cells are worked on."""
    paths = list(folder.glob("cells/*/history.jsonl")) + list(folder.glob("results.jsonl"))
    return len(paths), sum(path.stat().st_mtime for path in paths if path.exists())


def killed_and_undisturbed(
    npz: Path, tmp_path: Path, times: int, seeds: int, epochs: int, workers: int = 2, together: int = 0
) -> None:
    """Undisturbed in this process, killed and gone on with in workers: numbers do not depend on that either."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    grid = read(
        {"model": "mlp", "rule": "fa dfa brsf", "seeds": seeds, "data": str(npz), "epochs": epochs}
        | {"optimizer": ["adam", "sgd"], "batch_size": 16, "controls": False, "together": together}
    )
    ablate(grid, undisturbed)
    expected = timeless(undisturbed)
    assert len(expected) == 6 * seeds

    arguments = command(npz, killed, seeds, epochs, workers, together)
    useful = kill_again_and_again(arguments, killed, times, random.Random(0))
    assert useful >= times / 2
    last = subprocess.run(arguments, env=os.environ | HERE, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert timeless(killed) == expected
    for folder in (killed / "cells").iterdir():
        assert (folder / "checkpoint.pt").exists()
        assert not list(folder.glob(".*.new"))


def test_kill_9(npz: Path, tmp_path: Path) -> None:
    killed_and_undisturbed(npz, tmp_path, times=1, seeds=2, epochs=20)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "together"), [(1, 0), (2, 0), (2, 4)])
def test_kill_9_ten_times_in_24_cells(npz: Path, tmp_path: Path, workers: int, together: int) -> None:
    killed_and_undisturbed(npz, tmp_path, times=10, seeds=4, epochs=100, workers=workers, together=together)
