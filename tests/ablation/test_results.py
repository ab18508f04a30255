"""What is written and what is shown."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rewire.ablation.results import Writer
from rich.console import Console

from rewire.ablation import Cell, Epoch, InputError, Result
from rewire.ablation.report import rows, spread, table


def result(rule: str = "bp", seed: int = 0, accuracy: float = 0.9, loss: float = 0.5) -> Result:
    return Result(
        cell=Cell("mlp", rule, seed, data_dir=None),
        accuracy=accuracy,
        final_loss=loss,
        step_ms=1.5,
        seconds=2.0,
        diverged=not math.isfinite(loss),
        history=(Epoch(1, 1.0, 0.5), Epoch(2, loss, accuracy)),
        step_ratio=0.75,
    )


def test_files_hold_every_result_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "deep" / "runs")
    for count, seed in enumerate((0, 1), start=1):
        writer.append(result(seed=seed))
        lines = [json.loads(line) for line in (writer.folder / "results.jsonl").read_text().splitlines()]
        with (writer.folder / "results.csv").open(newline="") as file:
            table_rows = list(csv.DictReader(file))
        assert len(lines) == len(table_rows) == count

    assert lines[1]["seed"] == 1 and lines[1]["model"] == "mlp" and lines[1]["lr"] == 2e-3
    assert lines[1]["history"][1] == {"epoch": 2, "loss": 0.5, "accuracy": 0.9}
    assert table_rows[1]["seed"] == "1" and float(table_rows[1]["accuracy"]) == 0.9
    assert set(table_rows[0]) == set(lines[0]) - {"history"}
    assert json.loads((writer.folder / "run.json").read_text())["threads"] > 0


def test_a_diverged_result_is_still_json(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.append(result(loss=math.nan))

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((writer.folder / "results.jsonl").read_text(), parse_constant=refuse)
    assert line["final_loss"] is None and line["diverged"] is True
    assert line["history"][1]["loss"] is None


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    assert len({Writer(tmp_path).folder for _ in range(3)}) == 3


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")

    with pytest.raises(InputError, match="Not a directory"):
        Writer(tmp_path / "runs")
    with pytest.raises(InputError, match="cannot write to"):
        Writer(tmp_path / "runs" / "below")


def test_rows_group_seeds() -> None:
    grouped = rows([result("bp", 0, 0.9), result("bp", 1, 0.8), result("dfa", 0, 0.7)])

    assert [(row.rule, row.accuracies) for row in grouped] == [("bp", (0.9, 0.8)), ("dfa", (0.7,))]


@pytest.mark.parametrize(
    ("values", "shown"),
    [((1.0, 3.0), "2.00 ± 1.41"), ((1.5,), "1.50"), ((2.0, 2.0, 2.0), "2.00 ± 0.00")],
)
def test_spread(values: tuple[float, ...], shown: str) -> None:
    assert spread(values, 2) == shown


def test_table_fits_eighty_columns_and_says_what_diverged() -> None:
    results = [result(seed=0), result(seed=1), result("dfa", 0, 0.1, math.nan), result("dfa", 1, 0.7)]
    out = io.StringIO()
    Console(file=out, width=80).print(table([replace(each, step_ratio=0.75) for each in results], "error"))
    text = out.getvalue()

    assert "test error %" in text and "10.00 ± 0.00" in text and "0.75" in text
    assert "60.00 ± 42.43" in text and "1 of 2 diverged" in text
    assert max(map(len, text.splitlines())) <= 80
