"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rewire
from rewire.ablation import runner
from rewire.cli import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; torch's threads are as before afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    # Rich wraps to the terminal it finds; tests want one width.
    monkeypatch.setenv("COLUMNS", "100")
    yield tmp_path
    torch.set_num_threads(threads)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_ablate_prints_a_table_and_writes_its_rows(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "step_ratio", lambda cell: 1.0 if cell.rule == "bp" else 0.625)

    assert run("ablate", "--model", "mlp", "--rules", "bp,dfa", "--seeds", "2", "--epochs", "1") == 0

    out, err = capsys.readouterr()
    assert "dfa" in out and "0.62" in out and "test accuracy %" in out and "±" in out
    assert err.count("seed") == 4 and "4/4" in err
    (folder,) = (here / "runs").iterdir()
    assert folder.name in out
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(row["rule"], row["seed"]) for row in rows] == [("bp", 0), ("bp", 1), ("dfa", 0), ("dfa", 1)]
    assert [row["step_ratio"] for row in rows] == [1.0, 1.0, 0.625, 0.625]
    with (folder / "results.csv").open(newline="") as file:
        assert [row["rule"] for row in csv.DictReader(file)] == ["bp", "bp", "dfa", "dfa"]


def test_rules_may_be_repeated_or_listed_and_count_once(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "step_ratio", lambda cell: 1.0)
    args = ["ablate", "--model", "mlp", "--seeds", "1", "--epochs", "1", "--out", "elsewhere"]

    assert run(*args, "--rule", "fa", "--rules", "dfa fa") == 0

    assert len(list((here / "elsewhere").glob("*/results.jsonl"))) == 1
    assert capsys.readouterr().err.count("seed") == 2


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rule", "dfaa"], "did you mean 'dfa'"),
        (["--rules", "bp dffa"], "did you mean 'dfa'"),
        (["--model", "lennet"], "did you mean 'lenet'"),
        (["--data", "fashion-mist"], "did you mean 'fashion-mnist'"),
        (["--optimizer", "sdg"], "did you mean 'sgd'"),
        (["--schedule", "cosin"], "did you mean 'cosine'"),
        (["--metric", "eror"], "did you mean 'error'"),
        (["--data", "fashion-mnist"], "needs --data-dir"),
        (["--data", "fashion-mnist", "--data-dir", "nowhere"], "no data directory nowhere"),
        (["--data", "fashion-mnist", "--data-dir", "."], "no train-images-idx3-ubyte or"),
        (["--data-dir", "."], "take no data directory"),
        (["--seeds", "0"], "seeds must be above zero, got 0"),
        (["--epochs", "-1"], "epochs must be above zero, got -1"),
        (["--batch-size", "0"], "batch size must be above zero"),
        (["--lr", "0"], "learning rate must be above zero"),
        (["--lr", "nan"], "learning rate must be above zero"),
        (["--momentum", "0.9"], "momentum belongs to --optimizer sgd"),
        (["--weight-decay", "-1"], "weight decay must be zero or more"),
        (["--threads", "0"], "threads must be above zero"),
        (["--seeds", "many"], "'many' is not a valid integer"),
        (["--rulez", "bp"], "--rule"),
        (["--rules", "bp", "fa", "dfa"], "in quotes"),
    ],
)
def test_a_wrong_request_gets_one_line_and_code_2_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    assert run("ablate", *args) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rewire: ") and says in err
    assert err.count("\n") == 1
    assert not list(here.iterdir())


def test_a_misspelt_command_gets_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ablat") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_rule_refuses_is_said_before_training(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise rewire.RewireError("layer 1\ncannot be fed back")

    monkeypatch.setattr(rewire, "convert", refuse)

    assert run("ablate", "--model", "mlp", "--rule", "dfa") == 2
    assert capsys.readouterr().err == "rewire: mlp under dfa: layer 1 cannot be fed back\n"
    assert not list(here.iterdir())


def test_an_interrupted_run_keeps_what_it_finished(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner.run_cell

    def until_seed_1(cell: runner.Cell, *rest: object) -> runner.Result:
        if cell.seed == 1:
            raise KeyboardInterrupt
        return real(cell)

    monkeypatch.setattr(runner, "run_cell", until_seed_1)

    assert run("ablate", "--model", "mlp", "--rule", "bp", "--epochs", "1") == 130
    (file,) = here.glob("runs/*/results.jsonl")
    assert len(file.read_text().splitlines()) == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], ["ablate", "--help"], ["ablate", "-h"], []])
def test_help_has_an_example(here: Path, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert run(*args) == 0
    assert "Example: rewire ablate" in capsys.readouterr().out


def test_python_dash_m_is_the_same_command(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rewire", "ablate", "--rule", "nope"],
        capture_output=True,
        text=True,
        cwd=here,
        # Found wherever it lies, installed or not.
        env=os.environ | {"PYTHONPATH": str(Path(rewire.__file__).parents[1])},
    )

    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("rewire: unknown rule 'nope'")
