"""What the pages of the rules say, part by part, and the figures in them: those that commands have printed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from statistics import mean

import pytest

import rewire
from rewire.rules import LearnedLocal
from rewire.rules.base import _registry

ROOT = Path(rewire.__file__).parent.parent
PAGES = ROOT / "docs" / "rules"
OURS = [name for name in rewire.rules() if name in _registry and _registry[name].__module__.startswith("rewire.")]

PARTS = {
    "what it stores": r"\b[Ss]tore[sd]?\b",
    "what it costs": r"\b[Cc]osts?\b",
    "when it fails": r"\b[Ff]ails?\b",
    # A paper, by year and address; or that there is none.
    "its source": r"arxiv\.org|openreview\.net|no source|\*\*Source\.\*\* Ours|(?:18|19|20)\d\d\)",
    # What is handed back, in symbols; or the rules it is made of.
    "its equation": r"[δ]|B e\b|B sign\(e\)|B y|^0:|rule(?:=|s? )",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", OURS)
def test_every_page_has_every_part(name: str, part: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    assert re.search(PARTS[part], text, re.MULTILINE), f"{name}: {part}"


@pytest.mark.parametrize("name", OURS)
def test_every_option_is_said(name: str) -> None:
    """Each option of a rule that is not one of every direct rule's is on its page, or beside it in the class."""
    from rewire.rules.written import parameters

    text = (PAGES / f"{name}.md").read_text() + (_registry[name].__doc__ or "")
    for option in parameters(_registry[name]):
        if option not in ("layout", "feedback"):
            assert re.search(rf"\b{option}\b", text), f"{name}: {option}"


def test_kp_says_that_decay_is_the_optimizers() -> None:
    text = " ".join((PAGES / "kp.md").read_text().split())
    assert "without `weight_decay`" in text and "There is no decay option in the rule" in text


def blocks() -> list[str]:
    return re.findall(r"```\n(.*?)```", (PAGES / "README.md").read_text(), re.DOTALL)


def test_the_table_of_alignment_is_what_was_measured() -> None:
    lines = (ROOT / "benchmarks" / "results" / "feedback_alignment.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    tables = {name: next(b for b in blocks() if f"LeNet on {name}:" in b) for name in {run["data"] for run in runs}}
    assert set(tables) == {"digits", "fashion-mnist"}
    for data, table in tables.items():
        for rule in ("dfa", "dkp", "grape", "fitted"):
            of = [run for run in runs if (run["data"], run["rule"]) == (data, rule)]
            assert {run["seed"] for run in of} == {0, 1, 2}
            (row,) = [line for line in table.splitlines() if re.match(rf"│ {rule} ", line)]
            for layer in of[0]["cosines"]:
                assert f" {mean(run['cosines'][layer] for run in of):.3f} " in row, f"{data}, {rule}, {layer}"
            if rule != "dfa":
                plain = {run["seed"]: run for run in runs if (run["data"], run["rule"]) == (data, "dfa")}
                assert all(v > plain[run["seed"]]["cosines"][at] for run in of for at, v in run["cosines"].items())
                assert " above " in row


def test_the_table_of_times_is_what_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "learning_time.json").read_text())["rules"]
    table = next(b for b in blocks() if "time of a training step" in b)
    for rule, one in found.items():
        low, middle, high = one["ratio"]
        assert f"{middle:.3f} [{low:.3f}, {high:.3f}]" in table, rule
    assert found["fitted"]["ratio"][1] <= 1.10  # what is asked of it


def test_the_angles_are_those_of_the_example() -> None:
    """One of its lines, run again; all other lines are there."""
    spec = importlib.util.spec_from_file_location("weight_angles", ROOT / "examples" / "weight_angles.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    table = next(b for b in blocks() if "degrees between W and B" in b)
    rows = {line.split("accuracy")[0].strip(): line for line in table.strip().splitlines()}
    assert list(rows) == list(example.RULES)
    model, _ = example.train("kp")
    said = [float(number) for number in re.findall(r": +([\d.]+)", rows["kp"])]
    assert said == pytest.approx(list(example.angles(model).values()), abs=0.5)  # other processors round otherwise


def test_the_gap_to_backprop_is_what_was_measured() -> None:
    """The tables of ``benchmarks/gap.py`` in docs/results.md: of the runs that are kept, which show what is asked."""
    lines = (ROOT / "benchmarks" / "results" / "gap.jsonl").read_text().splitlines()
    errors: dict[tuple[str, str], dict[int, float]] = {}
    for run in map(json.loads, lines):
        errors.setdefault((run["task"], run["rule"]), {})[run["seed"]] = run["error"]
    means = {place: mean(by_seed.values()) for place, by_seed in errors.items()}
    closed = {
        (task, rule): 100 * (means[task, "dfa"] - error) / (means[task, "dfa"] - means[task, "bp"])
        for (task, rule), error in means.items()
    }
    page = (ROOT / "docs" / "results.md").read_text()
    tables = {task: page.split(f"  {task}\n")[1].split("```")[0].split("└")[0] for task, _ in means}
    for task, rule in means:
        assert set(errors[task, rule]) == {0, 1, 2}
        (row,) = [line for line in tables[task].splitlines() if line.startswith(f"│ {rule}  ") or f"│ {rule} │" in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[0] == rule and cells[1] == "3", row
        assert cells[2].startswith(f"{means[task, rule]:.2f} ±"), row
        assert cells[3] == f"{closed[task, rule]:.0f}", row
    assert sum(table.count("\n│") for table in tables.values()) == len(means)
    assert means["lenet", "fitted"] <= 13.5
    assert means["lenet-sgd", "dfa"] - means["lenet-sgd", "fitted"] >= 4
    assert closed["transformer", "fitted(context=8)"] >= 60 and closed["resnet", "fitted(context=8)"] >= 60


def test_rules_whose_feedback_an_optimizer_has_to_hold_are_named() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    (line,) = [part for part in page.split("\n- ") if part.startswith("The optimizer may be made")]
    kinds = [name for name in OURS if issubclass(_registry[name], LearnedLocal)]
    trained = {name for name in kinds if _registry[name]().trained}
    assert trained == {"kp", "ldfa", "pfa"} == {name for name in OURS if f"`{name}`" in line}
