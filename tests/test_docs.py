"""The README and the pages of docs/: what they show runs, what they quote was measured, what they link to is there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import rewire
from rewire.cli import _rewire
from rewire.rules.base import _registry

ROOT = Path(rewire.__file__).parent.parent
COMMANDS = _rewire.commands
OURS = [name for name, rule in _registry.items() if rule.__module__.startswith("rewire.")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each code block. Fences open and close in turns."""
    parts = re.split(r"^```(.*)\n", page.read_text() + "\n", flags=re.MULTILINE)
    return [(parts[at], parts[at + 1]) for at in range(1, len(parts), 4)]


def prose(page: Path) -> str:
    return "".join(re.split(r"^```.*\n", page.read_text() + "\n", flags=re.MULTILINE)[::2])


def blocks(page: Path, language: str) -> list[str]:
    return [text for written, text in fenced(page) if written == language]


def plain(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


# -- code ----------------------------------------------------------------------------------------------


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("_here")
def test_the_readmes_code_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Its blocks run one after the other, as a reader would."""
    signature, first, *rest = blocks(ROOT / "README.md", "python")
    assert signature.strip() == 'rewire.convert(model, rule="dfa")'
    found: dict[str, Any] = {}
    exec(first, found)
    assert plain(capsys.readouterr().out) == plain(blocks(ROOT / "README.md", "")[0])
    for block in rest:
        exec(block, found)
    printed = capsys.readouterr().out
    assert ": ok" in printed and "Γ" in printed  # verify's table, and alignment's
    assert Path("run.json").exists()


class Shown(nn.Module):
    """Has the layers that the pages name in their examples."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2))
        self.encoder.layers = self.encoder.layer
        self.entry, self.head, self.classifier = nn.Linear(256, 64), nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(self.features(x))
        for layer in self.encoder.layer:
            x = layer(x)
        return self.classifier(self.head(x).relu())


@pytest.mark.usefixtures("_here")
def test_the_code_of_converting(capsys: pytest.CaptureFixture[str]) -> None:
    """Each way of converting, on a model of its own, and a pass after it."""
    first, *rest = blocks(ROOT / "docs/converting.md", "python")
    exec(first, {})
    assert plain(capsys.readouterr().out) == plain(blocks(ROOT / "docs/converting.md", "")[0])
    x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    found: dict[str, Any] = {"rewire": rewire, "nn": nn, "x": x, "y": y, "loss_fn": F.cross_entropy}
    conversions = 0
    for statement in (each for block in rest for each in ast.parse(block).body):
        if ast.unparse(statement).startswith("rewire.convert("):
            conversions += 1
            found["model"] = Shown()
        exec(ast.unparse(statement), found)
        assert rewire.summary(found["model"])
        F.cross_entropy(found["model"](x), y).backward()
    assert conversions >= 8


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_all_code_is_python_and_names_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "rewire":
                assert hasattr(rewire, node.attr) or importlib.util.find_spec(f"rewire.{node.attr}"), ast.unparse(node)


def dotted(text: str) -> set[str]:
    """What is written as an attribute of ``rewire``."""
    return set(re.findall(r"\brewire(?:\.[A-Za-z_]\w*)+", text))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_are_where_the_page_says(page: Path) -> None:
    """``rewire.rules.base`` is a module that no attribute leads to: ``rewire.rules`` is a function."""
    shown = [*re.findall(r"`([^`\n]+)`", prose(page)), *blocks(page, "python")]
    for path in {found for text in shown for found in dotted(text)}:
        _, first, *more = path.split(".")
        if not hasattr(rewire, first):
            importlib.import_module(f"rewire.{first}")
        at: Any = getattr(rewire, first)
        for step in more:
            assert hasattr(at, step), path
            at = getattr(at, step)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_classes_of_rules_are_imported(page: Path) -> None:
    code = ast.parse("\n".join(blocks(page, "python")))
    imported = {
        alias.name
        for node in ast.walk(code)
        if isinstance(node, ast.ImportFrom) and node.module == "rewire.rules"
        for alias in node.names
    }
    of_rules = importlib.import_module("rewire.rules")
    assert all(hasattr(of_rules, each) for each in imported)
    used = {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
    assert used & {each for each in of_rules.__all__ if each[0].isupper()} <= imported


def test_the_package_of_rules_has_every_rule() -> None:
    of_rules = importlib.import_module("rewire.rules")
    assert set(of_rules.__all__) >= {type_.__name__ for type_ in map(_registry.get, OURS) if type_}
    assert all(hasattr(of_rules, each) for each in of_rules.__all__)


# -- commands ------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """``rewire ...`` and ``python FILE ...`` in blocks and in running text."""
    shown = [*blocks(page, "sh"), *blocks(page, ""), *re.findall(r"^    .*$", prose(page), re.MULTILINE)]
    lines = [line.strip() for block in shown for line in block.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    yield from (line for line in lines if re.match(r"(rewire [a-z]+ |python [-\w./]+)", line))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist_with_all_their_options(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        if words[0] == "rewire":
            command = COMMANDS.get(words[1])
            assert command, line
            known = {option for each in command.params for option in each.opts}
            assert {word.split("=")[0] for word in words[2:] if word.startswith("--")} <= known, line
        elif words[1] == "-m":
            assert importlib.util.find_spec(words[2].rstrip(".")), line
        else:
            script = next((each for each in (ROOT / words[1], ROOT / "docs" / words[1]) if each.is_file()), None)
            assert script, line
            text = script.read_text()
            for option in (word for word in words[2:] if word.startswith("--")):
                assert f'"{option}"' in text, f"{line}: no {option}"


# -- links ---------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            to = (page.parent / file).resolve() if file else page
            assert to.exists(), target
            assert not anchor or anchor in anchors(to), target


def test_every_page_is_linked() -> None:
    pages = {page.resolve() for page in PAGES}
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    }
    assert not {name(page) for page in pages - linked - {ROOT / "README.md"}}


# -- numbers -------------------------------------------------------------------------------------------


def test_the_tables_of_results_are_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """``benchmarks/gap.py`` finds what it ran: its tables are those of the page, and of the README's sentence."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    gap = importlib.import_module("gap")
    runs = [json.loads(line) for line in gap.RESULTS.read_text().splitlines()]
    page = plain((ROOT / "docs/results.md").read_text())
    closed = {}
    for task in gap.TASKS:
        of = [run for rule in gap.TASKS[task].rules for run in runs if (run["task"], run["rule"]) == (task, rule)]
        assert {run["seed"] for run in of} == {0, 1, 2} and {run["rule"] for run in of} == set(gap.TASKS[task].rules)
        drawn = StringIO()
        Console(file=drawn, width=200).print(gap.table(task, of))
        assert plain(drawn.getvalue()) in page, task
        closed[task] = {
            line.split("│")[1].strip(): line.split("│")[4].strip()
            for line in drawn.getvalue().splitlines()
            if "│" in line
        }
    for each in set(sys.modules) - before:
        if Path(getattr(sys.modules[each], "__file__", None) or "/").parent == ROOT / "benchmarks":
            del sys.modules[each]
    there, small, large = (closed[task]["fitted"] for task in ("lenet", "resnet", "transformer"))
    assert (
        f"closes {there} % of the gap between `dfa` and backprop there, {small} % on a small ResNet and "
        f"{large} % on a small transformer ({closed['transformer']['fitted(context=8) per block']} % "
    ) in " ".join((ROOT / "README.md").read_text().split())


def test_the_readmes_errors_of_lenet_are_those_of_the_table() -> None:
    page = (ROOT / "docs/results.md").read_text()
    adam = page[page.index("adam 0.001, constant") :]
    errors = {rule: re.search(rf"{rule} +│ +([\d.]+) ±", adam) for rule in ("bp", "fa", "dfa")}
    bp, fa, dfa = (f"{float(found[1]):.1f} %" for found in errors.values() if found)
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"has {bp} test error under backprop, {fa} under `fa` and {dfa} under `dfa`" in said
