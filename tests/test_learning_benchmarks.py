"""The commands that say how well feedback learns, how near that brings a model to backprop, and what it costs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rewire
from rewire.ablation.data import load

from .scripts import beside

FOLDER = Path(rewire.__file__).parent.parent / "benchmarks"
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from beside(monkeypatch, FOLDER)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def call(script: str, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
        importlib.import_module(script).main()

    return call


# -- does it point along backprop's gradient? ----------------------------------------------------------

LEARNED = ("dkp", "grape", "fitted")


def above_dfa(data: str, where: Path | None, seeds: int, **options: Any) -> None:
    """Every layer's mean alignment is above that of ``dfa`` with the same seed."""
    train = importlib.import_module("feedback_alignment").train
    images = load(data, where)
    for seed in range(seeds):
        found = {rule: train(rule, seed, images, **options)[0] for rule in ("dfa", *LEARNED)}
        assert len(found["dfa"]) == 4
        for rule in LEARNED:
            for layer, plain in found["dfa"].items():
                assert found[rule][layer] > plain, f"{rule}, seed {seed}, layer {layer}: {found[rule]}, {found['dfa']}"


def test_learned_feedback_points_better_than_dfas_on_every_layer() -> None:
    above_dfa("digits", None, 1, epochs=2, limit=768, lr=2e-3, batch=32, look=12)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="no Fashion-MNIST here")
def test_the_same_on_fashion_mnist() -> None:
    above_dfa("fashion-mnist", FASHION, 3, epochs=1, limit=20_000, lr=1e-3, batch=64, look=20)


def test_the_table_of_alignment(run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.jsonl"
    small = ("--seeds", "1", "--epochs", "1", "--images", "128", "--look", "2", "--results", str(kept))
    run("feedback_alignment", "--rules", "dfa", "fitted", *small)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["rule"] for line in lines] == ["dfa", "fitted"]
    # Four batches of 32, the first of them an anchor.
    assert [(line["steps"], line["probes"], line["exact"]) for line in lines] == [(4, 0, 1), (4, 0, 1)]
    for value in lines[1]["cosines"].values():
        assert f"{value:.3f}" in printed
    run("feedback_alignment", "--rules", "dfa", "fitted", *small)  # found, not run
    assert capsys.readouterr().out == printed
    assert len(kept.read_text().splitlines()) == 2


def test_the_table_says_where_a_rule_is_not_above_dfa() -> None:
    table = importlib.import_module("feedback_alignment").table
    runs = [
        {
            "rule": rule,
            "seed": seed,
            "cosines": {"4": cosine, "7": 0.5},
            "error": 1,
            "steps": 10,
            "probes": 0,
            "exact": 2,
        }
        for rule, cosines in {"dfa": (0.1, 0.2), "dkp": (0.3, 0.19), "fitted": (0.3, 0.21)}.items()
        for seed, cosine in enumerate(cosines)
    ]
    for one in runs[2:]:
        one["cosines"]["7"] = 0.6
    shown = table(runs, "numbers")
    columns = {column.header: list(column.cells) for column in shown.columns}
    assert columns["every seed"] == ["", "not above", "above"]
    assert columns["4"] == ["0.150", "0.245", "0.255"] and columns["exact"] == ["20"] * 3


# -- what is kept ---------------------------------------------------------------------------------------


def test_what_is_kept_is_not_run_again(tmp_path: Path) -> None:
    completed = importlib.import_module("kept").completed
    asked: list[dict[str, object]] = []

    def run(which: dict[str, object]) -> dict[str, object]:
        asked.append(which)
        return {"found": 10 * int(str(which["seed"])) + len(asked)}

    file = tmp_path / "results" / "runs.jsonl"
    one, two = {"rule": "dfa", "seed": 1}, {"rule": "dfa", "seed": 2}
    assert completed(file, [one], run) == [{**one, "found": 11}]
    assert completed(file, [two, one], run) == [{**two, "found": 22}, {**one, "found": 11}]
    assert asked == [one, two]
    assert completed(file, [one], run, fresh=True) == [{**one, "found": 13}]
    assert completed(file, [one, two], run) == [{**one, "found": 13}, {**two, "found": 22}]  # the newest line counts
    assert len(file.read_text().splitlines()) == 3


# -- how much of the gap, at what price ----------------------------------------------------------------


def test_closed_is_a_share_of_mean_errors() -> None:
    table = importlib.import_module("gap").table
    errors = {"bp": (10, 12), "dfa": (20, 22), "fitted": (12, 15)}
    runs = [
        {"rule": rule, "seed": seed, "error": error, "seconds": {"bp": 1, "dfa": 2, "fitted": 3}[rule]}
        for rule, both in errors.items()
        for seed, error in enumerate(both)
    ]
    columns = {column.header: list(column.cells) for column in table("task", runs).columns}
    assert columns["closed %"] == ["100", "0", "75"]
    assert columns["time ÷ dfa"] == ["0.50", "1.00", "1.50"]
    assert columns["test error %"][2] == "13.50 ± 2.12"


def test_a_run_of_the_gap(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None], tmp_path: Path) -> None:
    import dataclasses

    gap = importlib.import_module("gap")
    monkeypatch.setitem(gap.TASKS, "transformer", dataclasses.replace(gap.TASKS["transformer"], samples=64, epochs=1))
    monkeypatch.setattr(gap, "RESULTS", tmp_path / "gap.jsonl")
    run("gap", "transformer", "--seeds", "1", "--rules", "dfa", "fitted(context=2) per block")
    lines = [json.loads(line) for line in (tmp_path / "gap.jsonl").read_text().splitlines()]
    assert [(line["task"], line["rule"], line["seed"]) for line in lines] == [
        ("transformer", "dfa", 0),
        ("transformer", "fitted(context=2) per block", 0),
    ]
    assert all(0 < line["error"] < 100 and line["seconds"] > 0 for line in lines)


def test_time_is_that_of_whole_cycles(run: Callable[..., None], tmp_path: Path) -> None:
    timing = importlib.import_module("learning_time")
    assert [timing.cycle(rule) for rule in ("bp", "dfa", "fitted", "fitted(every=3)", "grape")] == [1, 1, 5, 3, 1]
    steps: list[int] = []
    timing.times(lambda: steps.append(1), 4)()
    assert len(steps) == 4
    out = tmp_path / "found.json"
    run("learning_time", "--rules", "fitted(every=2)", "--batch", "4", "--seconds", "0", "--out", str(out))
    found = json.loads(out.read_text())["rules"]["fitted(every=2)"]
    assert found["cycle"] == 2 and found["turns"] >= 10
    low, middle, high = found["ratio"]
    assert 0 < low <= middle <= high
