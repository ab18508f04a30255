"""Rules that other packages ship, by way of a distribution made for the test."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import rewire
from rewire.ablation import Cell
from rewire.rules import plugins
from rewire.rules.base import resolve

GOOD = """
import rewire

class Thirds(rewire.LocalRule):
    random = False

    def __init__(self, *, part=3.0):
        self.part = part

    def backward_weight(self, weight, random, scale):
        return weight / self.part

@rewire.register_rule("quarters")
class Quarters(Thirds):
    def __init__(self):
        super().__init__(part=4.0)
"""


@pytest.fixture
def shipped(tmp_path, monkeypatch, registry):
    """Makes distributions: ``shipped("name", {"rule": "module:Class"}, module="source")``."""

    def make(name, entries, **modules):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{rule} = {value}" for rule, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[rewire.rules]", *lines, ""]))
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source)
        plugins.found.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set(sys.modules)
    yield make
    for module in set(sys.modules) - modules:
        del sys.modules[module]
    monkeypatch.undo()
    plugins.found.cache_clear()


def gradient(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rewire.convert(model, rule)
    x = torch.ones(1, 3)
    model(x).sum().backward()
    return model[0].weight.grad, torch.outer(model[1].weight.sum(0), x[0])


def test_a_shipped_rule_is_used_by_name(shipped):
    shipped("thirds-rules", {"thirds": "thirds_rules:Thirds", "quarters": "thirds_rules:Quarters"}, thirds_rules=GOOD)
    assert rewire.rules()[-2:] == ("thirds", "quarters")
    resolve("dfa")
    assert "thirds_rules" not in sys.modules, "nothing is imported before it is asked for"
    for rule, part in (("thirds", 3), ("thirds(part=5.0)", 5), ("quarters", 4)):
        ours, plain = gradient(rule)
        torch.testing.assert_close(ours, plain / part)
    assert repr(resolve("thirds(part=5.0)")) == "thirds(part=5.0)"
    assert repr(resolve("switch(first=thirds, then=dfa, at=2)")) == "switch(first='thirds', then='dfa', at=2)"
    Cell(model="mlp", rule="thirds(part=2.0)", seed=0)
    with pytest.raises(rewire.ConversionError, match="did you mean 'thirds'"):
        resolve("thrids")


@pytest.mark.parametrize(
    "source, says",
    [
        ("import a_package_that_is_not_there", "ModuleNotFoundError.*a_package_that_is_not_there"),
        ("raise RuntimeError('no such luck')", "RuntimeError: no such luck"),
        ("def broken(", "SyntaxError"),
        ("Other = 3", "AttributeError"),
        ("Mine = 3", "must be a subclass"),
        (
            "import rewire\n@rewire.register_rule('another')\nclass Mine(rewire.LocalRule): pass",
            "registered as 'another'",
        ),
    ],
)
def test_a_broken_package_is_named_and_breaks_no_other(shipped, source, says):
    shipped("good-rules", {"thirds": "good_rules:Thirds"}, good_rules=GOOD)
    shipped("bad-rules", {"bad": "bad_rules:Mine"}, bad_rules=source)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for _ in range(2):
        with pytest.raises(
            rewire.ConversionError, match=rf"(?s)'bad' is shipped by bad-rules \(bad_rules:Mine\).*{says}"
        ):
            rewire.convert(model, "bad")
    assert type(model[0]) is nn.Linear
    assert "bad" in rewire.rules() and resolve("thirds").part == 3.0 and resolve("dfa")


def test_two_packages_with_one_name(shipped):
    shipped("a-rules", {"thirds": "a_rules:Thirds"}, a_rules=GOOD)
    shipped("b-rules", {"thirds": "b_rules:Thirds"}, b_rules=GOOD)
    with pytest.raises(rewire.ConversionError, match=r"several packages: .*a-rules.*b-rules"):
        resolve("thirds")


def test_a_registered_rule_goes_before(shipped):
    shipped("bad-rules", {"dfa": "bad_rules:Mine"}, bad_rules="raise RuntimeError")
    assert repr(resolve("dfa")) == "dfa" and rewire.rules().count("dfa") == 1
