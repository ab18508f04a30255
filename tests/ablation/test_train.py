"""One cell: what comes out, and that it depends on the cell alone."""

from __future__ import annotations

import importlib
import math
import os
import random
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewire
from rewire.ablation import Cell, Epoch, InputError, Result, StorageError, checkpoint, load, models, run_cell, train
from rewire.ablation import together as together_module
from rewire.ablation.progress import Listener, measured_after
from rewire.ablation.together import run_together
from rewire.ablation.trainer import make_trainer

CELL = Cell("mlp", "dfa", seed=1, epochs=2, lr=2e-3)


def numbers(result: Result) -> list[tuple[float, float]]:
    return [(epoch.loss, epoch.accuracy) for epoch in result.history]


class Heard(Listener):
    """Everything a listener is told; may raise after some steps."""

    def __init__(self, steps: int = 10**9) -> None:
        self.left = steps
        self.epochs: list[Epoch] = []
        self.measured: list[Mapping[str, Any] | None] = []
        self.losses: list[float] = []
        self.before = 0

    def began(self, history: Any, alignment: Any) -> None:
        self.before = len(history)

    def step(self, done: int, total: int, loss: float) -> None:
        self.losses.append(loss)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def epoch(self, epoch: Epoch, alignment: Mapping[str, Any] | None) -> None:
        self.epochs.append(epoch)
        self.measured.append(alignment)


def test_a_cell_learns() -> None:
    result = run_cell(CELL)

    assert result.accuracy is not None and result.accuracy > 0.8
    assert result.final_loss is not None and result.final_loss < result.history[0].loss
    assert result.final_loss == result.history[-1].loss
    assert [epoch.epoch for epoch in result.history] == [1, 2]
    assert result.status == "done" and result.error is None
    assert result.step_ms and result.memory_mb and result.step_ratio
    assert 0 < result.history[0].seconds < result.seconds


def test_same_cell_same_numbers_whatever_ran_before() -> None:
    first = run_cell(CELL)
    torch.manual_seed(123)
    torch.randn(10)
    run_cell(replace(CELL, seed=2, epochs=1))

    assert numbers(run_cell(CELL)) == numbers(first)


def test_other_seed_other_numbers() -> None:
    assert numbers(run_cell(replace(CELL, seed=2))) != numbers(run_cell(CELL))


def test_a_cell_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    run_cell(replace(CELL, epochs=1))

    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_all_rules_start_from_the_same_weights() -> None:
    data = load("digits")
    ours, backprop = (make_trainer(replace(CELL, rule=rule), data).net.model for rule in ("dfa", "bp"))

    assert all(torch.equal(value, backprop.state_dict()[name]) for name, value in ours.state_dict().items())


def test_rules_train_differently() -> None:
    """The rule asked for is the rule used: otherwise these would agree to the last bit."""
    cells = [replace(CELL, rule=rule) for rule in ("bp", "fa", "dfa")]
    cells += [
        replace(CELL, layers=(("3", "fa"),)),
        replace(CELL, feedback="orthogonal"),
        replace(CELL, scale=0.05),
        replace(CELL, rule="bp", layers=(("3", "fa"),)),
    ]
    assert len({run_cell(replace(cell, alignments=0)).final_loss for cell in cells}) == len(cells)
    assert len({cell.id for cell in cells}) == len(cells)


def test_a_listener_hears_of_each_step_and_epoch() -> None:
    heard = Heard()
    result = run_cell(CELL, listener=heard)

    assert tuple(heard.epochs) == result.history
    assert len(heard.losses) == 2 * math.ceil(len(load("digits").x_train) / 32)


def test_divergence_ends_the_run_and_is_said(tmp_path: Path) -> None:
    cell = replace(CELL, rule="bp", optimizer="sgd", lr=1e20, epochs=5)
    result = run_cell(cell, tmp_path)

    assert result.status == "diverged" and result.final_loss is not None and not math.isfinite(result.final_loss)
    assert len(result.history) == 1
    again = run_cell(cell, tmp_path)  # nothing is trained again
    assert again.history[0].accuracy == result.history[0].accuracy and len(again.history) == 1


class Small(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            torch.nn.Flatten(),
            *(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Tanh()),
            torch.nn.Linear(8, 10),
        )


@pytest.mark.parametrize(
    ("rule", "steps"),
    [("bp", 10), ("fa", 10), ("brsf", 10), ("drtp", 10), *(("dfa", steps) for steps in (1, 2, 45, 46, 60))],
)
def test_going_on_gives_the_same_bits(rule: str, steps: int, tmp_path: Path) -> None:
    """Interrupted in the measuring pass, within an epoch, before its end and after it."""
    cell = replace(CELL, rule=rule, model="tests.ablation.test_train:Small", schedule="cosine", alignments=0)
    whole = Heard()
    expected = run_cell(cell, listener=whole)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path, Heard(steps), every=0)
    rest = Heard()
    result = run_cell(cell, tmp_path, rest)

    assert numbers(result) == numbers(expected)
    assert 0 < len(rest.losses) <= len(whole.losses) - steps + 1
    assert rest.losses == whole.losses[-len(rest.losses) :]
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert len(run_cell(cell, tmp_path).history) == 2


class Noisy(torch.nn.Module):
    """Batch statistics, dropout, and numbers from all three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.last = torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.first(x.flatten(1))))
        if self.training:
            h = torch.nn.functional.dropout(h, 0.2) + random.random() + float(np.random.random())
        return self.last(h)


def test_going_on_with_noise_of_every_kind(tmp_path: Path) -> None:
    cell = replace(CELL, model="tests.ablation.test_train:Noisy", alignments=0)
    expected = run_cell(cell)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path, Heard(50), every=0)
    assert numbers(run_cell(cell, tmp_path)) == numbers(expected)
    assert run_cell(replace(cell, seed=5)).history != expected.history


class Unpicklable(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
        self.hook = lambda x: x


def test_a_model_that_cannot_be_pickled_is_trained_in_one_go(tmp_path: Path) -> None:
    cell = replace(CELL, model="tests.ablation.test_train:Unpicklable", alignments=0)
    with pytest.warns(rewire.RewireWarning, match="no checkpoints of a model that cannot be pickled"):
        result = run_cell(cell, tmp_path, every=0)
    assert result.status == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def parametrized() -> torch.nn.Module:
    norm = torch.nn.utils.parametrizations.weight_norm
    return torch.nn.Sequential(
        torch.nn.Flatten(), norm(torch.nn.Linear(64, 8)), torch.nn.ReLU(), torch.nn.Linear(8, 10)
    )


def test_a_parametrized_model_is_trained_in_one_go_too(tmp_path: Path) -> None:
    """Torch refuses to pickle such models with a RuntimeError, as it says that a disk is full."""
    cell = replace(CELL, model="tests.ablation.test_train:parametrized", rule="bp", epochs=1)
    with pytest.warns(rewire.RewireWarning, match="cannot be pickled: Serialization of parametrized modules"):
        assert run_cell(cell, tmp_path, every=0).status == "done"


def test_a_disk_that_is_full_is_no_model_that_cannot_be_pickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            checkpoint.save(tmp_path / "checkpoint.pt", {"net": Small()})
    assert not list(tmp_path.iterdir())


OWN_MODEL = """
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x):
        return self.layers(x)
"""


@pytest.mark.filterwarnings("error::rewire.RewireWarning")
@pytest.mark.parametrize("together", [False, True])
def test_a_fresh_worker_goes_on_with_a_model_of_the_current_directory(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_of_ones_own.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    cell = Cell("model_of_ones_own:Own", "fa", 0, epochs=1, batch_size=500, alignments=0)
    cells = [cell, replace(cell, seed=1)] if together else [cell]
    folders = [tmp_path / each.id for each in cells]

    def run() -> list[Result]:
        return run_together(cells, folders) if together else [run_cell(cell, folders[0])]

    first = run()
    # What a worker is given is unpickled, not made: nothing has imported the module yet.
    monkeypatch.delitem(sys.modules, "model_of_ones_own")
    monkeypatch.setattr(models, "net", lambda *_: pytest.fail("began again"))
    monkeypatch.setattr(together_module if together else train, "step_ratio", lambda _: 1.0)
    assert [numbers(result) for result in run()] == [numbers(result) for result in first]


@pytest.mark.filterwarnings("error::rewire.RewireWarning")
def test_a_checkpoint_is_gone_on_from_wherever_the_data_lie(
    fashion_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(fashion_dir, tmp_path / "moved"))
    cell = Cell("mlp", "fa", 0, data="fashion-mnist", data_dir=fashion_dir, epochs=1, alignments=0)
    cells = [cell, replace(cell, seed=1)]
    folders = [tmp_path / each.id for each in cells]
    run_cell(cell, folders[0])
    run_together(cells, folders)
    monkeypatch.setattr(models, "net", lambda *_: pytest.fail("began again"))
    for module in (train, together_module):
        monkeypatch.setattr(module, "step_ratio", lambda _: 1.0)
    run_cell(replace(cell, data_dir=moved), folders[0])
    run_together([replace(each, data_dir=moved) for each in cells], folders)


def test_a_damaged_checkpoint_starts_the_cell_again(tmp_path: Path) -> None:
    expected = run_cell(CELL, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.warns(rewire.RewireWarning, match="its cell starts again"):
        assert numbers(run_cell(CELL, tmp_path)) == numbers(expected)


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


def test_alignment_is_measured_evenly_and_at_the_end() -> None:
    assert measured_after(replace(CELL, epochs=15)) == {3, 6, 9, 12, 15}
    assert measured_after(replace(CELL, epochs=3)) == {1, 2, 3}
    assert measured_after(replace(CELL, epochs=7, alignments=2)) == {4, 7}
    assert measured_after(replace(CELL, alignments=0)) == frozenset()


def test_alignment_goes_into_the_result_and_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, model: torch.nn.Module, inputs: torch.Tensor, loss_fn: Any) -> None:
            torch.rand(1), random.random()
            assert len(inputs) == 128 and float(loss_fn(model(inputs)).detach()) > 0

        def record(self) -> dict[str, Any]:
            return {"gamma": float("nan"), "flags": ["why"], "layers": {"1": {"norm": 1.0}}}

    undisturbed = run_cell(replace(CELL, alignments=0))
    monkeypatch.setattr(rewire, "alignment", Fake, raising=False)
    heard = Heard()
    result = run_cell(replace(CELL, alignments=1), listener=heard)

    assert numbers(result) == numbers(undisturbed)
    expected = {"epoch": 2, "step": 90, "gamma": None, "flags": ["why"], "layers": {"1": {"norm": 1.0}}}
    assert [dict(each) for each in result.alignment] == [expected]
    assert heard.measured == [None, expected]
    assert run_cell(replace(CELL, rule="bp")).alignment == ()  # nothing to compare with itself


@pytest.mark.skipif(not hasattr(rewire, "alignment"), reason="rewire.alignment is not there")
def test_alignment_of_a_real_run() -> None:
    undisturbed = run_cell(replace(CELL, alignments=0))
    result = run_cell(replace(CELL, alignments=1))
    assert numbers(result) == numbers(undisturbed)
    assert set(result.alignment[0]["layers"]) >= {"3"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "mpl"}, "unknown model 'mpl'; did you mean 'mlp'"),
        ({"model": "torchvison:resnet18"}, "did you mean 'torchvision'"),
        ({"model": "tests.ablation.test_train:Noise"}, "did you mean 'Noisy'"),
        ({"rule": "dfaa"}, "unknown rule 'dfaa'; did you mean 'dfa'"),
        ({"layers": (("1", "ffa"),)}, "unknown rule 'ffa'; did you mean 'fa'"),
        ({"feedback": "low rank"}, "did you mean 'lowrank'"),
        ({"skip": "kept"}, "did you mean 'keep'"),
        ({"scale": "Auto"}, "did you mean 'auto'"),
        ({"scale": -1.0}, "scale must be above zero"),
        ({"data": "digit"}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"data": "nowhere.npz"}, "no file nowhere.npz"),
        ({"optimizer": "Adam"}, "did you mean 'adam'"),
        ({"schedule": "cos"}, "unknown schedule 'cos'"),
        ({"epochs": 0}, "epochs must be above zero"),
        ({"batch_size": -1}, "batch size must be above zero"),
        ({"lr": math.nan}, "learning rate must be above zero"),
        ({"lr": math.inf}, "learning rate must be above zero"),
        ({"weight_decay": -0.1}, "weight decay must be zero or more"),
        ({"momentum": 0.9}, "momentum belongs to --optimizer sgd"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum must be below 1"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(CELL, **change)  # type: ignore[arg-type]


def test_ids_are_stable_and_say_everything_but_where_the_data_are() -> None:
    assert CELL.id == Cell.from_config(CELL.config()).id
    assert replace(CELL, data="fashion-mnist").id == replace(CELL, data="fashion-mnist", data_dir=Path("x")).id
    changes: list[dict[str, Any]] = [{"seed": 3}, {"lr": 0.1}, {"blocks": ("a",)}, {"alignments": 1}, {"epochs": 9}]
    changes += [{"layers": (("1", "fa"), ("*", "bp"))}, {"layers": (("*", "bp"), ("1", "fa"))}]
    assert len({replace(CELL, **change).id for change in changes}) == len(changes)
    # Written down: a change of ids would orphan every run on disk.
    assert Cell("mlp", "dfa", 0).id == "5d6a6145f63f685e"


def test_digits_take_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data directory"):
        load("digits", tmp_path)
