"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import rewire
from rewire.ablation import files, train, work
from rewire.ablation.cell import Epoch
from rewire.cli import main
from rewire.cli.board import Board
from rewire.cli.live import Screen


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


@pytest.fixture
def quick(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What makes a run one of seconds: one model, one epoch, this process, no timing."""
    monkeypatch.setattr(train, "step_ratio", lambda cell: 1.0 if cell.plain else 0.625)
    return ["--model", "mlp", "--epochs", "1", "--workers", "0", "--alignments", "0", "--batch-size", "128"]


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_ablate_prints_a_table_and_writes_its_rows(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ablate", *quick, "--rules", "dfa", "--seeds", "2") == 0

    out, err = capsys.readouterr()
    assert "dfa" in out and "0.62" in out and "test accuracy %" in out and "±" in out and "shallow" in out
    assert err.count("seed") == 6 and "6/6" in err
    (folder,) = (here / "runs").iterdir()
    assert folder.name in out
    cells = [(row["cell"]["rule"], row["cell"]["seed"]) for row in records(folder)]  # type: ignore[index]
    assert cells == [(rule, seed) for rule in ("bp", "dfa", "shallow") for seed in (0, 1)]
    assert [row["step_ratio"] for row in records(folder)] == [1.0, 1.0, 0.625, 0.625, 0.625, 0.625]
    about = json.loads((folder / "run.json").read_text())
    assert about["grid"]["rules"] == ["dfa"] and about["command"].startswith("rewire")


def test_a_finished_run_is_shown_again_and_not_repeated(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["ablate", *quick, "--rules", "dfa", "--seeds", "1", "--no-controls", "--out", "elsewhere"]
    assert run(*args) == 0
    first = (here / "elsewhere" / "results.jsonl").read_bytes()
    monkeypatch.setattr(work, "run_cell", lambda *_, **__: pytest.fail("trained"))
    capsys.readouterr()

    for again in (args, ["ablate", "--resume", "elsewhere"], ["train", "--resume", "elsewhere"]):
        assert run(*again) == 0
        assert "dfa" in capsys.readouterr().out
    assert (here / "elsewhere" / "results.jsonl").read_bytes() == first


def test_more_cells_go_into_the_same_folder_and_others_do_not(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["ablate", *quick, "--rules", "dfa", "--no-controls", "--out", "run"]
    assert run(*args, "--seeds", "1") == 0
    assert run(*args, "--seeds", "2") == 0
    assert "1 of 2 cells are finished already" in capsys.readouterr().err
    assert len(records(here / "run")) == 2
    assert run(*args, "--seeds", "1") == 2
    assert "seeds is [0, 1] there and [0] now" in capsys.readouterr().err
    assert run(*args, "--seeds", "2", "--lr", "0.1") == 2
    assert run("train", "--resume", "run") == 2
    assert "holds 2 cells" in capsys.readouterr().err
    assert len(records(here / "run")) == 2


def test_a_toml_file_is_a_grid_and_options_go_before_it(here: Path, quick: list[str]) -> None:
    (here / "grid.toml").write_text('rules = "fa dfa"\nseeds = 2\ncontrols = false\n')
    assert run("ablate", "grid.toml", *quick, "--rule", "fa", "--out", "run") == 0
    assert [row["cell"]["rule"] for row in records(here / "run")] == ["fa", "fa"]  # type: ignore[index]


def test_data_with_a_space_in_their_path(here: Path, quick: list[str]) -> None:
    file = here / "my data" / "a.npz"
    file.parent.mkdir()
    x, y = np.ones((6, 4), np.float32), np.arange(6) % 3
    np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
    one = ["--rule", "fa", "--seeds", "1", "--no-controls"]
    for number, data in enumerate(("my data/a.npz", "'my data/a.npz' digits")):
        assert run("ablate", *quick, *one, "--data", data, "--out", f"run{number}") == 0
        found = [row["cell"]["data"] for row in records(here / f"run{number}")]  # type: ignore[index]
        assert found == ["my data/a.npz", "digits"][: number + 1]
    assert run("ablate", "--resume", "run0") == 0
    assert run("train", "--epochs", "1", "--data", "my data/a.npz", "--out", "run2") == 0


def test_layers_of_the_grid(here: Path, quick: list[str]) -> None:
    layers = ["--layers", "", "--layers", "1=fa 3=usf"]
    assert run("ablate", *quick, *layers, "--rule", "dfa", "--seeds", "1", "--no-controls", "--out", "run") == 0
    found = [row["cell"]["layers"] for row in records(here / "run")]  # type: ignore[index]
    assert found == [{}, {"1": "fa", "3": "usf"}]
    assert len({row["final_loss"] for row in records(here / "run")}) == 2


def test_rules_may_be_repeated_or_listed_and_count_once(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["ablate", *quick, "--seeds", "1", "--out", "elsewhere", "--no-controls"]

    assert run(*args, "--rule", "fa", "--rules", "dfa fa") == 0

    assert (here / "elsewhere" / "results.jsonl").exists()
    assert capsys.readouterr().err.count("seed") == 2


def test_cells_that_fail_are_named_and_stop_no_others(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.run_cell

    def fails(cell: rewire.ablation.Cell, *rest: object, **options: object) -> object:  # type: ignore[name-defined]
        if cell.rule == "fa":
            raise ZeroDivisionError("two\nlines")
        return real(cell, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(work, "run_cell", fails)
    args = ["ablate", *quick, "--rules", "fa dfa", "--seeds", "1", "--no-controls", "--out", "run"]
    assert run(*args) == 1
    out, err = capsys.readouterr()
    failed, done = records(here / "run")
    assert failed["status"] == "failed" and failed["error"] == "ZeroDivisionError: two lines"
    assert done["status"] == "done" and "1 of 1 failed" in out
    assert err.splitlines()[-1].startswith("rewire: 1 of 2 cells failed: mlp fa seed 0 (")

    assert run(*args) == 1  # not tried again by itself
    monkeypatch.setattr(work, "run_cell", real)
    assert run(*args, "--retry") == 0
    assert [row["status"] for row in records(here / "run")] == ["done", "done"]


def test_text_that_is_not_ours_may_have_brackets(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(cell: object, *rest: object, **options: object) -> None:
        warnings.warn("a note [sic] of [/data]", stacklevel=2)
        raise ValueError("cannot open [/data/x], [enforce fail at :boom:]")

    monkeypatch.setattr(work, "run_cell", fails)
    monkeypatch.setenv("COLUMNS", "200")
    args = ["--layers", "[1]=fa", "--rule", "dfa", "--seeds", "1", "--no-controls", "--out", "run[a1]"]
    assert run("ablate", *quick, *args) == 1

    out, err = capsys.readouterr()
    progress, notes = err.splitlines()[1], err.splitlines()[0]
    assert notes == "note a note [sic] of [/data]"
    assert "mlp dfa [1]=fa seed 0" in progress
    assert progress.endswith("failed  ValueError: cannot open [/data/x], [enforce fail at :boom:]")
    assert "Results: run[a1]/results.jsonl" in out


def test_flags_may_have_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"gamma": None, "flags": ["not measurable: [/x] and [layer]"]}
    for terminal in (False, True):
        with Screen(Console(force_terminal=terminal, width=120)) as screen:
            screen.epoch(Epoch(1, 0.5, 0.5), flags)
        assert "not measurable: [/x] and [layer]" in capsys.readouterr().out


def test_a_forward_that_ends_the_program_is_a_cell_that_failed(
    here: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaves(*args: object, **options: object) -> None:
        sys.exit(3)

    monkeypatch.setattr(work, "run_cell", leaves)
    monkeypatch.setattr(work, "run_together", leaves)
    for together in ("0", "2"):
        args = ["--rule", "dfa", "--seeds", "2", "--no-controls", "--together", together, "--out", f"run{together}"]
        assert run("ablate", *quick, *args) == 1
        assert [row["error"] for row in records(here / f"run{together}")] == ["SystemExit: 3"] * 2


def test_a_stream_that_cannot_write_a_character_gets_another(here: Path, quick: list[str]) -> None:
    assert run("ablate", *quick, "--rule", "dfa", "--seeds", "2", "--no-controls", "--out", "run") == 0
    file = here / "run" / "results.jsonl"
    aligned = '"alignment": [{"epoch": 1, "gamma": 0.5, "flags": [], "layers": {}}]'
    file.write_text(file.read_text().replace('"alignment": []', aligned))
    done = subprocess.run(
        [sys.executable, "-m", "rewire", "ablate", "--resume", "run"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path(rewire.__file__).parents[1]), "PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0, done.stderr
    assert "0.50 ± 0.00" in done.stdout.decode("cp1252") and b"run/results.jsonl" in done.stdout


def test_a_full_disk_is_one_line_and_the_way_on(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, line: str) -> None:
        with files.storing(path):
            raise OSError(28, os.strerror(28))

    args = ["ablate", *quick, "--rules", "dfa", "--seeds", "1", "--no-controls", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "append", full)
        assert run(*args) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rewire: cannot write to") and "No space left on device" in line
    assert line.endswith("rewire ablate --resume run")
    assert run("ablate", "--resume", "run", "--workers", "0") == 0


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
        (["--rule", "dfa(", "--model", "mlp"], "is not closed"),
        (["--layers", "0"], "--layers takes PATTERN=RULE"),
        (["--layers", "9=fa"], "no layer fits '9'"),
        (["--layers", "1=ffa"], "did you mean 'fa'"),
        (["--blocks", "9"], "no module fits '9'"),
        (["--feedback", "lowrnk"], "did you mean 'lowrank'"),
        (["--skip", "cutt"], "did you mean 'cut'"),
        (["--scale", "big"], "a number above zero"),
        (["--scale", "-1"], "scale must be above zero"),
        (["--model", "timm:resnet81"], "did you mean 'resnet18'"),
        (["--model", "rewire.ablation:Cells"], "did you mean 'Cell'"),
        (["--data", "none.npz"], "no file none.npz"),
        (["--data", "rewire.ablation:loads"], "did you mean 'load'"),
        (["--workers", "-1"], "workers must be zero or more"),
        (["--together", "-1"], "together must be zero or more"),
        (["--alignments", "-1"], "alignments must be zero or more"),
        (["--checkpoint-seconds", "-1"], "checkpoint seconds must be zero or more"),
        (["--on", "rey"], "did you mean 'ray'"),
        (["--resume", "nowhere"], "not the folder of a run"),
        (["--resume", "nowhere", "--rule", "fa"], "without --rules"),
        (["nowhere.toml"], "cannot read nowhere.toml"),
        (["--rules", "bp", "fa", "dfa"], "in quotes"),
        (["--rules", "bp", "fa"], "cannot read fa"),
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


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rule", "dfaa"], "did you mean 'dfa'"),
        (["--rule", "fa dfa"], "takes one rule"),
        (["--model", "mlp cnn"], "takes one model"),
        (["--seed", "-1"], "seed must be zero or more"),
        (["--layers", "9=fa"], "no layer fits '9'"),
        (["--optimizer", "sdg"], "did you mean 'sgd'"),
        (["--epochs", "0"], "epochs must be above zero"),
        (["--resume", "nowhere"], "not the folder of a run"),
        (["--resume", "nowhere", "--model", "mlp"], "without --model"),
        (["digits"], "unexpected extra argument"),
    ],
)
def test_wrong_requests_of_train(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    assert run("train", *args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rewire: ") and says in err and err.count("\n") == 1
    assert not list(here.iterdir())


def test_what_convert_refuses_is_said_before_training(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise rewire.RewireError("layer 1\ncannot be fed back")

    monkeypatch.setattr(rewire, "convert", refuse)

    assert run("ablate", "--model", "mlp", "--rule", "dfa") == 2
    assert capsys.readouterr().err == "rewire: mlp under dfa: layer 1 cannot be fed back\n"
    assert not list(here.iterdir())


def test_an_interrupted_run_keeps_what_it_finished(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.run_cell

    def until_seed_1(cell: rewire.ablation.Cell, *rest: object, **options: object) -> object:  # type: ignore[name-defined]
        if cell.seed == 1:
            raise KeyboardInterrupt
        return real(cell, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(work, "run_cell", until_seed_1)
        assert run("ablate", *quick, "--rule", "bp", "--seeds", "2", "--no-controls") == 130
    (folder,) = (here / "runs").iterdir()
    assert len(records(folder)) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"rewire ablate --resume {folder.relative_to(here)}")
    assert run("ablate", "--resume", str(folder), "--workers", "0") == 0
    assert len(records(folder)) == 2


def test_train_is_a_run_of_one_cell(here: Path, quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "--model", "mlp", "--epochs", "2", "--batch-size", "128", "--out", "run", "--tensorboard"]
    pytest.importorskip("tensorboard")
    assert run(*args) == 0
    out, err = capsys.readouterr()
    assert "epoch 1  loss" in err and "epoch 2  loss" in err and "run/results.jsonl" in out
    (record,) = records(here / "run")
    assert record["cell"]["rule"] == "dfa" and len(record["history"]) == 2  # type: ignore[index, arg-type]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(here / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("accuracy/test")] == [1, 2]
    assert [e.value for e in events.Scalars("loss/epoch")] == pytest.approx(
        [epoch["loss"] for epoch in record["history"]]  # type: ignore[attr-defined]
    )
    events = EventAccumulator(str(here / "run" / "tensorboard" / "steps"))
    events.Reload()
    assert len(events.Scalars("loss/step")) == 2 * 12


def test_going_on_keeps_what_was_logged_before_and_replaces_what_came_after(here: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def log(epochs: list[Epoch], first: int, last: int, loss: float) -> None:
        board = Board(here / "board")
        board.began(epochs, ())
        for done in range(first, last + 1):
            board.step(done, 40, loss)
            if done % 10 == 0:
                board.epoch(Epoch(done // 10, loss, 0.5), {"gamma": loss})
        board.close()

    log([], 1, 35, 1.0)  # stopped after step 35; the last checkpoint is of step 24, in the third epoch
    log([Epoch(1, 1.0, 0.5), Epoch(2, 1.0, 0.5)], 25, 40, 2.0)

    found = {}
    for folder in ("board", "board/steps"):
        events = EventAccumulator(str(here / folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    assert found["loss/step"] == [(step, 1.0 if step < 25 else 2.0) for step in range(1, 41)]
    for tag in ("loss/epoch", "alignment/gamma"):
        assert found[tag] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_train_tries_a_cell_that_failed_again(here: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise ValueError("no")

    args = ["train", "--epochs", "1", "--batch-size", "128", "--alignments", "0", "--out", "run"]
    for again in (args, ["train", "--resume", "run"]):
        with monkeypatch.context() as patch:
            patch.setattr(work, "run_cell", fails)
            assert run(*args) == 1
        assert run(*again) == 0
        assert [row["status"] for row in records(here / "run")] == ["done"]
        shutil.rmtree(here / "run")


def test_train_goes_on_where_it_stopped(
    here: Path, quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["train", "--model", "mlp", "--epochs", "3", "--batch-size", "128", "--checkpoint-seconds", "0"]
    assert run(*args, "--out", "whole") == 0
    real = train._Run._epoch

    def until_epoch_2(self: train._Run) -> float:
        if self.progress.epoch == 3:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_epoch", until_epoch_2)
        assert run(*args, "--out", "parts") == 130
    assert "rewire train --resume parts" in capsys.readouterr().err
    assert run("train", "--resume", "parts") == 0
    assert "epoch 3" in capsys.readouterr().err
    whole, parts = records(here / "whole")[0], records(here / "parts")[0]
    assert [e["loss"] for e in parts["history"]] == [e["loss"] for e in whole["history"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "args", [["--help"], ["ablate", "--help"], ["ablate", "-h"], ["train", "--help"], ["inspect", "--help"], []]
)
def test_help_has_an_example(here: Path, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert run(*args) == 0
    assert "Example: rewire " in capsys.readouterr().out


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
