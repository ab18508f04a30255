"""CSV and Markdown say what the page says."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

import pytest
from scipy import stats

from rewire.report import render
from tests.report.made_up import diverged, failed, grid, line, write


def test_csv_has_every_number_in_full(tmp_path: Path) -> None:
    lines = [line(rule, seed) for rule in ("bp", "fa") for seed in range(4)] + [failed("fa", 4, "x")]
    rows = list(csv.DictReader(io.StringIO(render([write(tmp_path / "a", lines)], format="csv"))))
    scores = {
        rule: [100 * each["accuracy"] for each in lines[:8] if each["cell"]["rule"] == rule] for rule in ("bp", "fa")
    }
    test = stats.ttest_rel(scores["fa"], scores["bp"])

    assert [row["rule"] for row in rows] == ["bp", "fa"] and rows[0]["p"] == rows[0]["baseline"] == ""
    fa = rows[1]
    assert (fa["seeds"], fa["done"], fa["failed"], fa["accuracy_percent_n"]) == ("5", "4", "1", "4")
    assert float(fa["accuracy_percent_mean"]) == pytest.approx(statistics.fmean(scores["fa"]), rel=1e-12)
    assert float(fa["accuracy_percent_std"]) == pytest.approx(statistics.stdev(scores["fa"]), rel=1e-12)
    assert float(fa["p"]) == float(fa["p_holm"]) == pytest.approx(test.pvalue, rel=1e-12)
    interval = test.confidence_interval()
    assert (float(fa["low_95"]), float(fa["high_95"])) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert fa["test"] == "paired t-test, 4 seeds" and fa["model"] == "mlp" and fa["lr"] == "0.002"
    losses = [each["final_loss"] for each in lines[4:8]]
    assert float(fa["final_loss_mean"]) == pytest.approx(statistics.fmean(losses), rel=1e-12)


def test_zero_is_a_number_and_not_a_gap(tmp_path: Path) -> None:
    lines = [line("bp", seed) | {"accuracy": 0.0, "final_loss": 0.0, "memory_mb": None} for seed in range(2)]
    (row,) = csv.DictReader(io.StringIO(render([write(tmp_path / "a", lines)], format="csv")))

    assert (row["accuracy_percent_mean"], row["accuracy_percent_std"]) == ("0.0", "0.0")
    assert row["final_loss_mean"] == "0.0" and row["memory_mb_mean"] == "" and row["memory_mb_n"] == "0"


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    """Every row has as many columns as its head, whatever is in the files."""
    lines = [*grid(3), failed("a|b`c\nd", 0, "x | y\nz * w"), diverged("fa", 9)]
    text = render([write(tmp_path / "a", lines, torn="{")], format="markdown")

    columns = 0
    for row in text.splitlines():
        bars = row.replace("\\|", "").count("|")
        if bars and columns:
            assert bars == columns, row
        columns = bars
    assert "| bp | " in text and "baseline" in text and "## Trust flags" in text and "is cut off" in text
    assert "a\\|b\\`c d" in text and "z \\* w" in text
    assert "    rewire ablate --model 'mlp cnn'" in text and "| threads | 1 |" in text
