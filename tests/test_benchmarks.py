"""Benchmarks run, their clocks and tables say what happened, and the pipeline's numbers are those found by hand."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from .scripts import beside

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from beside(monkeypatch, FOLDER)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a script's ``main`` as from the command line; only step_time starts processes of its own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(script: str, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
        return importlib.import_module(script).main() or 0

    return call


# -- commands ----------------------------------------------------------------------------------------


def test_step_time(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    tiny = ("--seconds", "0.01", "--least", "2", "--threads", "1", "--out", str(out))
    assert run("step_time", "--models", "mlp-128", "--modes", "eager", "--batches", "1", "128", *tiny) == 0
    capsys.readouterr()
    found = json.loads(out.read_text())
    assert {"device", "processor", "cores", "threads", "torch", "python", "rewire"} <= set(found["machine"])
    assert found["machine"]["threads"] == 1
    one, ordinary = found["lines"]
    assert (one["batch"], ordinary["batch"]) == (1, 128)
    assert set(one["contenders"]) == {"fa", "frsf", "brsf", "dfa"} and not one["fails"]
    for timed in one["contenders"].values():
        low, middle, high = timed["ratio"]
        assert 0 < low <= middle <= high and timed["turns"] >= 2
    peers = {"hand:dfa", "biotorch:fa", "biotorch:frsf", "biotorch:brsf", "biotorch:dfa", "tinydfa:dfa"}
    assert peers == {who for who in (*ordinary["contenders"], *ordinary["fails"]) if ":" in who}

    assert run("step_time", "--read", str(out), "--markdown") == 0
    printed = capsys.readouterr().out
    middle = ordinary["contenders"]["dfa"]["ratio"][1]
    assert f"{middle:.2f} [" in printed and "fa 1.15, dfa 1.12" in printed
    assert "time per sample" in printed


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("layer_cost", "dfa beyond"),
        ("where_time_goes", "matrix products"),
        ("memory", "checkpoint"),
        ("pipeline", "1f1b"),
        ("weight_gradients", "by sample"),
    ],
)
def test_runs_quickly(run: Callable[..., int], script: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, "--quick") == 0
    assert says in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("script", "options"), [("streams", ()), ("step_time", ("--device", "cuda"))])
def test_no_gpu_is_said(
    run: Callable[..., int], script: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, *options) == 0
    assert "no GPU here" in capsys.readouterr().out


def test_unknown_rule_is_refused(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("step_time", "--rules", "dfaa")
    assert "no rule 'dfaa'" in capsys.readouterr().err


# -- timing ------------------------------------------------------------------------------------------


def test_paired_ratios_are_of_one_turn() -> None:
    """Times drift tenfold in the course of the run, but both of a turn alike: ratios do not notice."""
    from paired import paired

    now, order = [0.0], []

    def step(name: str, factor: float) -> Any:
        def run_step() -> None:
            order.append(name)
            now[0] += factor * (1 + len(order) // 20)

        return run_step

    def clock(step: Any) -> float:
        began = now[0]
        step()
        return now[0] - began

    # Whole turns fall on steps of the drift, since a slow step needs no warming turn: one reference, then turns.
    found = paired({"half": step("half", 0.5)}, step("bp", 1.0), 0.0, least=40, clock=clock, now=lambda: now[0])
    assert found["contenders"]["half"]["ratio"][1] == pytest.approx(0.5)
    assert found["contenders"]["half"]["turns"] >= 40
    # In every block of two turns each goes first once.
    blocks = [order[i + 1 : i + 5] for i in range(0, len(order), 5)]
    assert blocks[0] == ["half", "bp", "bp", "half"]


def test_by_hand_is_the_same_rule() -> None:
    import copy

    import peers
    from models import CASES, loss_of

    import rewire

    case = CASES["mlp-128"]
    torch.manual_seed(0)
    by_hand = case.make()
    model = rewire.convert(copy.deepcopy(by_hand), "dfa", scale=0.05)
    x, y = case.data(8, "cpu")
    for _ in range(2):  # the output layer is found in the first
        model.zero_grad()
        loss_of(model(x), y).backward()
    peers.chain_loss(by_hand, list(rewire.feedback(model).values()))(x, y).backward()
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_by_hand_in_other_models_each_layer_hands_back_the_same_numbers() -> None:
    import copy

    import peers
    from models import CASES, loss_of

    case = CASES["lenet"]
    torch.manual_seed(0)
    plain = case.make()
    model = copy.deepcopy(plain)
    loss = peers.loss_under("hand", "dfa", model, case)
    grads = []
    for seed in (0, 1):
        x, y = case.data(4, "cpu")
        x = x + seed
        model.zero_grad()
        loss(x, y).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    loss_of(plain(x), y).backward()
    exact = [p.grad for p in plain.parameters()]
    for mine, theirs in zip(grads[-1][-2:], exact[-2:], strict=True):
        torch.testing.assert_close(mine, theirs)  # of the output layer
    first, second = grads
    assert all(g.any() for g in first)
    assert not torch.allclose(second[-3], exact[-3])


def test_a_contender_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import one_model
    import peers
    from models import CASES

    def refuse(*_: object) -> None:
        raise RuntimeError("no such layer\nmore")

    monkeypatch.setattr(peers, "installed", lambda library: library == "biotorch")
    monkeypatch.setattr(peers, "loss_under", refuse)
    who = ["dfa", "dfa/lowrank", "biotorch:dfa", "tinydfa:dfa"]
    found = one_model.measure(CASES["mlp-128"], who, batch=1, seconds=0.0, least=2, device="cpu")
    assert set(found["contenders"]) == {"dfa", "dfa/lowrank"}
    assert found["fails"] == {"biotorch:dfa": "RuntimeError: no such layer", "tinydfa:dfa": "not installed"}


def test_a_missed_goal_is_marked() -> None:
    from report import batches, ratios

    def line(batch: int, ratio: float, seconds: float) -> dict[str, Any]:
        timed = {"ratio": [ratio - 0.1, ratio, ratio + 0.1], "seconds": seconds, "turns": 9}
        known = {"model": "mlp-2048", "batch": batch, "mode": "eager", "fails": {"fa": "RuntimeError: no"}}
        return {**known, "feedback": "dense", "reference_seconds": 1.0, "contenders": {"dfa": timed}}

    lines = [line(256, 0.734, 0.256), line(1024, 0.736, 1.34), line(1, 0.86, 0.01)]
    sheet = ratios(lines, "eager")
    cells = {row[1]: row[sheet.columns.index("dfa")] for row in sheet.rows}
    assert cells["256"] == "0.73 [0.63 0.83]"  # as printed, it meets 0.73
    assert cells["1024"].endswith("✗") and cells["1"].endswith("✗")
    assert {row[sheet.columns.index("fa")] for row in sheet.rows} == {"fails"}
    assert any(note.endswith("RuntimeError: no") for note in sheet.notes)
    assert batches(lines).notes == ["MLP 784-2048×4-10, dfa: time per sample rises from batch 256 to 1024"]


# -- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lenet", "resnet18", "mobilenet", "vit-tiny", "decoder-50k"])
def test_models_give_what_their_loss_wants(name: str) -> None:
    from models import CASES, loss_of

    if name in ("resnet18", "mobilenet"):
        pytest.importorskip("torchvision")
    case = CASES[name]
    x, y = case.data(1, "cpu")
    with torch.no_grad():
        model = case.make().eval()
        outputs = model(x)
        assert outputs.shape == (*y.shape, case.classes)
        # Untrained: about as good as guessing.
        assert loss_of(outputs, y).item() == pytest.approx(math.log(case.classes), rel=0.5)


# -- the pipeline ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "stages", "micro", "first", "step"),
    [
        # One stage never waits: M microbatches of F (1) and B (2), or of F and W (1).
        ("gpipe", 1, 3, 9, 9),
        ("1f1b", 1, 3, 9, 9),
        ("split", 1, 3, 9, 9),
        ("direct", 1, 3, 6, 6),
        # Two stages, two microbatches: F at 0-2 and 1-3; B of the last stage 3-7 (gpipe) or 2-4, 5-7 (1f1b), of the
        # first one B later, until 9.
        ("gpipe", 2, 2, 9, 9),
        ("1f1b", 2, 2, 9, 9),
        # Stage 0: F 0-2, W 2-4 (e of the first arrives at 2, of the second at 3). Stage 1: F 1-3, W 3-5. The next step
        # begins at 4 and 5: nobody waits.
        ("direct", 2, 2, 5, 4),
        # Two stages, one microbatch: F 0-1, 1-2, then X 2-3, then X 3-4 beside W 3-4, W 4-5.
        ("split", 2, 1, 5, 5),
        # Three stages, one microbatch: e is there at 3, all W at 3-4. Stage 0 waits from 1 to 3 in every step.
        ("direct", 3, 1, 4, 4),
        ("gpipe", 3, 1, 9, 9),
    ],
)
def test_pipeline_by_hand(schedule: str, stages: int, micro: int, first: float, step: float) -> None:
    from pipeline import Pipeline, outcome

    found = outcome(Pipeline(schedule, stages, micro))
    assert (found.first, found.step) == (first, step)
    assert found.bubble == pytest.approx(1 - micro * (2 if schedule == "direct" else 3) / step)


@pytest.mark.parametrize(("stages", "micro"), list(product((2, 3, 5), (1, 2, 3, 5, 8))))
def test_pipeline_against_the_formulas(stages: int, micro: int) -> None:
    from pipeline import Pipeline, outcome

    for schedule in ("gpipe", "1f1b"):
        found = outcome(Pipeline(schedule, stages, micro))
        assert found.step == 3 * (micro + stages - 1)
        assert found.bubble == pytest.approx((stages - 1) / (micro + stages - 1))
    direct = outcome(Pipeline("direct", stages, micro))
    assert direct.step == (2 * micro if micro >= stages else micro + stages)
    assert outcome(Pipeline("1f1b", stages, micro)).waiting == min(stages, micro)
    assert outcome(Pipeline("gpipe", stages, micro)).waiting == micro
    assert direct.waiting <= min(stages, micro)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "split", "direct"])
@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_pipeline_obeys_its_dependencies(schedule: str, delay: float) -> None:
    """Looked at from outside: who has to come after whom, one thing at a time, weights of one step at a time."""
    from pipeline import Pipeline, Task, simulate

    stages, micro, steps = 3, 4, 2
    pipe = Pipeline(schedule, stages, micro, steps, delay=delay, forward=1.0, input_gradient=1.5, weight_gradient=0.5)
    spans = simulate(pipe)
    kinds = {"gpipe": "FB", "1f1b": "FB", "split": "FXW", "direct": "FW"}[schedule]
    lengths = {"F": 1.0, "X": 1.5, "W": 0.5, "B": 2.0}
    every = {Task(*at) for at in product(range(steps), range(micro), range(stages), kinds)}
    assert set(spans) == every
    assert all(end - start == pytest.approx(lengths[task.kind]) for task, (start, end) in spans.items())
    for stage in range(stages):
        mine = sorted((span, task.step) for task, span in spans.items() if task.stage == stage)
        for (before, step), (after, next_step) in pairwise(mine):
            assert before[1] <= after[0] and step <= next_step
    for step, m, stage in product(range(steps), range(micro), range(stages)):

        def span(kind: str, where: int, step: int = step, m: int = m) -> tuple[float, float]:
            return spans[Task(step, m, where, kind)]

        back = kinds[-1] if schedule != "split" else "X"
        assert span(back, stage)[0] >= span("F", stage)[1]
        if stage:
            assert span("F", stage)[0] >= span("F", stage - 1)[1] + delay
        if schedule == "direct":
            e = span("F", stages - 1)[1] + (delay if stage < stages - 1 else 0.0)
            assert span("W", stage)[0] >= e
        elif stage < stages - 1:
            assert span(back, stage)[0] >= span(back, stage + 1)[1] + delay
        if schedule == "split":
            assert span("W", stage)[0] >= span("X", stage)[1]


def test_the_pipeline_in_the_docs_is_what_the_command_prints() -> None:
    from pipeline import Pipeline, draw, table

    text = (ROOT / "docs" / "performance.md").read_text()
    assert table([4, 8], [4, 8, 32], 4, 0.0) in text
    for schedule in ("1f1b", "split", "direct"):
        assert draw(Pipeline(schedule, 4, 4, steps=2)) in text


def test_together_times_both_ways_in_turns() -> None:
    from rewire.ablation import Cell

    together = importlib.import_module("together")
    now = iter(range(10_000))
    found = together.turns(Cell("mlp", "dfa", 0), seeds=2, count=3, clock=lambda: float(next(now)))
    assert found == [[1.0, 1.0]] * 3
