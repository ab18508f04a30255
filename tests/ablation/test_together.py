"""Seeds trained together: the numbers of seeds trained alone, up to rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.ablation import Cell, load, run_cell, together, train
from rewire.ablation.data import Dataset
from rewire.ablation.together import NotTogether, run_together
from rewire.ablation.work import Unit, do, groups_of

CELL = Cell("mlp", "dfa", 0, epochs=2, batch_size=100, alignments=0)


def seeds(count: int = 3, **changes: object) -> list[Cell]:
    return [replace(CELL, seed=seed, **changes) for seed in range(count)]  # type: ignore[arg-type]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in float64, so that what is not rounding shows."""
    data = load("digits")
    wide = Dataset(data.name, data.x_train[:90].double(), data.y_train[:90], data.x_test.double(), data.y_test, 10)
    for module in (train, together):
        monkeypatch.setattr(module, "load", lambda *_: wide)
        monkeypatch.setattr(module, "step_ratio", lambda *_: 1.0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("model", "rule"),
    [*(("mlp", rule) for rule in ("bp", "fa", "dfa", "usf", "frsf", "shallow")), ("lenet", "dfa"), ("cnn", "fa")],
)
def test_as_trained_alone(double: None, rule: str, model: str) -> None:
    cells = seeds(rule=rule, model=model, batch_size=40, optimizer="sgd", lr=0.05, momentum=0.9, schedule="cosine")
    alone = [run_cell(cell) for cell in cells]
    for one, other in zip(alone, run_together(cells), strict=True):
        assert other.cell == one.cell and other.status == "done"
        assert other.accuracy == one.accuracy
        assert [epoch.loss for epoch in other.history] == pytest.approx([e.loss for e in one.history], rel=1e-8)
    assert len({result.final_loss for result in alone}) == 3


@pytest.fixture
def own(registry: None) -> None:
    """Rules of one's own, by name."""

    class Loudest(rewire.DirectRule):
        def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
            return error * (error.abs() >= error.abs().amax(axis, keepdim=True))

    class Looks(rewire.DirectRule):
        def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
            return error / float(error.abs().max())

    rewire.register_rule("loudest")(Loudest)
    rewire.register_rule("looks")(Looks)


@pytest.mark.usefixtures("own")
def test_a_rule_of_one_s_own_as_trained_alone(double: None) -> None:
    cells = seeds(rule="loudest", batch_size=40, optimizer="sgd", lr=0.05)
    alone = [run_cell(cell) for cell in cells]
    for one, other in zip(alone, run_together(cells), strict=True):
        assert [epoch.loss for epoch in other.history] == pytest.approx([e.loss for e in one.history], rel=1e-8)
    with pytest.raises(NotTogether, match=r"\.item\(\)"):  # what vmap refuses is said in its words
        run_together(seeds(rule="looks"))


class Stopped(Exception):
    pass


def test_stopped_and_gone_on_with_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = seeds()
    folders = [tmp_path / cell.id for cell in cells]
    expected = [[e.loss for e in result.history] for result in run_together(cells)]
    real, left = together._Together._step, [20]

    def until(self: object, *args: object) -> list[float]:
        left[0] -= 1
        if not left[0]:
            raise Stopped
        return real(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(together._Together, "_step", until)
        with pytest.raises(Stopped):
            run_together(cells, folders, every=0)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(together._Together, "_step", lambda self, *a: calls.append(1) or real(self, *a))  # type: ignore[arg-type]
        results = run_together(cells, folders)

    assert [[e.loss for e in result.history] for result in results] == expected
    assert len(calls) == 2 * 15 - 19
    for cell, folder, losses in zip(cells, folders, expected, strict=True):
        assert len((folder / "history.jsonl").read_text().splitlines()) == 2
        # The checkpoint of each is that of a cell of its own.
        assert [epoch.loss for epoch in run_cell(cell, folder).history] == losses


def test_one_that_diverges_takes_nobody_along() -> None:
    cells = seeds(optimizer="sgd", lr=0.05)
    expected = run_together(cells)
    real = together._Together._step
    count = [0]

    def broken(self: together._Together, x: torch.Tensor, y: torch.Tensor) -> list[float]:
        count[0] += 1
        if count[0] == 7:
            with torch.no_grad():
                self.params["1.weight"][1] = math.nan
        return real(self, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together._Together, "_step", broken)
        results = run_together(cells)
    assert [result.status for result in results] == ["done", "diverged", "done"]
    assert len(results[1].history) == 1
    for i in (0, 2):
        assert [e.loss for e in results[i].history] == [e.loss for e in expected[i].history]


class Dropping(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 9), nn.Dropout(0.5), nn.Linear(9, 10))


class Frozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 10))
        self[1].weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "resnet"}, "running statistics"),
        ({"rule": "brsf"}, "changes from step to step"),
        ({"rule": "switch(first=bp, then=fa, at=9)"}, "is another rule in some passes"),
        ({"rule": "fitted"}, "learns its feedback"),
        ({"rule": "kp"}, "learns its feedback"),
        ({"feedback": "seeded"}, "no plain tensor"),
        ({"skip": "cut"}, "skip='cut'"),
        ({"model": "tests.ablation.test_together:Dropping"}, "random"),
        ({"model": "tests.ablation.test_together:Frozen"}, "frozen"),
    ],
)
def test_what_cannot_be_trained_together_is_trained_alone_and_said_once(
    changes: dict[str, str], says: str, tmp_path: Path
) -> None:
    cells = tuple(seeds(2, epochs=1, batch_size=400, **changes))
    with pytest.raises(NotTogether, match=says):
        run_together(cells)
    outcome = do(Unit(cells, tmp_path))
    (note,) = [note for note in outcome.notes if "one seed by one" in note]
    assert says in note
    for cell, result in zip(cells, outcome.results, strict=True):
        assert [e.loss for e in result.history] == [e.loss for e in run_cell(cell).history]


def test_a_wrong_stacked_gradient_is_not_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each member with the feedback of the first: what the check is there for."""
    from rewire import stacked

    real = stacked._stacked

    def same(what: str, members: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return real(what, [members[0]] * len(members) if what == "feedback" else members)

    monkeypatch.setattr(stacked, "_stacked", same)
    with pytest.raises(NotTogether, match="differs from that of ordinary passes"):
        run_together(seeds())


def test_groups_differ_in_their_seed_alone() -> None:
    cells = [*seeds(5), *seeds(2, rule="fa")]
    assert [len(group) for group in groups_of(cells, 3)] == [3, 2, 2]
    assert groups_of(cells, 0) == [(cell,) for cell in cells]
    mixed = [cells[0], cells[5], cells[1], cells[6]]
    assert groups_of(mixed, 8) == [(cells[0], cells[1]), (cells[5], cells[6])]
    ordered = [replace(CELL, layers=layers) for layers in ((("*", "fa"), ("1", "bp")), (("1", "bp"), ("*", "fa")))]
    assert groups_of(ordered, 8) == [(cell,) for cell in ordered]  # later ones win
