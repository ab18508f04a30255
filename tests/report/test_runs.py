"""What is read from folders, whole or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewire.errors import InputError
from rewire.report.runs import environments, read
from tests.report.made_up import cell, failed, line, write


def test_everything_in_the_layout_is_read(tmp_path: Path) -> None:
    there = line("dfa", 3)
    (outcome,) = read([write(tmp_path / "a", [there])]).outcomes

    assert (outcome.rule, outcome.seed, outcome.status) == ("dfa", 3, "done")
    assert outcome.cell == there["cell"]
    for name in ("accuracy", "final_loss", "step_ms", "step_ratio", "memory_mb", "seconds"):
        assert getattr(outcome, name) == there[name]
    assert [(p.epoch, p.loss, p.accuracy) for p in outcome.history] == [
        (p["epoch"], p["loss"], p["accuracy"]) for p in there["history"]
    ]
    for moment, expected in zip(outcome.alignment, there["alignment"], strict=True):
        assert (moment.epoch, moment.step, moment.gamma) == (expected["epoch"], expected["step"], expected["gamma"])
        assert list(moment.flags) == expected["flags"]
        assert list(moment.layers) == list(expected["layers"])
        assert all(moment.layers[name].angle == expected["layers"][name]["weight_angle"] for name in moment.layers)


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    collected = read([write(tmp_path / "a", [line("bp", 0), line("bp", 1)], torn='{"id": "x", "ce')])

    assert len(collected.outcomes) == 2
    assert collected.notes == ["The last line of a/results.jsonl is cut off (the run was stopped); left out"]


def test_a_line_torn_within_a_character_is_left_out_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [line()])
    with (folder / "results.jsonl").open("ab") as file:
        file.write('{"error": "×'.encode()[:-1])

    collected = read([folder])
    assert len(collected.outcomes) == 1 and "cut off" in collected.notes[0]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [line("bp", 0)], torn="nonsense\n\n[1]\n" + json.dumps(line("bp", 1)) + "\n")

    collected = read([folder])
    assert [each.seed for each in collected.outcomes] == [0, 1]
    assert collected.notes == [f"Line {n} of a/results.jsonl cannot be read; left out" for n in (2, 4)]


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    collected = read([write(tmp_path / "a", [], torn=json.dumps(line()))])
    assert len(collected.outcomes) == 1 and not collected.notes


def test_no_run_json_is_noted(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [line()])
    (folder / "run.json").unlink()

    collected = read([folder])
    assert collected.notes == ["a has no readable run.json: how it was made is not known"]
    assert collected.runs[0].command is None and collected.baseline is None


def test_the_flat_lines_of_older_versions(tmp_path: Path) -> None:
    """As `rewire ablate` wrote them before runs could be resumed."""
    folder = tmp_path / "old"
    folder.mkdir()
    about = {"started": "2025", "torch": "2.13", "python": "3.11", "machine": "x86_64", "threads": 1}
    (folder / "run.json").write_text(json.dumps(about))
    flat: dict[str, Any] = {
        "model": "mlp", "rule": "fa", "seed": 1, "data": "digits", "data_dir": None, "epochs": 2, "batch_size": 32,
        "optimizer": "adam", "lr": 0.002, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant",
        "accuracy": 0.5, "final_loss": None, "step_ms": 1.0, "seconds": 2.0, "diverged": True,
        "history": [{"epoch": 1, "loss": None, "accuracy": 0.5}], "step_ratio": 1.1,
    }  # fmt: skip
    (folder / "results.jsonl").write_text(json.dumps(flat) + "\n")

    collected = read([folder])
    (outcome,) = collected.outcomes
    assert outcome.status == "diverged" and outcome.accuracy == 0.5 and outcome.final_loss is None
    assert set(outcome.cell) == set(flat) - {
        "accuracy", "final_loss", "step_ms", "seconds", "diverged", "history", "step_ratio"
    }  # fmt: skip
    assert dict(environments(collected.runs)) == {
        "torch": ["2.13"], "python": ["3.11"], "machine": ["x86_64"], "threads": ["1"]
    }  # fmt: skip


def test_runs_are_merged_and_a_cell_counts_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [failed("fa", 0, "no memory"), line("bp", 0), line("bp", 1)])
    changed = line("bp", 1) | {"accuracy": 0.25}
    second = write(tmp_path / "b", [line("fa", 0), changed, failed("bp", 0, "killed"), line("bp", 2)])

    collected = read([first, second, first])
    found = {(each.rule, each.seed): each for each in collected.outcomes}
    assert len(collected.outcomes) == len(found) == 4
    assert found["fa", 0].status == "done"
    assert found["bp", 0].status == "done"  # a later failure does not undo a result
    assert found["bp", 1].accuracy == 0.25
    assert len(collected.notes) == 1
    assert (
        collected.notes[0].startswith("3 results came more than once") and "In 1 of these cases" in collected.notes[0]
    )


def test_different_environments_are_pointed_out(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [line("bp", 0)], environment={"torch": "2.13", "threads": 1})
    second = write(tmp_path / "b", [line("bp", 1)], environment={"torch": "2.14", "threads": 1, "cuda": "13"})

    collected = read([first, second])
    assert collected.notes == ["The runs were made in different environments (torch, cuda)"]
    assert environments(collected.runs) == [("torch", ["2.13", "2.14"]), ("threads", ["1", "1"]), ("cuda", ["–", "13"])]


def test_what_is_no_number_is_none(tmp_path: Path) -> None:
    row = line() | {"accuracy": "0.9", "final_loss": True, "step_ms": [], "seconds": 1e400, "alignment": None}
    row["history"] = [{"epoch": None, "loss": 1.0}, 7, {"epoch": 2}]
    (outcome,) = read([write(tmp_path / "a", [row])]).outcomes

    assert (outcome.accuracy, outcome.final_loss, outcome.step_ms, outcome.seconds) == (None,) * 4
    assert outcome.alignment == () and [(p.epoch, p.loss) for p in outcome.history] == [(2, None)]


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "one", [line()])

    with pytest.raises(InputError, match=r"no results.jsonl in .*runs; runs in it: .*runs/one$"):
        read([tmp_path / "runs"])
    with pytest.raises(InputError, match=r"no results.jsonl in .*nowhere$"):
        read([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no finished cell in"):
        read([write(tmp_path / "empty", [], torn='{"cell"')])


def test_a_command_may_be_a_list(tmp_path: Path) -> None:
    collected = read([write(tmp_path / "a", [line()], command=["rewire", "ablate"])])
    assert collected.runs[0].command == "rewire ablate"


def test_cells_are_told_apart_by_all_their_fields(tmp_path: Path) -> None:
    lines = [line(), line() | {"cell": cell(lr=0.1)}, line() | {"cell": cell(feedback="channel")}]
    assert len(read([write(tmp_path / "a", lines)]).outcomes) == 3


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    """U+2028 and the like end lines in some readers' eyes, and stand unescaped in JSON of others."""
    folder = write(tmp_path / "a", [], torn=json.dumps(failed("fa", 0, "one\u2028two\x85"), ensure_ascii=False) + "\n")
    (outcome,) = read([folder]).outcomes
    assert outcome.error == "one\u2028two\x85"
