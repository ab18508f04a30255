"""Saying which layers, blocks and outputs; seams between rules; the summary; rules of one's own."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.rules import base
from rewire.rules.direct import DFA, DRTP, SDFA

from .plain import TOL, seeded
from .plain import randn as draw
from .plain import same as close


@pytest.fixture(autouse=True)
def silence_is_checked():
    """A warning of the library fails the test that does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", rewire.RewireWarning)
        yield


@pytest.fixture
def registry(monkeypatch):
    """Rules registered in a test are gone after it."""
    monkeypatch.setattr(base, "_registry", dict(base._registry))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, 2), nn.Tanh())
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(self.norm(self.features(x).flatten(1)))))


def net():
    return seeded(Net)


def rules_of(model):
    return {row.name: row.rule for row in rewire.summary(model).rows if row.converted}


def step(model, *shape, seed=0):
    """One pass; the error at the output is e by the choice of the loss."""
    model.zero_grad()
    y = model(draw(*shape, seed=seed))
    e = draw(*y.shape, seed=50 + seed)
    (y * e).sum().backward()
    return e


def chain(*widths):
    modules = []
    for a, b in itertools.pairwise(widths):
        modules += [nn.Linear(a, b), nn.Tanh()]
    return seeded(lambda: nn.Sequential(*modules[:-1]))


# -- layers= -------------------------------------------------------------------------------------------

NAMES = ["features.0", "features.2", "fc", "head"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["dfa", "dfa", "dfa", "dfa"]),
        ({}, ["dfa", "dfa", "dfa", "dfa"]),
        ({"features.*": "fa"}, ["fa", "fa", "dfa", "dfa"]),
        ({"features.?": "fa", "head": "bp"}, ["fa", "fa", "dfa", "bp"]),
        ({"*": "bp", "f[ce]*": "usf"}, ["usf", "usf", "usf", "bp"]),
        ({"f[ce]*": "usf", "*": "bp"}, ["bp", "bp", "bp", "bp"]),
        ({nn.Conv2d: "fa"}, ["fa", "fa", "dfa", "dfa"]),
        ({nn.Conv2d: "fa", "features.2": "sdfa"}, ["fa", "sdfa", "dfa", "dfa"]),
        ({"features.2": "sdfa", nn.Conv2d: "fa"}, ["fa", "fa", "dfa", "dfa"]),
        ({nn.Module: "brsf", nn.Linear: "bp"}, ["brsf", "brsf", "bp", "bp"]),
        ({"head": DFA(layout="batch_first")}, ["dfa", "dfa", "dfa", "dfa(layout='batch_first')"]),
        (lambda name, module: "fa" if isinstance(module, nn.Conv2d) else None, ["fa", "fa", "dfa", "dfa"]),
        (lambda name, module: SDFA() if name == "fc" else None, ["dfa", "dfa", "sdfa", "dfa"]),
    ],
)
def test_layers(layers, expected):
    assert rules_of(rewire.convert(net(), "dfa", layers=layers)) == dict(zip(NAMES, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "dfaa"}, ["unknown rule 'dfaa'", "'dfa'", "rules: bp"]),
        ({"rule": "nothing like it"}, ["unknown rule", "rules: bp"]),
        ({"rule": 3}, ["a rule is a name or an instance", "3"]),
        ({"rule": DFA}, ["class", "DFA()"]),
        ({"rule": rewire.Rule()}, ["a rule is a name or an instance"]),
        ({"layers": {"features.9": "fa"}}, ["no layer fits 'features.9'", "did you mean 'features."]),
        ({"layers": {"haed": "fa"}}, ["did you mean 'head'"]),
        ({"layers": {"norm": "fa"}}, ["layers", "no layer fits 'norm'"]),
        ({"layers": {nn.Conv1d: "fa"}}, ["no layer fits type Conv1d"]),
        ({"layers": {"head": "faa"}}, ["unknown rule 'faa'", "'fa'"]),
        ({"layers": {int: "fa"}}, ["a name pattern or a module type is needed"]),
        ({"layers": ["head"]}, ["a dict of patterns or a callable", "list"]),
        ({"layers": lambda name, module: 7}, ["a rule is a name or an instance", "7"]),
        ({"blocks": "featurs"}, ["blocks", "no module fits 'featurs'", "'features'"]),
        ({"blocks": [nn.Bilinear]}, ["fits type Bilinear"]),
        ({"blocks": nn.Tanh}, ["no module fits type Tanh (but some without parameters)"]),
        ({"blocks": [3]}, ["blocks", "a name pattern or a module type is needed"]),
        ({"rule": "fa", "blocks": "features"}, ["'features'", "one block", "fa", "direct rule"]),
        ({"blocks": "features", "layers": {"features": "usf"}}, ["'features'", "one block", "usf"]),
        ({"blocks": "features", "layers": {"features.0": "fa"}}, ["no layer fits 'features.0'"]),
        ({"output": "haed"}, ["output", "no layer is named 'haed'", "'head'"]),
        ({"output": "norm"}, ["no layer is named 'norm'"]),
        ({"output": []}, ["output is a layer's name"]),
        ({"output": ["head", "tail"]}, ["'tail'"]),
    ],
)
def test_what_cannot_be_used_is_named_and_changes_nothing(options, words):
    model = net()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(rewire.ConversionError) as problem:
        rewire.convert(model, **options)
    for word in words:
        assert word in str(problem.value), str(problem.value)
    assert [type(m) for m in model.modules()] == classes
    with pytest.raises(rewire.ConversionError, match="not converted"):
        rewire.feedback(model)


def test_a_failed_conversion_leaves_the_earlier_one():
    model = rewire.convert(net(), "dfa", scale=0.3)
    step(model, 2, 2, 5, 5)
    before = rewire.feedback(model)
    with pytest.raises(rewire.ConversionError):
        rewire.convert(model, "fa", layers={"nowhere": "bp"})
    assert rules_of(model) == dict.fromkeys(NAMES, "dfa")
    after = rewire.feedback(model)
    assert before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_a_model_without_layers_says_what_it_has():
    with pytest.raises(rewire.ConversionError, match=r"no layer.*Embedding, LayerNorm"):
        rewire.convert(nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)), "fa")
    with pytest.raises(rewire.ConversionError, match="none"):
        rewire.convert(nn.Tanh(), "fa")


class Shared(nn.Module):
    """``encoder`` and ``twin`` are one module."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.twin = self.encoder
        self.head = nn.Linear(4, 3)
        self.tail = self.head

    def forward(self, x):
        return self.tail(self.encoder(x) + self.twin(2 * x))


@pytest.mark.parametrize("name", ["encoder.0", "twin.0", "twin.*"])
def test_all_names_of_a_shared_module_count(name):
    model = rewire.convert(seeded(Shared), "dfa", layers={name: "fa"}, output="tail")
    assert rules_of(model) == {"encoder.0": "fa", "head": "dfa"}  # listed once, under the first name
    step(model, 5, 4)
    assert {row.name: row.role for row in rewire.summary(model).rows}["head"] == "output"
    model = rewire.convert(seeded(Shared), "dfa", blocks=name.split(".")[0], scale=0.3)
    assert rules_of(model) == {"encoder": "dfa", "head": "dfa"}
    e = step(model, 5, 4)
    e = step(model, 5, 4)
    assert set(rewire.feedback(model)) == {"head"}  # the inputs have no gradient: nothing to hand back
    close(model.head.weight.grad, e.T @ (model.encoder(draw(5, 4)) + model.encoder(2 * draw(5, 4))).detach())


# -- seams ---------------------------------------------------------------------------------------------


def seam(rules, shape=(4, 2, 5, 5)):
    """A conv net under four rules, one per layer; checks every gradient by the formulas."""
    model = net()
    plain = copy.deepcopy(model)
    rewire.convert(model, "dfa", scale=0.3, layers=dict(zip(NAMES, rules, strict=True)))
    for seed in range(3):
        e = step(model, *shape, seed=seed)
        B = rewire.feedback(model)
        h0 = draw(*shape, seed=seed)
        a1 = plain.features[0](h0)
        h1 = torch.tanh(a1).detach().requires_grad_()
        h2 = torch.tanh(plain.features[2](h1)).flatten(1).detach().requires_grad_()
        x3 = plain.norm(h2)
        h3 = torch.tanh(plain.fc(x3)).detach()

        def back(name, delta, weight, transposed):
            rule = dict(zip(NAMES, rules, strict=True))[name]
            if rule == "shallow":
                return torch.zeros_like(transposed(delta, weight))
            if rule in ("dfa", "sdfa"):
                signal = e.sign() if rule == "sdfa" else e  # noqa: B023
                return torch.einsum("nk,k...->n...", signal, B[name])  # noqa: B023
            return transposed(delta, weight if rule == "bp" else B[name])  # noqa: B023

        def dense(delta, w):
            return delta @ w

        def conv(delta, w):
            at = torch.zeros_like(h1).requires_grad_()  # noqa: B023
            return torch.autograd.grad(F.conv2d(at, w, stride=2), at, delta)[0]

        expected = {"head.weight": e.T @ h3, "head.bias": e.sum(0)}
        d3 = back("head", e, plain.head.weight, dense) * (1 - h3**2)
        expected |= {"fc.weight": d3.T @ x3, "fc.bias": d3.sum(0)}
        dx3 = back("fc", d3, plain.fc.weight, dense)
        dh2, *norm = torch.autograd.grad(x3, [h2, plain.norm.weight, plain.norm.bias], dx3)
        expected |= {"norm.weight": norm[0], "norm.bias": norm[1]}
        d2 = (dh2 * (1 - h2**2)).reshape(4, 4, 2, 2)
        w2, b2 = plain.features[2].weight, plain.features[2].bias
        g2 = torch.autograd.grad(F.conv2d(h1, w2, b2, 2), [w2, b2], d2)
        d1 = back("features.2", d2, w2, conv) * (1 - h1**2)
        g1 = torch.autograd.grad(a1, list(plain.features[0].parameters()), d1)
        expected |= dict(zip(["features.2.weight", "features.2.bias"], g2, strict=True))
        expected |= dict(zip(["features.0.weight", "features.0.bias"], g1, strict=True))
        for name, p in model.named_parameters():
            close(p.grad, expected[name].detach(), f"{name}, pass {seed}, {rules}")


@pytest.mark.parametrize(
    "rules",
    [
        ("fa", "fa", "dfa", "dfa"),
        ("dfa", "dfa", "fa", "fa"),
        ("dfa", "dfa", "dfa", "bp"),
        ("bp", "dfa", "dfa", "bp"),
        ("dfa", "bp", "dfa", "dfa"),
        ("dfa", "dfa", "bp", "dfa"),
        ("bp", "bp", "dfa", "bp"),
        ("bp", "dfa", "bp", "bp"),
        ("usf", "dfa", "frsf", "sdfa"),
        ("dfa", "sdfa", "usf", "fa"),
        ("fa", "shallow", "dfa", "bp"),
        ("bp", "bp", "bp", "bp"),
        ("fa", "bp", "fa", "bp"),
    ],
)
def test_seams(rules):
    seam(rules)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "DFA"}, ["unknown rule 'DFA'; did you mean 'dfa'?; rules: bp, dfa"]),
        ({"rule": "uSF"}, ["unknown rule 'uSF'; did you mean 'usf'?; rules: "]),
        ({"rule": "nothing like it"}, ["unknown rule 'nothing like it'; rules: "]),
        ({"rule": "dfa", "feedback": "LowRank"}, ["did you mean 'lowrank'"]),
        ({"layers": {"fcc*": "fa"}}, ["no layer fits 'fcc*'; did you mean 'fc'?; layers: 'features.0', 'features.2'"]),
        ({"layers": {"features.1": "fa"}}, ["no layer fits 'features.1', but 'features.1', a ReLU without weights"]),
        ({"layers": {nn.ReLU: "fa"}}, ["no layer fits type ReLU, but 'features.1', a ReLU without weights"]),
        ({"layers": {"norm": "fa"}}, ["'norm', a BatchNorm1d: elementwise: keeps its true derivative", "layers: "]),
        ({"layers": {"features": "fa"}}, ["'features', a Sequential that holds others", "'.*'"]),
        ({"rule": "dfa", "blocks": "features", "layers": {"features.0": "bp"}}, ["inside a unit that is fed back as"]),
    ],
    ids=str,
)
def test_messages_say_what_is_there(options, words):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
            self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 2)

    with pytest.raises(rewire.ConversionError) as caught:
        rewire.convert(Net(), **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    with pytest.raises(rewire.ConversionError, match=r"'11', and 28 more$"):
        rewire.convert(many, layers={"fc*": "fa"})


@pytest.mark.parametrize("what", ["layers", "blocks"])
def test_a_layers_very_name_is_no_pattern(what):
    model = nn.Sequential()
    for name in ("[bold]", "b", "x[1]", "x1", "a*", "ab"):
        model.add_module(name, nn.Sequential(nn.Linear(3, 3)) if what == "blocks" else nn.Linear(3, 3))
    names = ["[bold]", "x[1]", "a*"]
    if what == "layers":
        rewire.convert(model, "dfa", layers=dict.fromkeys(names, "fa"))
        assert [name for name, rule in rules_of(model).items() if rule == "fa"] == names
    else:
        rewire.convert(model, "dfa", blocks=names)
        assert [row.name for row in rewire.summary(model).rows if row.type == "Sequential"] == names


# -- output= -------------------------------------------------------------------------------------------


def test_the_right_output_is_taken_from_the_first_pass_on():
    model = chain(5, 6, 7, 4)
    rewire.convert(model, "dfa", output="4", scale=0.3)
    roles = {row.name: row.role for row in rewire.summary(model).rows}
    assert roles["4"] == "output" and roles["2"] == "not seen yet"
    found = rewire.convert(copy.deepcopy(model), "dfa", scale=0.3)
    for seed in range(3):
        e = step(model, 3, 5, seed=seed)
        step(found, 3, 5, seed=seed)
        close(rewire.output_error(model), e)
        for ours, theirs in zip(model.parameters(), found.parameters(), strict=True):
            close(ours.grad, theirs.grad)


@pytest.mark.parametrize("scale", ["auto", 0.3])
@pytest.mark.parametrize("layers", [None, {"4": "fa"}])
def test_a_wrong_output_is_found_in_the_first_pass(scale, layers):
    model = chain(5, 6, 7, 4)
    plain = copy.deepcopy(model)
    rewire.convert(model, "dfa", output="2", scale=scale, layers=layers)
    with pytest.raises(rewire.PassError) as problem:
        step(model, 3, 5)
    for word in ("loss sees the output of layer '4'", "output='2'", "output='4'", "['2', '4']", "layers={'4': 'bp'}"):
        assert word in str(problem.value)
    rewire.convert(model, "dfa", output="4", scale=scale)
    step(model, 3, 5)
    with rewire.use_rule(model, "bp"):
        step(model, 3, 5)
    step(plain, 3, 5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad)


def test_output_below_a_layer_kept_on_backprop():
    """The loss sees '4', which is on backprop; e is asked for at '2'."""
    model = chain(5, 6, 7, 4)
    rewire.convert(model, "dfa", output="2", scale=0.3, layers={"4": "bp"})
    for _ in range(2):
        e = step(model, 3, 5)
        with torch.no_grad():
            h1 = torch.tanh(model[0](draw(3, 5)))
            h2 = torch.tanh(model[2](h1))
        at_2 = (e @ model[4].weight) * (1 - h2**2)
        close(rewire.output_error(model), at_2)
        close(model[2].weight.grad, at_2.T @ h1)
        close(model[0].weight.grad, ((at_2 @ rewire.feedback(model)["2"]) * (1 - h1**2)).T @ draw(3, 5))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.layer = nn.Linear(5, 6), nn.Linear(6, 7)
        self.a, self.b = nn.Linear(7, 3), nn.Linear(7, 4)

    def forward(self, x):
        h = torch.tanh(self.layer(torch.tanh(self.lower(x))))
        return self.a(h), self.b(h)


@pytest.mark.parametrize("output", [None, ["a", "b"], ["b", "a"]])
def test_several_outputs_add_their_feedback(output):
    model = seeded(TwoHeads)
    rewire.convert(model, "dfa", output=output, scale=0.3)
    x = draw(3, 5)
    for _ in range(3):
        model.zero_grad()
        ya, yb = model(x)
        ea, eb = draw(3, 3, seed=1), draw(3, 4, seed=2)
        ((ya * ea).sum() + (yb * eb).sum()).backward()
        errors = rewire.output_error(model)
        assert set(errors) == {"a", "b"}
        close(errors["a"], ea)
        close(errors["b"], eb)
        B = rewire.feedback(model)
        with torch.no_grad():
            h1 = torch.tanh(model.lower(x))
            h2 = torch.tanh(model.layer(h1))
        d2 = (ea @ B["a"] + eb @ B["b"]) * (1 - h2**2)
        d1 = (ea @ B["layer@a"] + eb @ B["layer@b"]) * (1 - h1**2)
        close(model.layer.weight.grad, d2.T @ h1)
        close(model.lower.weight.grad, d1.T @ x)
        close(model.a.weight.grad, ea.T @ h2)


def test_only_one_of_two_outputs_named():
    model = seeded(TwoHeads)
    rewire.convert(model, "dfa", output="a", scale=0.3)
    with pytest.raises(rewire.PassError, match=r"layer 'b'.*output='a'"):
        ya, yb = model(draw(3, 5))
        (ya.sum() + yb.sum()).backward()


def test_a_hidden_layer_among_the_outputs_is_none_where_the_loss_does_not_look():
    model = chain(5, 6, 7, 4)
    rewire.convert(model, "dfa", output=["2", "4"], scale=0.3)
    for _ in range(2):
        e = step(model, 3, 5)
        with torch.no_grad():
            h1 = torch.tanh(model[0](draw(3, 5)))
        B = rewire.feedback(model)
        (name,) = [key for key in B if key.split("@")[0] == "2"]
        close(model[0].weight.grad, ((e @ B[name]) * (1 - h1**2)).T @ draw(3, 5))


# -- blocks= -------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        return x + self.inner(self.b(torch.tanh(self.a(x))))


def blocked():
    return seeded(
        lambda: nn.Sequential(
            OrderedDict(
                stem=nn.Linear(5, 6), act=nn.Tanh(), one=Residual(), two=Residual(), out=nn.Tanh(), head=nn.Linear(6, 3)
            )
        )
    )


@pytest.mark.parametrize(
    "blocks",
    [
        "one",
        ["one", "two"],
        Residual,
        [Residual],
        ["o*e", "tw?"],
        ["*"],
        [Residual, nn.Sequential],
        ["two", "two.inner"],
    ],
)
def test_blocks(blocks):
    """A block is fed back once, at its input, through its skip connection too; inside it is exact."""
    model = blocked()
    plain = copy.deepcopy(model)
    rewire.convert(model, "dfa", blocks=blocks, scale=0.3)
    names = rules_of(model)
    both = blocks not in ("one", ["two", "two.inner"])
    assert ("one" in names) == (both or blocks == "one") and ("two" in names) == (blocks != "one")
    assert not any(n.startswith(f"{block}.") for n in names for block in ("one", "two") if block in names)
    if not both:
        return
    for seed in range(3):
        e = step(model, 4, 5, seed=seed)
        B = rewire.feedback(model)
        x = draw(4, 5, seed=seed)
        h = torch.tanh(plain.stem(x)).detach()
        y1 = plain.one(h)
        y2 = plain.two(y1.detach())
        d2 = (e @ B["head"]) * (1 - torch.tanh(y2) ** 2)
        for name, y, delta in [("two", y2, d2), ("one", y1, e @ B["two"])]:
            theirs = getattr(plain, name)
            grads = torch.autograd.grad(y, list(theirs.parameters()), delta.detach())
            for ours, expected in zip(getattr(model, name).parameters(), grads, strict=True):
                close(ours.grad, expected, name)
        close(model.stem.weight.grad, ((e @ B["one"]) * (1 - h**2)).T @ x)


def test_layers_may_speak_of_blocks():
    model = rewire.convert(blocked(), "fa", blocks=Residual, layers={"one": "dfa", Residual: "sdfa"})
    assert rules_of(model) == {"stem": "fa", "one": "sdfa", "two": "sdfa", "head": "fa"}


def test_the_model_itself_is_no_block():
    with pytest.raises(rewire.ConversionError, match="no module fits"):
        rewire.convert(blocked(), "dfa", blocks="")
    rewire.convert(blocked(), "dfa", blocks="*")


class Pair(nn.Module):
    """A block with two inputs and a dictionary for a result."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 7), nn.Linear(4, 7)

    def forward(self, a, *, b):
        return {"sum": torch.tanh(self.left(a) + self.right(b)), "note": "text"}


class WithPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.pair, self.head = nn.Linear(5, 6), nn.Linear(5, 4), Pair(), nn.Linear(7, 3)

    def forward(self, x):
        self.ha, self.hb = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        out = self.pair(self.ha, b=self.hb)
        return self.head(out["sum"])


def test_a_block_with_several_inputs_feeds_each():
    model = seeded(WithPair)
    rewire.convert(model, "dfa", blocks="pair", scale=0.3)
    for seed in range(3):
        e = step(model, 4, 5, seed=seed)
        B, x = rewire.feedback(model), draw(4, 5, seed=seed)
        assert B["pair"].shape == (3, 6) and B["pair#1"].shape == (3, 4)
        close(model.a.weight.grad, ((e @ B["pair"]) * (1 - model.ha.detach() ** 2)).T @ x)
        close(model.b.weight.grad, ((e @ B["pair#1"]) * (1 - model.hb.detach() ** 2)).T @ x)


# -- summary -------------------------------------------------------------------------------------------


def rows_of(model):
    return {row.name: row for row in rewire.summary(model).rows}


def test_summary_of_what_is_not_converted():
    rows = rows_of(net())
    assert list(rows) == ["features.0", "features.2", "norm", "fc", "head"]
    assert all(row.rule == "bp" and not row.converted and row.role == "-" for row in rows.values())
    assert rows["fc"].note == "can be converted" and "elementwise" in rows["norm"].note
    assert rewire.summary(net()).feedback_bytes == 0


def test_summary_of_direct_rules():
    model = net().float()
    rewire.convert(model, "dfa", layers={"fc": "bp"})
    rows = rows_of(model)
    assert all(row.role == "not seen yet" for row in rows.values() if row.converted)
    assert rows["features.2"].feedback_shape is None and rows["features.2"].feedback_bytes == 0
    assert rows["features.2"].scale is None and "first training pass" in rows["features.2"].note
    for seed in range(2):
        model(torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    rows = rows_of(model)
    assert [rows[n].role for n in NAMES] == ["hidden", "hidden", "hidden", "output"]
    assert [rows[n].rule for n in NAMES] == ["dfa", "dfa", "bp", "dfa"]
    assert rows["features.2"].feedback_shape == (3, 3, 5, 5) and rows["features.2"].feedback_bytes == 225 * 4
    assert rows["head"].feedback_shape == (3, 6) and rows["head"].feedback_bytes == 18 * 4
    assert rows["features.0"].feedback_shape is None and "nothing to hand back" in rows["features.0"].note
    assert rows["fc"].feedback_shape is None and "backprop" in rows["fc"].note
    assert rows["features.2"].scale == rewire.scales(model)["features.2"]
    assert rewire.summary(model).feedback_bytes == (225 + 18) * 4
    assert rows["features.2"].feedback_shape == tuple(rewire.feedback(model)["features.2"].shape)
    rewire.convert(model, "dfa", feedback="channel", scale=0.3)
    model(torch.randn(2, 2, 5, 5)).square().sum().backward()
    row = rows_of(model)["features.2"]
    assert row.feedback_shape == (3, 3) and row.feedback_bytes == 36 and row.scale == 0.3


def test_summary_of_local_rules():
    model = net()
    rewire.convert(model, "fa", layers={"features.0": "usf", "features.2": "brsf", "head": "shallow"})
    rows = rows_of(model)
    assert rows["fc"].feedback_shape == (6, 16) and rows["fc"].feedback_bytes == 96 * 8
    assert rows["features.0"].feedback_bytes == 0 and "made from the weight" in rows["features.0"].note
    assert rows["features.2"].feedback_bytes == 0 and "drawn anew" in rows["features.2"].note
    assert "zeros" in rows["head"].note and rows["head"].feedback_shape is None
    assert abs(rows["fc"].scale - model.fc.weight.std().item()) < TOL


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_weight_that_is_constant_has_no_scale(constant, dtype):
    """In float64 rounding leaves a trace of a deviation, of which no feedback is made."""
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 64), nn.Tanh(), nn.Linear(64, 4)).to(dtype)
    nn.init.constant_(model[2].weight, constant)
    nn.init.normal_(model[4].weight, mean=1.0, std=1e-6 if dtype is torch.float64 else 0.1)
    spread = model[4].weight.double().std().item()
    rewire.convert(model, "fa")
    rows = rows_of(model)
    assert rows["2"].scale == pytest.approx(27**-0.5) and "the weight is constant" in rows["2"].note
    assert rows["4"].scale == pytest.approx(spread) and "constant" not in rows["4"].note


def test_summary_notes():
    model = blocked()
    model.stem.requires_grad_(False)
    rewire.convert(model, "dfa", blocks="one", scale=0.3)
    rows = rows_of(model)
    assert rows["one.a"].note == "inside block 'one': exact backprop" and not rows["one.a"].converted
    assert "frozen" in rows["stem"].note
    assert rows["one"].type == "Residual" and rows["two.a"].type == "Linear"


def test_summary_is_a_table():
    model = net()
    rewire.convert(model, "dfa", layers={nn.Conv2d: "fa"}, scale=0.3)
    step(model, 2, 2, 5, 5)
    step(model, 2, 2, 5, 5)
    text = str(rewire.summary(model))
    assert "Net" in text and "4 layers converted, 1 modules left alone" in text
    for word in (
        "layer",
        "rule",
        "memory",
        "features.2",
        "Conv2d",
        "fa",
        "dfa",
        "output",
        "4×3×3×3",
        "3×16",
        "0.3",
        "B",
    ):
        assert word in text
    line = next(line for line in text.splitlines() if "norm" in line)
    assert "bp" in line and "elementwise" in line


def test_names_that_read_as_markup_are_shown_as_they_are():
    model = nn.Sequential(OrderedDict({"[/a]": nn.Linear(5, 7), "[b]": nn.Tanh(), ":cat:[red]": nn.Linear(7, 4)}))
    rewire.convert(model, "fa")
    x = torch.randn(6, 5)
    for looked in (
        rewire.summary(model),
        rewire.verify(model, x, lambda y: y.square().sum()),
        rewire.alignment(model, x, lambda y: y.square().sum(), null=0),
    ):
        assert "[/a]" in str(looked) and ":cat:[red]" in str(looked)


def test_summary_of_a_model_that_is_one_layer():
    layer = rewire.convert(nn.Linear(3, 2), "fa")
    assert [row.name for row in rewire.summary(layer).rows] == [""]
    assert "(model)" in str(rewire.summary(layer))
    with pytest.raises(rewire.ConversionError, match="int"):
        rewire.summary(3)


# -- rules ---------------------------------------------------------------------------------------------


def test_names():
    assert rewire.rules()[0] == "bp"
    assert {"dfa", "sdfa", "drtp", "shallow", "fa", "usf", "brsf", "frsf", "dkp", "grape"} <= set(rewire.rules())


def test_a_local_rule_of_ones_own(registry):
    @rewire.register_rule("halved")
    class Halved(rewire.LocalRule):
        random = False

        def backward_weight(self, weight, random, scale):
            return weight / 2

    assert "halved" in rewire.rules() and repr(Halved()) == "halved"
    for rule in ("halved", Halved()):
        model = chain(5, 6, 7, 4)
        plain = copy.deepcopy(model)
        rewire.convert(model, rule)
        step(model, 3, 5)
        step(plain, 3, 5)
        for depth, name in enumerate(["4", "2", "0"]):
            ours, theirs = model.get_submodule(name), plain.get_submodule(name)
            close(ours.weight.grad, theirs.weight.grad / 2**depth, name)
    assert rules_of(model) == {"0": "halved", "2": "halved", "4": "halved"}


def test_a_local_rule_with_randomness_and_scale():
    class Mixed(rewire.LocalRule):
        def backward_weight(self, weight, random, scale):
            return weight + random * scale

    model = chain(5, 6, 4)
    W = model[2].weight.detach().clone()
    rewire.convert(model, Mixed(), scale=0.5)
    e = step(model, 3, 5)
    R = rewire.feedback(rewire.convert(copy.deepcopy(model), "fa", scale=0.5))["2"]
    close(rewire.feedback(model)["2"], W + 0.5 * R)
    h = torch.tanh(model[0](draw(3, 5))).detach()
    close(model[0].weight.grad, ((e @ (W + 0.5 * R)) * (1 - h**2)).T @ draw(3, 5))
    assert rules_of(model)["2"] == "Mixed"


def test_a_direct_rule_of_ones_own(registry):
    @rewire.register_rule("cubed")
    class Cubed(rewire.DirectRule):
        def signal(self, error, targets, axis):
            return error**3

    for rule in ("cubed", Cubed(), Cubed(layout="batch_first")):
        model = chain(5, 6, 7, 4)
        rewire.convert(model, rule, scale=0.3)
        for seed in range(2):
            e = step(model, 3, 5, seed=seed)
            B, x = rewire.feedback(model), draw(3, 5, seed=seed)
            h1 = torch.tanh(model[0](x)).detach()
            h2 = torch.tanh(model[2](h1)).detach()
            close(model[4].weight.grad, e.T @ h2)
            close(model[2].weight.grad, ((e**3 @ B["4"]) * (1 - h2**2)).T @ h1)
            close(model[0].weight.grad, ((e**3 @ B["2"]) * (1 - h1**2)).T @ x)


@pytest.mark.parametrize("name", ["dfa", "Halved", "two words", "", "2fast", "with-dash"])
def test_names_that_cannot_be_registered(registry, name):
    with pytest.raises(rewire.ConversionError, match=r"registered already|lower-case identifier"):
        rewire.register_rule(name)(type("Mine", (rewire.LocalRule,), {}))
    assert rewire.rules() == tuple(base._registry) and "Halved" not in rewire.rules()


@pytest.mark.parametrize("thing", [nn.Linear, 3, lambda: None, rewire.LocalRule()])
def test_only_rules_can_be_registered(registry, thing):
    with pytest.raises(rewire.ConversionError, match=r"subclass of rewire\.LocalRule"):
        rewire.register_rule("mine")(thing)
    assert "mine" not in rewire.rules()


def test_a_rule_that_is_neither_local_nor_direct(registry):
    with pytest.raises(rewire.ConversionError, match=r"LocalRule or rewire\.DirectRule"):

        @rewire.register_rule("bare")
        class Bare(rewire.Rule):
            pass

        rewire.convert(net(), "bare")


def test_registered_twice(registry):
    rewire.register_rule("mine")(type("Mine", (rewire.LocalRule,), {}))
    with pytest.raises(rewire.ConversionError, match="'mine' is registered already"):
        rewire.register_rule("mine")


def test_one_class_under_several_names_keeps_its_own(registry):
    class Scaled(DFA):
        pass

    rewire.register_rule("first")(Scaled)
    assert repr(DFA()) == "dfa" and repr(Scaled()) == "first" and DRTP.name == "drtp"


def test_torchscript_is_refused_or_left_alone():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(rewire.ConversionError, match="the module that was scripted"):
        rewire.convert(scripted, "fa")
    model = rewire.convert(nn.Sequential(nn.Linear(2, 3), scripted), "fa")
    assert {row.name: "TorchScript" in row.note for row in rewire.summary(model).rows} == {
        "0": False,
        "1.0": True,
        "1.2": True,
    }
