"""The same grid on Ray, on a cluster of this machine alone: same files, same numbers, resume included."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from rewire.ablation import How, load_results, open_run, read, run_grid
from rewire.ablation.grid import Grid
from rewire.errors import RewireError

pytest.importorskip("ray")

GRID = {"model": "mlp", "seeds": 2, "epochs": 2, "batch_size": 200, "controls": False, "alignments": 0}


def ablate(grid: Grid, folder: Path, how: How) -> None:
    with open_run(folder, grid, "test") as run, open(os.devnull, "w") as nowhere:
        run_grid(run, Console(file=nowhere), how)


def numbers(folder: Path) -> dict[str, object]:
    return {r.cell.id: (r.status, r.accuracy, [e.loss for e in r.history]) for r in load_results(folder)}


def test_ray_gives_the_same_files_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Workers of the cluster import the package from where this process did.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    small, whole = (read({**GRID, "rules": rules}) for rules in ("dfa", "dfa fa"))
    ablate(small, tmp_path / "ray", How(workers=0))
    first = (tmp_path / "ray" / "results.jsonl").read_bytes()
    try:
        ablate(whole, tmp_path / "ray", How(on="ray", workers=1))
    except RewireError as error:  # its processes have half a minute to come up
        pytest.skip(str(error))
    ablate(whole, tmp_path / "here", How(workers=0))

    assert (tmp_path / "ray" / "results.jsonl").read_bytes().startswith(first)
    assert numbers(tmp_path / "ray") == numbers(tmp_path / "here") and len(numbers(tmp_path / "ray")) == 4
    lines = [json.loads(line) for line in (tmp_path / "ray" / "results.jsonl").read_text().splitlines()]
    assert len({tuple(line) for line in lines}) == 1
    for line in lines:
        assert (tmp_path / "ray" / "cells" / line["id"] / "checkpoint.pt").exists()
