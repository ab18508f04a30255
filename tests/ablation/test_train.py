"""One cell: what comes out, and that it depends on the cell alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rewire.ablation import Cell, Epoch, InputError, load, run_cell
from rewire.ablation.train import make_trainer

CELL = Cell("mlp", "dfa", seed=1, epochs=2, lr=2e-3)


def test_a_cell_learns() -> None:
    result = run_cell(CELL)

    assert result.accuracy > 0.8
    assert result.final_loss < result.history[0].loss
    assert result.final_loss == result.history[-1].loss
    assert [epoch.epoch for epoch in result.history] == [1, 2]
    assert result.step_ms > 0 and not result.diverged


def test_same_cell_same_numbers_whatever_ran_before() -> None:
    first = run_cell(CELL)
    torch.manual_seed(123)
    torch.randn(10)
    run_cell(replace(CELL, seed=2, epochs=1))

    assert run_cell(CELL).history == first.history


def test_other_seed_other_numbers() -> None:
    assert run_cell(replace(CELL, seed=2)).history != run_cell(CELL).history


def test_a_cell_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    run_cell(replace(CELL, epochs=1))

    assert torch.equal(torch.get_rng_state(), before)


def test_all_rules_start_from_the_same_weights() -> None:
    data = load("digits")
    ours, backprop = (make_trainer(replace(CELL, rule=rule), data).model for rule in ("dfa", "bp"))

    assert all(torch.equal(value, backprop.state_dict()[name]) for name, value in ours.state_dict().items())


def test_rules_train_differently() -> None:
    """The rule asked for is the rule used: otherwise these would agree to the last bit."""
    losses = {run_cell(replace(CELL, rule=rule)).final_loss for rule in ("bp", "fa", "dfa")}

    assert len(losses) == 3


def test_on_epoch_hears_of_each_epoch() -> None:
    heard: list[Epoch] = []
    result = run_cell(CELL, heard.append)

    assert tuple(heard) == result.history


def test_divergence_ends_the_run_and_is_said() -> None:
    result = run_cell(replace(CELL, rule="bp", optimizer="sgd", lr=1e20, epochs=5))

    assert result.diverged and not math.isfinite(result.final_loss)
    assert len(result.history) == 1


def test_cosine_ends_at_zero() -> None:
    data = load("digits")
    trainer = make_trainer(replace(CELL, schedule="cosine", batch_size=500, epochs=2), data)
    rates = []
    for _ in range(6):  # 1,400 training images make 3 batches of 500 in each of 2 epochs
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.step(data.x_train[:8], data.y_train[:8])

    assert rates == sorted(rates, reverse=True)
    assert rates[0] == CELL.lr
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "mpl"}, "unknown model 'mpl'; did you mean 'mlp'"),
        ({"rule": "dfaa"}, "unknown rule 'dfaa'; did you mean 'dfa'"),
        ({"data": "digit"}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"optimizer": "Adam"}, "did you mean 'adam'"),
        ({"schedule": "cos"}, "unknown schedule 'cos'"),
        ({"epochs": 0}, "epochs must be above zero"),
        ({"batch_size": -1}, "batch size must be above zero"),
        ({"lr": math.nan}, "learning rate must be above zero"),
        ({"lr": math.inf}, "learning rate must be above zero"),
        ({"weight_decay": -0.1}, "weight decay must be zero or more"),
        ({"momentum": 0.9}, "momentum belongs to --optimizer sgd"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(CELL, **change)  # type: ignore[arg-type]


def test_digits_take_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data directory"):
        load("digits", tmp_path)
