"""Forward-mode probes: what they see, and that they leave nothing behind."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rewire
from rewire.jvp import _slice
from rewire.rules.base import LearnedDirect, _registry
from rewire.rules.grape import Grape
from rewire.rules.jacobian import corrected, residual
from rewire.swap import states_of


class Net(nn.Module):
    """Batch statistics and dropout between layers."""

    def __init__(self, inplace=False):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 3)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.two(self.relu(self.norm(self.one(x)))))))


def build(rule="grape", seed=0, kind=Net, **options):
    torch.manual_seed(seed)
    model = kind()
    return rewire.convert(model, rule, **options)


def data(n=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def train(model, steps, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def wiring_of(model):
    return next(state.wiring for module in model.modules() for state in states_of(module))


@pytest.mark.parametrize("inplace", [False, True])
def test_random_numbers_and_buffers_are_as_without_a_probe(inplace):
    """With a B that learns nothing every step is that of dfa, to the bit."""
    found = []

    class Idle(Grape):
        def learn(self, B, memory, sums):
            return B

    for rule in (Idle(anchor=0), "dfa"):
        model = build(rule, kind=lambda: Net(inplace), scale=0.2)
        torch.manual_seed(7)
        train(model, 5, *data())
        found.append({k: v for k, v in model.state_dict().items() if "rewire" not in k})
        found[-1]["random"] = torch.rand(3)
        if rule != "dfa":
            assert wiring_of(model).probe_count == 4  # none before the first pass: no shape is known
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_one_probe_for_each_pass():
    model = build()
    x, y = data()
    train(model, 2, x, y)
    before = wiring_of(model).probe_count
    with torch.no_grad():
        model(x)
    assert wiring_of(model).probe_count == before
    out = model(x) + model(x)  # two forwards, one backward
    assert wiring_of(model).probe_count == before + 1
    nn.functional.cross_entropy(out, y).backward()
    with rewire.use_rule(model, "bp"):
        model(x)
    assert wiring_of(model).probe_count == before + 1
    rewire.restore(model)
    model(x)
    assert not model._forward_pre_hooks and not any("rewire" in name for name in model.__dict__)


def test_probes_of_every_few_passes():
    model = build("grape(every=3)")
    train(model, 13, *data())
    assert wiring_of(model).probe_count == 4  # before passes 3, 6, 9, 12


def test_a_part_of_the_batch():
    seen = []

    class Spy(Grape):
        def observe(self, rows, B):
            seen.append(len(rows.e))
            return super().observe(rows, B)

    model = build(Spy(samples=4))
    train(model, 3, *data())
    assert seen == [4, 4]


def test_copies_and_files_go_on_alike():
    x, y = data()
    model = build()
    train(model, 4, x, y)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.manual_seed(1)
    train(model, 3, x, y)
    for twin in twins:
        torch.manual_seed(1)
        train(twin, 3, x, y)
        for name, value in model.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name
        assert wiring_of(twin) is not wiring_of(model) and wiring_of(twin).probe_count == 6


@pytest.mark.parametrize("rule", ["grape(anchor=4)", "dkp"])
def test_resumed_from_a_checkpoint(rule):
    x, y = data()
    model = build(rule)
    train(model, 6, x, y)
    saved = copy.deepcopy(model.state_dict())
    scales = rewire.scales(model)
    torch.manual_seed(1)
    train(model, 6, x, y)

    again = build(rule, seed=5, scale=scales)
    with torch.no_grad():
        again(x)
    again.load_state_dict(saved)
    wiring_of(again).outputs, wiring_of(again).certain = ["head"], True
    torch.manual_seed(1)
    train(again, 6, x, y)
    for name, value in model.state_dict().items():
        if "passes" in name:
            assert torch.equal(value, again.state_dict()[name]), name


def test_a_plain_checkpoint_loads_and_restore_strips():
    x, y = data()
    model = build()
    plain = Net().state_dict()
    train(model, 4, x, y)
    assert any("rewire_" in name for name in model.state_dict())
    model.load_state_dict(plain)
    rewire.restore(model)
    assert model.state_dict().keys() == plain.keys()


def test_use_rule_probes_for_a_while():
    model = build("dfa", scale=0.2)
    x, y = data()
    train(model, 2, x, y)
    with rewire.use_rule(model, "grape"):
        train(model, 4, x, y)
    count = wiring_of(model).probe_count
    assert count > 0 and not model._forward_pre_hooks.get("rewire_probe")
    train(model, 2, x, y)
    assert wiring_of(model).probe_count == count


def test_an_operation_without_forward_mode_is_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.lstm = nn.LSTM(6, 6, batch_first=True)

        def forward(self, x):
            return self.head(self.lstm(self.two(torch.tanh(self.one(x)))[:, None])[0][:, 0])

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    class Own(Net):
        def forward(self, x):
            return self.head(Doubled.apply(torch.tanh(self.two(self.one(x)))))

    x, y = data()
    for kind in (Recurrent, Own):
        model = build("grape(together=True)", kind=kind)
        train(model, 1, x, y)
        with pytest.raises(rewire.PassError, match=r"grape.*forward-mode"):
            train(model, 2, x, y)
        for module in model.modules():
            assert all(state.probe is None for state in states_of(module))


def test_layers_that_probes_do_not_reach_are_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.one(x))[:, None].expand(-1, 4, -1)
            return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))

    model = build("grape", kind=Attention)
    x, y = data()
    with pytest.warns(rewire.RewireWarning, match="probes do not reach"):
        train(model, 4, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rewire.RewireWarning)  # said once
        train(model, 3, x, y)


def test_fused_attention_is_seen_through():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.qkv, self.head = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x):
            q, k, v = self.qkv(torch.tanh(self.one(x)).reshape(len(x) // 4, 1, 4, 8)).chunk(3, -1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])

    model = build("grape", kind=Plain, scale=0.2)
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = None
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y).backward()
        optimizer.step()
        first = first or {name: B.clone() for name, B in rewire.feedback(model).items()}
    assert all(not torch.equal(B, first[name]) for name, B in rewire.feedback(model).items()) and first


def test_surrogate_derivatives_count_in_probes():
    class Sign(nn.Module):
        def forward(self, a):
            return torch.sign(a)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), Sign(), nn.Linear(6, 3))

        def forward(self, x):
            return self.net(x)

    seen = []

    class Spy(Grape):
        def observe(self, rows, B):
            seen.append((rows.e.clone(), rows.exact.clone()))
            return super().observe(rows, B)

    def slope(a):
        return torch.exp(-(a**2))

    model = build(Spy(together=False, lr=0.0, anchor=0), kind=Step, derivative={Sign: slope}, scale=0.2)
    x, y = data()
    for _ in range(4):
        nn.functional.cross_entropy(model(x), y).backward()
    h = torch.tanh(model.net[0](x))
    a = model.net[2](h)
    checked = 0
    for u, v in seen:
        if v.shape[1] == 8:
            by_hand = (v @ model.net[2].weight.T * slope(a)) @ model.net[4].weight.T
            torch.testing.assert_close(u, by_hand)
            checked += 1
    assert checked


def test_two_outputs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 6)
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x):
            h = torch.tanh(self.two(torch.tanh(self.one(x))))
            return self.a(h), self.b(h)

    seen = []

    class Spy(Grape):
        def observe(self, rows, B):
            seen.append((rows.e.clone(), rows.exact.clone(), B.shape))
            return super().observe(rows, B)

    model = build(Spy(lr=0.0, anchor=0), kind=Heads, scale=0.2)
    x, y = data()
    for _ in range(4):
        a, b = model(x)
        (nn.functional.cross_entropy(a, y) + b.square().mean()).backward()
    h = torch.tanh(model.two(torch.tanh(model.one(x))))
    found = {"a": 0, "b": 0}
    for u, v, shape in seen:
        if v.shape[1] != 8:
            continue
        assert u.shape == (12, 5) and shape == (5, 8)
        inner = v @ model.two.weight.T * (1 - h**2)
        for name, head, part in (("a", model.a, u[:, :3]), ("b", model.b, u[:, 3:])):
            if part.abs().sum() > 0:
                torch.testing.assert_close(part, inner @ head.weight.T)
                found[name] += 1
    assert found["a"] and found["a"] == found["b"]


def test_least_squares_from_probes():
    """In a linear network J is one matrix, and B comes to be it: noise vanishes with the error."""

    @rewire.register_rule("byprobe")
    class ByProbe(LearnedDirect):
        probes = True

        def probe_number(self, passes):
            return passes

        def signal(self, error, targets, axis):
            return error

        def observe(self, rows, B):
            return residual(rows, B)

        def learn(self, B, memory, sums):
            return corrected(B, sums)

    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)).double()
        rewire.convert(model, "byprobe", scale=0.2)
        x, y = data(16)
        for _ in range(60):
            nn.functional.cross_entropy(model(x.double()), y).backward()
        B = rewire.feedback(model)
        J2 = model[2].weight
        J1 = J2 @ model[1].weight
        torch.testing.assert_close(B["2"], J2.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(B["1"], J1.detach(), atol=1e-5, rtol=0)
    finally:
        _registry.pop("byprobe")


def test_a_compiled_model_is_probed_outside_of_its_graph():
    model = build()
    x, y = data()
    train(model, 2, x, y)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        nn.functional.cross_entropy(compiled(x), y).backward()
    assert wiring_of(model).probe_count == 3


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"lr": -1.0}, {"anchor": -1}, {"samples": 0}, {"together": 3}, {"every": 2.5}]
)
def test_options_grape_refuses(wrong):
    with pytest.raises(rewire.ConversionError, match=next(iter(wrong))):
        Grape(**wrong)


def test_options_as_text():
    model = build("grape(every=5, together=True)")
    rule = states_of(model.two)[0].rule
    assert (rule.every, rule.together, rule.lr) == (5, True, Grape().lr)
    assert repr(rule) == "grape(every=5, together=True)"
    assert np.isclose(Grape(lr=0.5).lr, 0.5)


class Shared(nn.Module):
    """Two heads; the first of them is called twice, if ``again``."""

    def __init__(self, again):
        super().__init__()
        self.one, self.two, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.again = again

    def forward(self, x):
        h = self.two(self.one(x))
        return [self.a(h), self.b(h), *([self.a(-0.5 * h)] if self.again else [])]


@pytest.mark.parametrize("again", [False, True])
def test_what_reaches_one_output_says_nothing_about_another(again):
    """Nothing learned from one head's tangent draws the other's feedback towards zero."""
    model = build("fitted(by='jvp', every=1)", kind=lambda: Shared(again).double(), scale=0.2)
    x, y = data(32)
    for _ in range(150):  # a linear network, the same at every sample: B settles
        sum(nn.functional.cross_entropy(out, y % out.shape[1]) for out in model(x.double())).backward()
    model(x.double())
    B = rewire.feedback(model)
    mean = 0.25 if again else 1.0  # of what the two calls do
    J = {"a": mean * model.a.weight @ model.two.weight, "b": model.b.weight @ model.two.weight}
    near = 0.1 if again else 1e-5  # two calls that differ leave noise
    torch.testing.assert_close(B["two@b"], J["b"].detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(B["two@a"], J["a"].detach(), atol=near, rtol=0)


def test_which_inputs_a_part_of_the_batch_is_cut_from():
    """The first rows of whatever is as long as the first tensor; all else as it is."""
    x, y, table, number = torch.arange(12).reshape(6, 2), torch.arange(6), torch.arange(4), torch.tensor(6)
    args, kwargs = _slice(((x, table), {"y": [y], "n": number, "s": "x", "wide": torch.ones(2, 6)}), 4)
    assert args[0].equal(x[:4]) and args[1] is table
    assert kwargs["y"][0].equal(y[:4]) and kwargs["n"] is number and kwargs["s"] == "x"
    assert kwargs["wide"].shape == (2, 6)
    assert _slice(((x,), {}), 9)[0][0].equal(x)


class Normed(nn.Sequential):
    """A norm on what autocast made bfloat16, in front of the output layer: PyTorch gives its tangent in float32."""

    def __init__(self):
        super().__init__(nn.Linear(5, 8), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


def test_probes_under_autocast():
    x, y = data(64)
    learned = []
    for mixed in (False, True):
        model = build(kind=Normed, scale=0.3)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                out = model(x)
            nn.functional.cross_entropy(out.float(), y).backward()
            model.zero_grad()
        learned.append({name: B.double().flatten() for name, B in rewire.feedback(model).items()})
    for name, B in learned[0].items():
        assert torch.cosine_similarity(B, learned[1][name], 0) > 0.99, name
