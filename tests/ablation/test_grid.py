"""Grids: which cells, from options and from TOML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewire.ablation import InputError, from_toml, read
from rewire.words import pairs, words


def labels(**given: Any) -> list[str]:
    return [cell.label for cell in read(given).cells()]


def test_every_combination_with_controls_and_no_cell_twice() -> None:
    assert labels(models="mlp", rules=["dfa"], seeds=2) == [
        *("mlp bp seed 0", "mlp bp seed 1", "mlp dfa seed 0", "mlp dfa seed 1"),
        *("mlp shallow seed 0", "mlp shallow seed 1"),
    ]
    assert labels(models="mlp", rules="dfa", seeds=[4], controls=False) == ["mlp dfa seed 4"]
    assert labels(models="mlp", rules="bp shallow dfa dfa", seeds=1) == [
        f"mlp {rule} seed 0" for rule in ("bp", "shallow", "dfa")
    ]


def test_axes_multiply() -> None:
    given: dict[str, Any] = {
        "models": ["mlp", "cnn"],
        "rules": ["fa", "dfa"],
        "seeds": 3,
        "layers": [{}, {"1": "bp"}],
        "scale": ["auto", 0.1],
        "optimizers": ["adam", {"name": "sgd", "lr": [0.1, 0.01], "momentum": 0.9}],
        "batch_size": [16, 32],
        "controls": False,
    }
    cells = read(given).cells()
    assert len(cells) == 2 * 2 * 3 * 2 * 2 * 3 * 2 == len({cell.id for cell in cells})
    assert {(c.optimizer, c.lr, c.momentum) for c in cells} == {
        *(("adam", 2e-3, 0.0), ("sgd", 0.1, 0.9), ("sgd", 0.01, 0.9))
    }
    # Controls are there once for each model, optimizer, batch size and seed, and never under an assignment.
    controls = [c for c in read({**given, "controls": True}).cells() if c.rule in ("bp", "shallow")]
    assert len(controls) == 2 * (2 * 3 * 3 * 2) and all(not c.layers and c.scale == "auto" for c in controls)


def test_plain_backprop_is_one_cell_whatever_its_feedback() -> None:
    assert (
        labels(models="mlp", rules="bp", seeds=1, feedback=["dense", "lowrank"], scale=[0.1, "auto"]).count(
            "mlp bp seed 0"
        )
        == 1
    )


def test_local_rules_are_one_cell_whatever_the_structure_of_direct_feedback() -> None:
    grid = read({"model": "mlp", "rules": ["fa", "dfa"], "feedback": ["dense", "lowrank"], "skip": ["keep", "cut"]})
    cells = [cell for cell in grid.cells() if cell.seed == 0]
    assert [cell.rule for cell in cells if cell.rule in ("fa", "dfa")] == ["fa"] + ["dfa"] * 4
    mixed = read({"model": "mlp", "rules": "fa", "layers": {"0": "dfa"}, "feedback": ["dense", "lowrank"]})
    assert sum(cell.rule == "fa" for cell in mixed.cells() if cell.seed == 0) == 2


def test_a_rule_may_have_options_and_a_bp_may_have_others_in_it() -> None:
    cells = read({"models": "mlp", "rules": "bp", "seeds": 1, "layers": {"1": "fa"}, "controls": False}).cells()
    assert [cell.plain for cell in cells] == [False]
    assert words(["bp fitted(every=100, context=16),dfa"]) == ["bp", "fitted(every=100, context=16)", "dfa"]
    assert words(['dfa(feedback="low, rank")', "'a b'"]) == ['dfa(feedback="low, rank")', "'a b'"]
    assert words([" , "]) == []
    assert pairs("--layers", "0=fa", ["0=fitted(every=100, a=2) conv*=bp", "0=fa"]) == {"conv*": "bp", "0": "fa"}


@pytest.mark.parametrize("text", ["fitted(every=100", "dfa)", '"dfa'])
def test_what_is_not_closed_is_said(text: str) -> None:
    with pytest.raises(InputError, match="is not closed, or closes nothing"):
        words([text])


@pytest.mark.parametrize("text", ["0", "=fa", "0="])
def test_a_pair_is_a_pair(text: str) -> None:
    with pytest.raises(InputError, match="--layers takes PATTERN=RULE, such as '0=fa'"):
        pairs("--layers", "0=fa", [text])


def test_toml_gives_the_same_grid_and_so_does_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(
        """
        model = "mlp"
        rules = ["fa", "dfa"]
        seeds = [0, 7]
        layers = [{}, {"1" = "fa", "3" = "bp"}]
        blocks = ["3"]
        optimizers = [{name = "sgd", lr = 1, momentum = 0.9, schedule = "cosine"}, "adam"]
        weight_decay = 1e-3
        epochs = 4
        """
    )
    grid = read(from_toml(tmp_path / "grid.toml"))
    assert grid.layers == ((), (("1", "fa"), ("3", "bp"))) and grid.blocks == (("3",),) and grid.seeds == (0, 7)
    assert [dict(each) for each in grid.optimizers] == [
        {"name": "sgd", "lr": 1.0, "momentum": 0.9, "weight_decay": 1e-3, "schedule": "cosine"},
        {"name": "adam", "lr": 2e-3, "momentum": 0.0, "weight_decay": 1e-3, "schedule": "constant"},
    ]
    again = read(json.loads(json.dumps(grid.config())))
    assert again == grid and [c.id for c in again.cells()] == [c.id for c in grid.cells()]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ruls": "bp"}, "unknown key 'ruls'; did you mean 'rules'"),
        ({"rule": "bp", "rules": "fa"}, "given twice"),
        ({"rules": []}, "rules is empty"),
        ({"rules": [1]}, "rules takes names, not 1"),
        ({"rules": "dfaa"}, "did you mean 'dfa'"),
        ({"rules": ["fa dfa"]}, "unknown rule 'fa dfa'"),
        ({"batch_size": []}, "batch_size is empty"),
        ({"scale": []}, "scale is empty"),
        ({"lr": []}, "lr is empty"),
        ({"optimizers": []}, "optimizers is empty"),
        ({"optimizers": [{"name": "sgd", "schedule": 3}]}, "schedule takes names, not 3"),
        ({"optimizers": [{"name": "sgd", "schedule": [["a"]]}]}, r"schedule takes names, not \['a'\]"),
        ({"optimizers": [{"name": "sgd", "momentum": []}, "adam"]}, "momentum is empty"),
        ({"schedule": [["a"]]}, r"schedule takes names, not \['a'\]"),
        ({"seeds": 0}, "seeds must be above zero"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": ["a"]}, "seeds takes a whole number, not 'a'"),
        ({"seeds": True}, "seeds takes a whole number"),
        ({"epochs": 1.5}, "epochs takes a whole number, not 1.5"),
        ({"epochs": -1}, "epochs must be above zero"),
        ({"lr": "fast"}, "lr takes a number, not 'fast'"),
        ({"optimizers": {"name": "sdg"}}, "did you mean 'sgd'"),
        ({"optimizers": {"lr": 1}}, "an optimizer is a name or a table"),
        ({"optimizers": {"name": "sgd", "rate": 1}}, "unknown key 'rate'"),
        ({"layers": "0=fa"}, "layers takes tables"),
        ({"layers": {"0": 1}}, "layers takes tables"),
        ({"layers": {"0": "ffa"}}, "did you mean 'fa'"),
        ({"blocks": [["a"], 1]}, "blocks takes a list"),
        ({"scale": "Auto"}, "did you mean 'auto'"),
        ({"scale": 0}, "scale must be above zero"),
        ({"controls": "no"}, "controls is true or false"),
        ({"together": -1}, "together must be zero or more"),
        ({"threads": 0}, "threads must be above zero"),
        ({"data_dir": "x"}, "take no data directory"),
        ({"momentum": 0.5}, "momentum belongs to"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(given).cells()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text("rules = [")
    with pytest.raises(InputError, match=r"grid.toml is not TOML"):
        from_toml(tmp_path / "grid.toml")
    with pytest.raises(InputError, match=r"cannot read .*did you mean 'grid.toml'"):
        from_toml(tmp_path / "gird.toml")
    with pytest.raises(InputError, match="cannot read"):
        from_toml(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*directory$"):
        from_toml(tmp_path / "folder")  # which is there: nothing else was meant


def test_names_may_have_spaces_in_lists_and_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").mkdir()
    for name in ("my data/a.npz", "it's (1).npz"):
        (tmp_path / name).write_bytes(b"")

    assert read({"data": ["my data/a.npz", "it's (1).npz"]}).data == ("my data/a.npz", "it's (1).npz")
    assert read({"data": "digits 'my data/a.npz' C:\\b.npz"}).data == ("digits", "my data/a.npz", "C:\\b.npz")
    assert read({"data": '"my data/a.npz",digits'}).data == ("my data/a.npz", "digits")
    assert read({"data": "my data/a.npz"}).data == ("my data/a.npz",)
    grid = read({"models": "mlp", "data": "'my data/a.npz'"})
    assert read(json.loads(json.dumps(grid.config()))) == grid
