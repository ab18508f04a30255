"""Rows, groups and the words for them, against numbers worked out here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rewire.ablation import Cell, Result
from rewire.errors import InputError
from rewire.report import words
from rewire.report.runs import read
from rewire.report.table import Report, Spread, build
from tests.report.made_up import cell, diverged, failed, line, write


def made(tmp_path: Path, *lines: dict[str, object], baseline: str | None = None, metric: str = "accuracy") -> Report:
    return build(read([write(tmp_path / "a", lines)]), baseline=baseline, metric=metric)


def scored(rule: str, *accuracies: float, **changes: object) -> list[dict[str, object]]:
    return [line(rule, seed, **changes) | {"accuracy": each} for seed, each in enumerate(accuracies)]


def test_mean_and_sample_deviation_in_percent(tmp_path: Path) -> None:
    report = made(tmp_path, *scored("bp", 0.9, 0.92, 0.97))
    result = report.groups[0].rows[0].result

    mean = (90 + 92 + 97) / 3
    deviation = math.sqrt(sum((each - mean) ** 2 for each in (90, 92, 97)) / 2)
    assert result is not None
    assert (result.mean, result.deviation, result.n) == pytest.approx((mean, deviation, 3))
    assert result.text(2) == "93.00 ± 3.61"


def test_error_is_what_accuracy_leaves_and_better_is_less(tmp_path: Path) -> None:
    lines = scored("bp", 0.9, 0.92, 0.97) + scored("fa", 0.95, 0.98, 0.999)
    report = made(tmp_path, *lines, metric="error")
    bp, fa = report.groups[0].rows

    assert bp.result is not None and bp.result.mean == pytest.approx(7)
    assert fa.comparison is not None and fa.comparison.difference == pytest.approx(100 * (0.071 / 3) - 7)
    assert words.verdict(report, fa.comparison) == "better"
    assert words.in_short(report, report.groups[0])[0].startswith("Lowest mean error: fa")


def test_groups_are_what_may_be_compared(tmp_path: Path) -> None:
    lines = [line(rule, seed, model=m, lr=lr) for m in ("mlp", "cnn") for lr in (0.1, 0.2) for rule in ("bp", "fa")
             for seed in (0, 1, 2)]  # fmt: skip
    report = made(tmp_path, *lines)

    assert [group.title for group in report.groups] == [
        "mlp on digits, lr 0.1", "mlp on digits, lr 0.2", "cnn on digits, lr 0.1", "cnn on digits, lr 0.2"
    ]  # fmt: skip
    assert all([row.label for row in group.rows] == ["bp", "fa"] for group in report.groups)
    assert all(len(row.outcomes) == 3 for group in report.groups for row in group.rows)
    assert report.tests == 4
    assert "lr" not in report.common and report.common["epochs"] == 15


def test_options_of_a_rule_make_rows_each_against_the_baseline_of_its_kind(tmp_path: Path) -> None:
    lines = [
        *scored("bp", 0.9, 0.91, 0.93, feedback="dense"),
        *scored("bp", 0.5, 0.51, 0.53, feedback="channel"),
        *scored("dfa", 0.8, 0.85, 0.81, feedback="dense"),
        *scored("dfa", 0.4, 0.45, 0.41, feedback="channel"),
    ]
    rows = {row.label: row for row in made(tmp_path, *lines).groups[0].rows}

    assert list(rows) == [f"{rule} · feedback={kind}" for rule in ("bp", "dfa") for kind in ("dense", "channel")]
    for kind, mean in (("dense", (82 - 91.3333)), ("channel", (42 - 51.3333))):
        comparison = rows[f"dfa · feedback={kind}"].comparison
        assert comparison is not None and comparison.difference == pytest.approx(mean, abs=1e-3)


def test_one_baseline_serves_rules_with_options_it_lacks(tmp_path: Path) -> None:
    plain = [
        each | {"cell": cell("bp", seed, feedback=None)} for seed, each in enumerate(scored("bp", 0.9, 0.91, 0.93))
    ]
    report = made(tmp_path, *plain, *scored("dfa", 0.8, 0.85, 0.81), *scored("dfa", 0.7, 0.7, 0.71, feedback="channel"))

    assert [row.label for row in report.groups[0].rows] == ["bp", "dfa · feedback=dense", "dfa · feedback=channel"]
    assert report.tests == 2


def test_the_baseline_comes_first_and_may_be_chosen(tmp_path: Path) -> None:
    lines = scored("fa", 0.9, 0.91, 0.93) + scored("dfa(a=1)", 0.8, 0.81, 0.85)

    report = made(tmp_path, *lines, baseline="dfa(a=1)")
    assert [row.rule for row in report.groups[0].rows] == ["dfa(a=1)", "fa"]
    assert report.labels == ("dfa(a=1)", "fa") and report.tests == 1
    with pytest.raises(InputError, match=r"unknown baseline 'dfa\(a=2\)'; did you mean 'dfa\(a=1\)'"):
        build(report.collected, baseline="dfa(a=2)")
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        build(report.collected, metric="acuracy")


def test_no_baseline_is_said_and_nothing_compared(tmp_path: Path) -> None:
    report = made(tmp_path, *scored("fa", 0.9, 0.91, 0.93), *scored("dfa", 0.8, 0.81, 0.85))

    assert "No cell has the baseline bp: nothing is compared" in report.notes
    assert report.groups[0].baseline is None and report.tests == 0


def test_failed_seeds_are_counted_and_diverged_ones_end_the_test(tmp_path: Path) -> None:
    report = made(
        tmp_path,
        *scored("bp", 0.9, 0.91, 0.93, 0.94),
        *scored("fa", 0.8, 0.82, 0.83),
        failed("fa", 3, "out of memory"),
        *scored("dfa", 0.85, 0.86, 0.89),
        diverged("dfa", 3),
    )
    bp, fa, dfa = report.groups[0].rows

    assert words.seeds(fa) == "3 of 4" and words.ended(fa) == "1 failed"
    assert fa.comparison is not None and fa.comparison.test == "paired t-test, 3 seeds"
    assert dfa.result is not None and dfa.result.n == 4 and dfa.result.mean == pytest.approx((85 + 86 + 89 + 10) / 4)
    assert dfa.comparison is not None and dfa.comparison.p is None
    assert words.verdict(report, dfa.comparison) == "1 of 4 diverged"
    assert bp.is_baseline and report.tests == 1
    assert "Not every seed went to the end: fa (1 failed) and dfa (1 diverged)." in words.in_short(
        report, report.groups[0]
    )


def test_why_nothing_was_tested_is_true_with_three_seeds_too(tmp_path: Path) -> None:
    """One of them diverged, or they give one number; no line says that seeds are missing."""
    baseline = scored("bp", 0.9, 0.91, 0.93)
    for name, lines in (
        ("diverged", [*baseline, *scored("dfa", 0.85, 0.86), diverged("dfa", 2)]),
        ("same", [*baseline, *scored("dfa", 0.9, 0.91, 0.93)]),
    ):
        report = made(tmp_path / name, *lines)
        assert report.tests == 0
        said = words.how_tested(report)
        assert "none diverged" in said and "not all are the same" in said


def test_two_seeds_are_too_few_and_said_so(tmp_path: Path) -> None:
    report = made(tmp_path, *scored("bp", 0.9, 0.91), *scored("fa", 0.8, 0.81))
    comparison = report.groups[0].rows[1].comparison

    assert comparison is not None and words.verdict(report, comparison) == "too few seeds"
    assert words.p_value(comparison.corrected) == "–" and words.difference(comparison) == "−10.00"
    assert "Too few seeds to test against bp: fa." in words.in_short(report, report.groups[0])


def test_flags_count_where_gamma_is_from(tmp_path: Path) -> None:
    """Before training everything is at chance; what matters is the end."""
    early, late = line("dfa", 0), line("fa", 0)
    for each in (early, late):
        for moment in each["alignment"]:
            moment["flags"] = []
    early["alignment"][0]["flags"] = ["not distinguishable from chance: fc1"]
    late["alignment"][-1]["flags"] = ["not distinguishable from chance: fc1"]
    rows = {row.rule: row for row in made(tmp_path, line("bp", 0), early, late).groups[0].rows}

    assert not rows["dfa"].flagged and rows["fa"].flagged
    gamma = rows["dfa"].gamma
    assert gamma == Spread(early["alignment"][-1]["gamma"], None, 1)


@pytest.mark.parametrize(
    ("p", "shown"),
    [(None, "–"), (0.0004, "< 0.001"), (0.0123, "0.012"), (0.049, "0.049"), (0.24, "0.24"), (1.0, "1.00")],
)
def test_p_values_are_never_nothing(p: float | None, shown: str) -> None:
    assert words.p_value(p) == shown


@pytest.mark.parametrize(
    ("spread", "shown"),
    [
        (None, "–"),
        (Spread(0.01234, 0.0011, 3), "0.0123 ± 0.0011"),
        (Spread(2.3, None, 1), "2.300"),
        (Spread(1e-5, 1e-6, 3), "1.00e-05 ± 1.0e-06"),
        (Spread(3e12, None, 1), "3.00e+12"),
    ],
)
def test_losses_of_any_size(spread: Spread | None, shown: str) -> None:
    assert words.loss(spread) == shown


def test_how_often_alignment_was_measured_and_where_data_lie_make_no_group(tmp_path: Path) -> None:
    """Plain backprop never measures alignment, and is what the others are compared with all the same."""
    ran = [Cell("mlp", rule, seed, alignments=5).canonical() for rule in ("bp", "dfa") for seed in range(3)]
    results = [Result(each, "done", 0.9 + 0.01 * each.seed * (each.rule == "bp"), 0.1) for each in ran]
    lines = [json.loads(json.dumps(result.record())) for result in results]
    assert {each["cell"]["alignments"] for each in lines} == {0, 5}
    lines[0]["cell"]["data_dir"] = "elsewhere"

    report = made(tmp_path, *lines)
    (group,) = report.groups
    assert [(row.label, row.is_baseline, len(row.values)) for row in group.rows] == [("bp", True, 3), ("dfa", False, 3)]
    assert group.rows[1].comparison is not None and group.rows[1].comparison.p is not None


def test_the_same_cell_measured_more_often_counts_once(tmp_path: Path) -> None:
    often = scored("fa", 0.9, 0.8)
    seldom = [{**each, "cell": {**cell("fa", seed), "alignments": 1}} for seed, each in enumerate(often)]
    (group,) = made(tmp_path, *often, *seldom).groups
    assert [len(row.outcomes) for row in group.rows] == [2]


def test_layers_in_another_order_are_another_experiment(tmp_path: Path) -> None:
    """Later ones win."""
    first, second = {"*": "fa", "1": "bp"}, {"1": "bp", "*": "fa"}
    lines = scored("dfa", 0.9, 0.8, layers=first) + scored("dfa", 0.7, 0.6, layers=second)
    (group,) = made(tmp_path, *lines).groups
    assert [(row.label, len(row.values)) for row in group.rows] == [
        ("dfa · layers=*=fa 1=bp", 2), ("dfa · layers=1=bp *=fa", 2)
    ]  # fmt: skip


def test_backprop_with_other_rules_in_it_is_compared_with_backprop(tmp_path: Path) -> None:
    mixed = {"1": "fa"}
    lines = [
        *scored("bp", 0.5, 0.51, 0.53, layers=mixed),
        *scored("bp", 0.6, 0.61, 0.63, blocks=["1"]),
        *scored("bp", 0.9, 0.91, 0.93),
        *scored("dfa", 0.8, 0.85, 0.81, layers=mixed),
    ]
    rows = {row.label: row for row in made(tmp_path / "whole", *lines).groups[0].rows}
    assert [label for label, row in rows.items() if row.is_baseline] == ["bp"]
    differences = {label: row.comparison.difference for label, row in rows.items() if row.comparison is not None}
    assert differences == pytest.approx(
        {"bp · layers=1=fa": -40, "bp · blocks=1": -30, "dfa · layers=1=fa": 82 - 274 / 3}
    )

    # Where plain backprop was not run, there is nothing nearer.
    rows = {row.rule: row for row in made(tmp_path / "mixed", *lines[:3], *lines[9:]).groups[0].rows}
    assert rows["bp"].is_baseline and rows["dfa"].comparison is not None
