"""Workers that fail, that are killed, and what they leave."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn

from rewire.ablation import Cell, run_cell
from rewire.ablation.work import Unit
from rewire.ablation.workers import outcomes

MARK = Path(os.environ.get("REWIRE_TEST_MARK", "/nonexistent"))


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


class KilledOnce(Small):
    """The first process to train it is killed, as the system does when memory is short."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not MARK.exists():
            MARK.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class KilledAlways(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return x


class Failing(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no\nsuch thing")


def cell(model: str, seed: int = 0) -> Cell:
    return Cell(f"tests.ablation.test_workers:{model}", "bp", seed, epochs=2, batch_size=200)


def test_killed_and_failing_cells_stop_no_others(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("REWIRE_TEST_MARK", str(tmp_path / "mark"))
    names = ("KilledOnce", "KilledAlways", "Failing", "Small")
    units = [Unit((cell(name),), tmp_path) for name in names]
    found = {
        outcome.unit.cells[0].model.partition(":")[2]: outcome.results[0]
        for outcome in outcomes(units, count=2, threads=1)
        if outcome is not None
    }

    assert set(found) == set(names)
    assert [found[name].status for name in names] == ["done", "failed", "failed", "done"]
    assert found["KilledAlways"].error == "its process was ended twice, killed by SIGKILL (out of memory?)"
    assert found["Failing"].error == "ValueError: no such thing"
    assert (tmp_path / "mark").exists()
    for name in ("KilledOnce", "Small"):  # the same model, and the same numbers as in this process
        expected = run_cell(cell("Small"))
        assert [e.loss for e in found[name].history] == [e.loss for e in expected.history]
