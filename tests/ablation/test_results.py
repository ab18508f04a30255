"""What is written and what is shown."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rewire.ablation import Cell, Epoch, InputError, Result, load_results, open_run, read
from rewire.ablation.folder import load_grid
from rewire.ablation.report import rows, spread, table

GRID = read({"model": "mlp", "rule": ["bp", "dfa"], "seeds": 2, "epochs": 1, "controls": False})
ALIGNED = ({"epoch": 1, "step": 4, "gamma": 0.25, "flags": ["null"], "layers": {}},)


def result(rule: str = "bp", seed: int = 0, accuracy: float = 0.9, loss: float = 0.5) -> Result:
    return Result(
        cell=Cell("mlp", rule, seed, data_dir=None),
        status="done" if math.isfinite(loss) else "diverged",
        accuracy=accuracy,
        final_loss=loss,
        step_ms=1.5,
        seconds=2.0,
        history=(Epoch(1, 1.0, 0.5, 0.25), Epoch(2, loss, accuracy, 0.5)),
        step_ratio=0.75,
        memory_mb=300.0,
    )


def of_grid(number: int, **changes: object) -> Result:
    return replace(result(), cell=GRID.cells()[number], **changes)  # type: ignore[arg-type]


def test_files_hold_every_result_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with open_run(folder, GRID, "rewire ablate ...") as run:
        for count in (1, 2):
            run.append(of_grid(count, alignment=ALIGNED))
            lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
            assert len(lines) == count
        assert [cell.label for cell in run.pending()] == ["mlp bp seed 0", "mlp dfa seed 1"]

    line = lines[1]
    assert list(line) == [
        *("id", "cell", "status", "error", "accuracy", "final_loss", "history", "alignment"),
        *("step_ms", "step_ratio", "memory_mb", "seconds"),
    ]
    assert line["id"] == GRID.cells()[2].id and line["cell"]["rule"] == "dfa" and line["cell"]["lr"] == 2e-3
    assert line["history"][1] == {"epoch": 2, "loss": 0.5, "accuracy": 0.9, "seconds": 0.5}
    assert line["alignment"] == [dict(ALIGNED[0])]
    about = json.loads((folder / "run.json").read_text())
    assert list(about) == ["version", "started", "command", "grid", "environment", "baseline"]
    assert about["command"] == "rewire ablate ..." and about["baseline"] == "bp"
    assert {"torch", "python", "platform", "cpu", "threads", "rewire"} <= set(about["environment"])
    assert load_grid(folder) == GRID


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", GRID, "") as run:
        kept = [of_grid(0, alignment=ALIGNED), replace(of_grid(1), status="failed", accuracy=None, error="why")]
        for each in kept:
            run.append(each)
    assert load_results(tmp_path / "run") == kept


def test_a_diverged_result_is_still_json(tmp_path: Path) -> None:
    with open_run(tmp_path, GRID, "") as run:
        bad = {"epoch": 1, "step": 4, "gamma": math.nan, "flags": [], "layers": {"0": {"norm": math.inf}}}
        run.append(replace(result(loss=math.nan), alignment=(bad,)))

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "results.jsonl").read_text(), parse_constant=refuse)
    assert line["final_loss"] is None and line["status"] == "diverged"
    assert line["history"][1]["loss"] is None
    assert line["alignment"][0]["gamma"] is None and line["alignment"][0]["layers"]["0"]["norm"] is None


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    with open_run(tmp_path, GRID, "") as run:
        run.append(of_grid(0))
        run.append(of_grid(1))
    file = tmp_path / "results.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first + 1, first + 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert len(load_results(tmp_path)) == 1
        assert file.read_bytes() == whole[:cut]  # looking changes nothing
        with open_run(tmp_path, GRID, "") as run:
            assert len(run.results) == 1 and len(run.pending()) == 3
            assert file.read_bytes() == whole[:first]


@pytest.mark.parametrize(("line", "says"), [("{", "line 1"), ('{"id": "x"}', "line 1"), ("[]", "line 1")])
def test_another_damaged_line_is_an_error(tmp_path: Path, line: str, says: str) -> None:
    with open_run(tmp_path, GRID, ""):
        pass
    (tmp_path / "results.jsonl").write_text(f"{line}\n")
    with pytest.raises(InputError, match=says), open_run(tmp_path, GRID, ""):
        pass


def test_a_cell_twice_is_an_error(tmp_path: Path) -> None:
    with open_run(tmp_path, GRID, "") as run:
        run.append(of_grid(0))
        run.append(of_grid(0))
    with pytest.raises(InputError, match="a second result"):
        load_results(tmp_path)


def test_a_line_of_another_version_is_an_error(tmp_path: Path) -> None:
    with open_run(tmp_path, GRID, "") as run:
        run.append(of_grid(0))
    file = tmp_path / "results.jsonl"
    file.write_text(file.read_text().replace(GRID.cells()[0].id, "0" * 16))
    with pytest.raises(InputError, match="another version"):
        load_results(tmp_path)


def test_a_folder_takes_more_cells_and_no_fewer(tmp_path: Path) -> None:
    with open_run(tmp_path, GRID, "first") as run:
        run.append(of_grid(0))
    wider = replace(GRID, seeds=(0, 1, 2), rules=("dfa", "bp"))
    with open_run(tmp_path, wider, "second") as run:
        assert len(run.pending()) == 5
    assert load_grid(tmp_path) == wider
    for other, says in (
        (GRID, r"seeds is \[0, 1, 2\] there and \[0, 1\] now"),
        (replace(wider, epochs=2), "epochs is 1 there and 2 now"),
        (replace(wider, threads=2), "threads is 1 there and 2 now"),
        (replace(wider, together=4), "together is 0 there and 4 now"),
    ):
        with pytest.raises(InputError, match=says), open_run(tmp_path, other, ""):
            pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    again = open_run(tmp_path, GRID, "")
    with open_run(tmp_path, GRID, ""), pytest.raises(InputError, match="another process is working on"), again:
        pass
    with open_run(tmp_path, GRID, ""):  # what it leaves behind holds nobody up
        assert (tmp_path / "lock").exists()


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not the folder of a run"), open_run(tmp_path, GRID, ""):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for path in (tmp_path / "runs", tmp_path / "runs" / "below"):
        with pytest.raises(InputError, match="runs is a file"), open_run(path, GRID, ""):
            pass


def test_failed_cells_can_be_forgotten(tmp_path: Path) -> None:
    with open_run(tmp_path, GRID, "") as run:
        run.append(of_grid(0))
        run.append(replace(of_grid(1), status="failed", error="why"))
        run.forget_failed()
        assert len(run.pending()) == 3
    assert [each.cell.id for each in load_results(tmp_path)] == [GRID.cells()[0].id]


def test_rows_group_seeds() -> None:
    grouped = rows([result("bp", 0, 0.9), result("bp", 1, 0.8), result("dfa", 0, 0.7)])

    assert [(row.cell.rule, row.accuracies) for row in grouped] == [("bp", (0.9, 0.8)), ("dfa", (0.7,))]


@pytest.mark.parametrize(
    ("values", "shown"),
    [((1.0, 3.0), "2.00 ± 1.41"), ((1.5,), "1.50"), ((2.0, 2.0, 2.0), "2.00 ± 0.00"), ((), "–"), ((3e35,), "3.00e+35")],
)
def test_spread(values: tuple[float, ...], shown: str) -> None:
    assert spread(values, 2) == shown


def shown(results: list[Result], metric: str = "accuracy", width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table(results, metric))
    return out.getvalue()


def test_table_fits_eighty_columns_and_says_what_diverged_and_failed() -> None:
    results = [result(seed=0), result(seed=1), result("dfa", 0, 0.1, math.nan), result("dfa", 1, 0.7)]
    results += [replace(result("fa"), status="failed", accuracy=None, final_loss=None, step_ratio=None, error="why")]
    text = shown([replace(each, alignment=ALIGNED) for each in results], "error")

    assert "test error %" in text and "10.00 ± 0.00" in text and "0.75" in text
    assert "60.00 ± 42.43" in text and "1 of 2 diverged" in text and "1 of 1 failed" in text
    assert "0.25 ± 0.00 !" in text  # alignment, flagged
    assert max(map(len, text.splitlines())) <= 80


def test_what_differs_has_a_column() -> None:
    cell = Cell("mlp", "dfa", 0)
    variants = [cell, replace(cell, layers=(("1", "fa"),)), replace(cell, optimizer="sgd", lr=0.05)]
    text = shown([replace(result(), cell=each) for each in variants], width=120)

    assert "layers" in text and "1=fa" in text and "optimizer" in text and "0.05" in text
    assert "schedule" not in text and "Γ" not in text


def test_brackets_in_names_are_shown_as_they_are() -> None:
    cell = Cell("mlp", "dfa", 0)
    variants = [cell, replace(cell, layers=(("[ab]", "fa"),)), replace(cell, layers=(("[/red]", "fa"),))]
    text = shown([replace(result(), cell=each) for each in variants], width=120)

    assert "[ab]=fa" in text and "[/red]=fa" in text


def test_plain_rows_among_themselves_can_be_told_apart() -> None:
    cell = Cell("mlp", "bp", 0, lr=0.001)
    text = shown([replace(result(), cell=each) for each in (cell, replace(cell, lr=0.1))])
    assert "lr" in text and "0.001" in text and "0.1" in text

    # Plain backprop has no feedback, so its "dense" is no difference.
    text = shown([result(), replace(result("dfa"), cell=Cell("mlp", "dfa", 0, feedback="lowrank"))])
    assert "feedback" not in text


def test_where_the_data_lie_makes_no_row() -> None:
    cells = [Cell("mlp", "dfa", seed, data="fashion-mnist", data_dir=Path(f"/{seed}")) for seed in (0, 1)]
    assert [row.seeds for row in rows([replace(result(), cell=each) for each in cells])] == [2]
