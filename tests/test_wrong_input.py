"""Requests that are wrong in ways less common: one line, exit code 2, nothing written, and no traceback."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewire.cli import main

MODULE = """
import torch
from torch import nn

def good():
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module and a data set."""
    (tmp_path / "shapes_of_wrong.py").write_text(MODULE)
    (tmp_path / "leaves_at_once.py").write_text("import sys\nsys.exit('no arguments')\n")
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {f"x_{half}": rng.normal(size=(12, 12)).astype(np.float32) for half in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays, y_train=np.arange(12) % 3, y_test=np.arange(12) % 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return tmp_path


QUICK = ["--model", "shapes_of_wrong:good", "--data", "data.npz", "--epochs", "1", "--alignments", "0"]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that the command ``args`` ends with."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(args)
    out, err = capsys.readouterr()
    assert caught.value.code == 2, err
    assert out == "" and err.startswith("rewire: ") and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(Path.cwd().rglob("*")) == before
    return err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["train", *QUICK, "--seed", "9" * 23], "seed must be below 2**63"),
        (["train", "--model", "shapes_of_wrong:leaves", "--data", "data.npz"], "failed: SystemExit: 3"),
        (["ablate", "--model", "leaves_at_once:model", "--data", "data.npz"], "cannot be imported: SystemExit"),
        (["inspect", "shapes_of_wrong:leaves"], "failed: SystemExit: 3"),
        (["inspect", "shapes_of_wrong:good", "--seed", "-1"], "seed must be zero or more"),
        (["ablate", *QUICK, "--out", "data.npz"], "data.npz is a file"),
        (["ablate", *QUICK, "--out", "data.npz/below"], "data.npz is a file"),
        (["train", *QUICK, "--out", "."], "not the folder of a run"),
        (["report", "."], "no results.jsonl in ."),
        (["report", "nowhere"], "no results.jsonl in nowhere"),
    ],
)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    assert says in refused(capsys, *args)


@pytest.mark.parametrize(
    ("grid", "says"), [(3, "has no grid"), ({"rules": ["dfaa"]}, "did you mean 'dfa'"), ({"ruls": 1}, "'ruls'")]
)
def test_a_run_whose_file_was_changed_by_hand(
    here: Path, capsys: pytest.CaptureFixture[str], grid: object, says: str
) -> None:
    (here / "run").mkdir()
    (here / "run" / "run.json").write_text(json.dumps({"version": 1, "grid": grid}))
    for command in ("ablate", "train"):
        assert says in refused(capsys, command, "--resume", "run")


def test_a_place_where_no_folder_can_be_made(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``os.access`` says yes to root everywhere; only trying tells."""
    real = Path.mkdir

    def mkdir(self: Path, *args: Any, **options: Any) -> None:
        if self.name == "out":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "cannot write to out: Read-only file system" in refused(capsys, "train", *QUICK, "--out", "out")
