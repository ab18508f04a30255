"""Every rule has a page that says what it has to, and is in the index; the examples do what their pages say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import rewire
from rewire.rules.base import _registry
from rewire.rules.written import parameters
from rewire.swap import states_of

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "rules"
OURS = [name for name in rewire.rules() if name in _registry and _registry[name].__module__.startswith("rewire.")]


@pytest.mark.parametrize("name", OURS)
def test_every_rule_has_a_page(name):
    page = PAGES / f"{name}.md"
    text = page.read_text()
    assert re.match(rf"# {name}\b", text)
    assert len(text.split()) > 50, f"{name}: equation, source, what it stores and costs, when it fails"
    assert f"[{name}]({name}.md)" in (PAGES / "README.md").read_text()
    for arxiv in re.findall(r"arXiv:(\d+\.\d+)", _registry[name].source):
        assert arxiv in text, f"{name}: {arxiv}"


def test_links_of_the_pages_lead_somewhere():
    for page in [*PAGES.glob("*.md"), ROOT / "docs" / "own_rules.md"]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            target = (page.parent / link).resolve()
            assert target.exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", ["dkp", "fitted", "grape", "ldfa", "wm"])
def test_options_said_to_be_the_usual_ones(name):
    text = (PAGES / f"{name}.md").read_text().replace('"', "'")
    for option, default in parameters(_registry[name]).items():
        if option not in ("layout", "feedback", "normalise"):
            assert f"`{option}={default!r}`" in text, option


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles ask for it
    spec.loader.exec_module(module)
    return module


def test_a_rule_of_ones_own(registry):
    module = example("own_rule")
    source = (ROOT / "examples" / "own_rule.py").read_text()
    body = source[source.index("@rewire.register_rule") : source.index("def one_pass")].strip()
    assert len([line for line in body.splitlines() if line.strip() and '"""' not in line]) < 15
    model = module.one_pass()
    B = rewire.feedback(model)["2"]
    e = rewire.output_error(model)
    kept = torch.zeros_like(e)
    for row, values in enumerate(e.tolist()):
        for at in sorted(range(4), key=lambda i: -abs(values[i]))[:2]:
            kept[row, at] = values[at]
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x = torch.randn(5, 8)
    h = torch.tanh(plain[0](x))
    torch.testing.assert_close(model[0].weight.grad, (kept @ B * (1 - h**2)).T @ x)
    results = module.ablation(epochs=1)
    assert [result.cell.rule for result in results] == ["dfa", "loudest", "loudest(keep=3)"]
    assert all(result.accuracy > 0.2 for result in results)


def test_its_page_shows_it(registry):
    text = (ROOT / "docs" / "own_rules.md").read_text()
    code = next(block for block in text.split("```python")[1:] if "loudest" in block).split("```")[0]
    exec(compile(code, "own_rules.md", "exec"), {"rewire": rewire})
    model = rewire.convert(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), "loudest(keep=3)")
    assert repr(states_of(model[0])[0].rule) == "loudest(keep=3)"


def test_sign_networks(registry):
    """A sign stops gradients, a surrogate derivative lets them through: values are what the table is about."""
    module = example("sign_network")
    found = {
        name: module.train(module.Sign, "dfa", derivative, 0, epochs=2)
        for name, derivative in module.DERIVATIVES.items()
    }
    assert found["straight-through"] < found["its own (zero)"] - 0.01
    assert found["fast sigmoid"] < found["its own (zero)"] - 0.01
    a = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    assert module.Sign()(a).tolist() == [-1, -1, 1, 1, 1] and module.Step()(a).tolist() == [0, 0, 1, 1, 1]
