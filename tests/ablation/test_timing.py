"""The step-time ratio, with a clock of our own: a test must not depend on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rewire.ablation import Cell, timing
from rewire.ablation.timing import paired_ratio, step_ratio

BATCH = (torch.zeros(1), torch.zeros(1))


class Clock:
    """A clock that moves only when a step says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def step(self, name: str, costs: Callable[[int], float]) -> timing.Step:
        calls = iter(range(10_000))

        def run(x: Tensor, y: Tensor) -> None:
            self.order.append(name)
            self.now += costs(next(calls))

        return run


def test_ratio_of_paired_times() -> None:
    clock = Clock()
    ratio = paired_ratio(clock.step("rule", lambda _: 3.0), clock.step("bp", lambda _: 4.0), [BATCH] * 5, clock)

    assert ratio == pytest.approx(0.75)


def test_drift_and_hiccups_do_not_move_the_ratio() -> None:
    """The machine slows down tenfold and stalls twice; each pair still says one half."""
    clock = Clock()
    rule = clock.step("rule", lambda turn: (1 + turn) * 1.0 + (500 if turn in (3, 7) else 0))
    reference = clock.step("bp", lambda turn: (1 + turn) * 2.0)

    assert paired_ratio(rule, reference, [BATCH] * 11, clock) == pytest.approx(0.5)


def test_both_take_turns_at_going_first_on_the_same_batch() -> None:
    clock = Clock()
    paired_ratio(clock.step("rule", lambda _: 1.0), clock.step("bp", lambda _: 1.0), [BATCH] * 4, clock)

    assert clock.order == ["bp", "rule", "rule", "bp", "bp", "rule", "rule", "bp"]


def test_backprop_is_one_without_being_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "paired_ratio", lambda *_: pytest.fail("measured"))

    assert step_ratio(Cell("mlp", "bp", 0)) == 1.0


def test_other_rules_are_measured_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def fake(step: timing.Step, reference: timing.Step, batches: list[timing.Batch]) -> float:
        seen.extend(len(x) for x, _ in batches)
        assert step is not reference
        return 0.5

    monkeypatch.setattr(timing, "paired_ratio", fake)

    assert step_ratio(Cell("mlp", "dfa", 0, batch_size=16), pairs=7) == 0.5
    assert seen == [16] * 7
