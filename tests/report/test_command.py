"""`rewire report`: what it writes and how it refuses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rewire
from rewire.cli import main
from tests.report.made_up import line, write


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path / "a", [line(rule, seed) for rule in ("bp", "fa") for seed in range(3)])
    write(tmp_path / "b", [line("dfa", seed) for seed in range(3)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["report", *args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_writes_into_the_first_run_and_says_where(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("a", "b") == 0

    assert capsys.readouterr().out == "Report: a/report.html\n"
    text = (here / "a" / "report.html").read_text()
    assert text.startswith("<!doctype html>") and "3 rules, 9 cells" in text
    assert (here / "a" / "report.html").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(("kind", "name", "start"), [("csv", "report.csv", "model,"), ("markdown", "report.md", "# ")])
def test_other_formats(here: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, start: str) -> None:
    assert run("a", "--format", kind) == 0
    assert (here / "a" / name).read_text().startswith(start)

    assert run("a", "--format", kind, "--out", "-") == 0
    assert capsys.readouterr().out == f"Report: a/{name}\n" + (here / "a" / name).read_text()


@pytest.mark.parametrize(
    ("name", "start"),
    [("x.csv", "model,"), ("x.MD", "# "), ("x.markdown", "# "), ("x.htm", "<!doctype"), ("x.txt", "<!doctype")],
)
def test_the_format_is_what_the_name_ends_with(here: Path, name: str, start: str) -> None:
    assert run("a", "--out", name) == 0
    assert Path(name).read_text().startswith(start)


def test_baseline_and_metric_and_out(here: Path) -> None:
    assert run("a", "--baseline", "fa", "--metric", "error", "--out", "x.html") == 0

    text = Path("x.html").read_text()
    assert "difference to fa" in text and "test&nbsp;error" in text and not (here / "a" / "report.html").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "Missing argument 'RUNS...'"),
        (["nowhere"], "no results.jsonl in nowhere"),
        (["."], "no results.jsonl in .; runs in it: a b"),
        (["a/run.json"], "no results.jsonl in a/run.json"),
        (["a", "--format", "htm"], "did you mean 'html'"),
        (["a", "--metric", "eror"], "did you mean 'error'"),
        (["a", "--baseline", "fb"], "unknown baseline 'fb'; did you mean 'fa'"),
        (["a", "--out", "no/such/x.html"], "cannot write no/such/x.html: No such file or directory"),
        (["a", "--out", "b"], "cannot write b: Is a directory"),
        (["a", "--formt", "csv"], "--format"),
        (["a", "--format", "html", "--out", "x.csv"], "x.csv is a name of csv, not html: leave the format out"),
    ],
)
def test_a_wrong_request_gets_one_line_and_code_2_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    before = sorted(here.rglob("*"))
    assert run(*args) == 2

    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rewire: ") and says in err and err.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_a_missing_extra_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("scipy", "jinja2") else real(name, *rest)
    )

    assert run("a") == 2
    assert capsys.readouterr().err == "rewire: reports need jinja2 and scipy: pip install 'rewire[report]'\n"


def test_the_command_line_loads_without_the_extra() -> None:
    """Training must not need what only reports do."""
    code = (
        "import sys\n"
        "for name in ('scipy', 'statsmodels', 'jinja2'): sys.modules[name] = None\n"
        "import rewire.cli, rewire.ablation.html\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rewire.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "Example: rewire report" in capsys.readouterr().out


def test_a_full_disk_leaves_the_old_report(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("a", "--out", "x.html") == 0
    old = Path("x.html").read_text()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run("a", "b", "--out", "x.html") == 2
    assert "cannot write x.html: No space left on device" in capsys.readouterr().err
    assert Path("x.html").read_text() == old
    assert not [each for each in here.iterdir() if each.name.startswith(".")]
