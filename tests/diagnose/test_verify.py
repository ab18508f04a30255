"""``verify``: what it says of healthy models of many kinds, its numbers, and that it leaves no trace."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.rules import LearnedLocal

RULES = ("fa", "usf", "brsf", "frsf", "dfa", "sdfa", "drtp", "shallow", "bp")
X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 3, 2, 2, 1])


def loss_of(out):
    return F.cross_entropy(out, Y)


def made(build, rule="dfa", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
    return rewire.convert(model, rule, **options)


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.ReLU(inplace=True),
        nn.Conv1d(4, 4, 3, padding=1, groups=2, padding_mode="circular"),
        nn.Dropout(0.3),
        nn.ConvTranspose1d(4, 3, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(30, 4),
    )


class Reused(nn.Module):
    """One layer used three times."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        for _ in range(3):
            h = h + torch.tanh(self.again(h))
        return self.last(h)


class TwoHeads(nn.Module):
    """Two outputs in a dict, of different widths."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.one = nn.Linear(6, 4)
        self.middle = nn.Linear(6, 6)
        self.two = nn.Linear(6, 3)

    def forward(self, x):
        h = self.body(x)
        return {"one": self.one(h), "two": self.two(torch.tanh(self.middle(h)))}


class LossInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, labels):
        y = self.net(x)
        return {"loss": F.cross_entropy(y, labels), "logits": y}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.a(h)) + torch.tanh(self.b(h))
        return self.last(h)


class Standardised(nn.Linear):
    """A forward of its own."""

    def forward(self, x):
        return F.linear(x * 2, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def own_forward():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Standardised(6, 6), nn.Tanh(), nn.Linear(6, 4))


def parametrized():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    nn.utils.parametrizations.spectral_norm(model[4])
    return model


def frozen():
    model = mlp()
    model[2].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    return model


BUILDS = {f.__name__: f for f in (mlp, cnn, Reused, Residual, own_forward, parametrized, frozen)}


def statuses(result):
    return {layer.name: layer.status for layer in result.layers}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("build", BUILDS)
def test_healthy(build, rule, trained):
    model = made(BUILDS[build], rule)
    if trained:
        for _ in range(3):
            loss_of(model(X)).backward()
    result = rewire.verify(model, X, loss_of)
    assert result.ok, str(result)
    live = "on backprop" if rule == "bp" else "live"
    assert {*statuses(result).values()} <= {live, "first layer"}, str(result)
    assert sum(layer.status == live for layer in result.layers) >= 2 or rule == "bp"
    for layer in result.layers:
        assert layer.weight_exact in (True, None)
        if layer.status == "live" and rule != "shallow":
            assert layer.formula == pytest.approx(1, abs=1e-9)
            assert layer.backprop is not None and abs(layer.backprop) < 0.999999


@pytest.mark.parametrize("feedback", ["dense", "channel"])
@pytest.mark.parametrize("skip", ["keep", "cut"])
@pytest.mark.parametrize("build", ["Residual", "cnn", "Reused"])
def test_options(build, skip, feedback):
    result = rewire.verify(made(BUILDS[build], skip=skip, feedback=feedback), X, loss_of)
    assert result.ok, str(result)
    assert all(layer.formula == pytest.approx(1) for layer in result.layers if layer.status == "live")


@pytest.mark.parametrize("feedback", ["ternary", "orthogonal", "sparse", "lowrank", "shared", "seeded"])
@pytest.mark.parametrize("build", ["Residual", "cnn", "Reused"])
def test_structures_of_feedback(build, feedback):
    result = rewire.verify(made(BUILDS[build], feedback=feedback), X, loss_of)
    assert result.ok, str(result)
    assert all(layer.formula == pytest.approx(1) for layer in result.layers if layer.status == "live")


def test_cut_skips_are_seen_where_they_are():
    """Under ``skip="cut"`` both layers that take h share one gradient, the sum of their feedback."""
    model = made(Residual, skip="cut", scale=0.3)
    report = {layer.name: layer for layer in rewire.verify(model, X, loss_of).layers}
    loss_of(model(X)).backward()
    B, e = rewire.feedback(model), rewire.output_error(model)
    plain = {k: v.detach() for k, v in model.state_dict().items()}
    h = torch.tanh(X @ plain["first.weight"].T + plain["first.bias"]).requires_grad_()
    a = torch.tanh(F.linear(h, plain["a.weight"], plain["a.bias"]))
    b = torch.tanh(F.linear(h, plain["b.weight"], plain["b.bias"]))
    F.cross_entropy(F.linear(h + a + b, plain["last.weight"], plain["last.bias"]), Y).backward()
    fed = e @ (B["a"] + B["b"])
    cosine = float((fed * h.grad).sum() / fed.norm() / h.grad.norm())
    assert report["a"].backprop == pytest.approx(cosine)
    assert report["b"].backprop == pytest.approx(cosine)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_the_cosine_to_backprop_is_what_autograd_says(rule):
    model = made(mlp, rule, scale=0.3)
    report = {layer.name: layer for layer in rewire.verify(model, X, loss_of).layers}
    loss_of(model(X)).backward()
    e, B = rewire.output_error(model), rewire.feedback(model)
    plain = rewire.restore(copy.deepcopy(model))
    h1 = plain[1](plain[0](X)).detach().requires_grad_()
    h2 = plain[3](plain[2](h1))
    h2.retain_grad()
    loss_of(plain[4](h2)).backward()
    back = {"4": e @ B["4"]}
    delta = back["4"] * (1 - h2.detach() ** 2)
    back["2"] = e @ B["2"] if rule == "dfa" else delta @ B["2"]
    for name, exact in (("4", h2.grad), ("2", h1.grad)):
        cosine = float((back[name] * exact).sum() / back[name].norm() / exact.norm())
        assert report[name].backprop == pytest.approx(cosine, abs=1e-12)


@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
def test_mixes_blocks_and_statuses():
    model = made(mlp, "dfa", layers={"2": "fa", "4": "bp"})
    assert statuses(rewire.verify(model, X, loss_of)) == {"0": "first layer", "2": "live", "4": "on backprop"}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 6)
            self.block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
            self.unused = nn.Linear(6, 6)
            self.side = nn.Linear(6, 6)
            self.last = nn.Linear(6, 4)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            self.kept = self.side(h)  # runs; the loss does not see it
            return self.last(torch.tanh(self.block(h)))

    model = made(Net, "dfa", blocks=["block"])
    result = rewire.verify(model, X, loss_of)
    assert result.ok, str(result)
    wanted = {"first": "first layer", "block": "live", "unused": "not run", "side": "not run", "last": "live"}
    assert statuses(result) == wanted
    for _ in range(2):
        loss_of(model(X)).backward()
    assert statuses(rewire.verify(model, X, loss_of)) == wanted  # the model keeps a tensor with a graph now


@pytest.mark.parametrize("rule", RULES)
def test_several_outputs(rule):
    model = made(TwoHeads, rule)

    def loss(out):
        return F.cross_entropy(out["one"], Y) + F.cross_entropy(out["two"], Y % 3)

    if rule == "drtp":
        rewire.convert(model, rule, layers={"two": "dfa", "middle": "fa"})
    result = rewire.verify(model, X, loss)
    assert result.ok, str(result)
    alone = rewire.verify(model, {"x": X}, lambda out: loss_of(out["one"]))
    assert alone.ok, str(alone)
    assert statuses(alone)["two"] == statuses(alone)["middle"] == "not run"


def test_drtp_with_targets():
    model = made(mlp, "drtp")

    def squared(out):
        return (out - F.one_hot(Y, 4)).square().sum()

    with pytest.raises(rewire.PassError, match="drtp"):
        rewire.verify(model, X, squared)
    with rewire.targets(Y):
        assert rewire.verify(model, X, squared).ok


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_loss_inside_and_dict_inputs(rule):
    result = rewire.verify(made(LossInside, rule), {"x": X, "labels": Y}, lambda out: out["loss"])
    assert result.ok and "live" in statuses(result).values(), str(result)
    assert rewire.verify(made(LossInside, rule), (X, Y), lambda out: out["loss"]).ok


def test_tied_weights_are_checked_as_a_sum():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 6)
            self.mix = nn.Linear(6, 6)
            self.last = nn.Linear(6, 9, bias=False)
            self.last.weight = self.table.weight

        def forward(self, ids):
            return self.last(torch.tanh(self.mix(self.table(ids))))

    ids = torch.randint(9, (4, 3), generator=torch.Generator().manual_seed(0))
    for rule in ("fa", "dfa"):
        result = rewire.verify(made(Tied, rule), ids, lambda out: F.cross_entropy(out.flatten(0, 1), ids.flatten()))
        assert result.ok and statuses(result) == {"mix": "live", "last": "live"}, str(result)
        assert all(layer.weight_exact for layer in result.layers)


def test_old_style_norms_and_penalties_on_weights():
    def build():
        model = mlp()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(model[2])
            nn.utils.spectral_norm(model[4])
        return model

    for rule in ("fa", "dfa"):
        model = made(build, rule)

        def loss(out, model=model):
            return loss_of(out) + sum(p.square().sum() for p in model.parameters())

        loss(model(X)).backward()
        result = rewire.verify(model, X, loss_of)
        assert result.ok, str(result)


def test_a_penalty_on_weights_is_no_use_of_them():
    class Penalised(LossInside):
        def forward(self, x, labels):
            out = super().forward(x, labels)
            out["loss"] = out["loss"] + 0.1 * sum(p.square().sum() for p in self.net.parameters())
            return out

    for rule in ("fa", "dfa"):
        result = rewire.verify(made(Penalised, rule), (X, Y), lambda out: out["loss"])
        assert result.ok, str(result)


def test_users_hooks_are_outside():
    for rule in ("fa", "dfa"):
        model = made(mlp, rule)
        model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model[2].register_forward_hook(lambda module, args, out: out.relu())
        result = rewire.verify(model, X, loss_of)
        assert result.ok and statuses(result)["2"] == "live", str(result)


def test_checkpointing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = mlp(), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))

    for rule in ("fa", "dfa"):
        result = rewire.verify(made(Net, rule), X, loss_of)
        assert result.ok and statuses(result)["body.4"] == "live", str(result)


def test_layers_that_are_not_converted_are_listed():
    body = made(mlp, "dfa")
    model = nn.Sequential(body, nn.Tanh(), nn.Linear(4, 4).double())
    result = rewire.verify(model, X, loss_of)
    assert result.ok and statuses(result) == {"0.0": "first layer", "0.2": "live", "0.4": "live", "2": "on backprop"}
    assert result.layers[-1].note == "not converted"


def test_two_conversions_in_one_model():
    head = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)), "fa")
    result = rewire.verify(nn.Sequential(made(mlp, "dfa"), nn.Tanh(), head), X, loss_of)
    assert result.ok and list(statuses(result).values()) == ["first layer", *["live"] * 4], str(result)


def test_a_layer_whose_scale_is_not_known_is_not_ok():
    result = rewire.verify(made(mlp, "dfa"), X, lambda out: out.sum() * 0)
    assert not result.ok and "scale" in str(result)


def test_an_output_error_of_zero_is_said():
    result = rewire.verify(made(mlp, "dfa", scale=0.3), X, lambda out: out.sum() * 0)
    assert {layer.note for layer in result.layers if layer.status == "live"} == {"zeros, as the rule says"}


def test_unrouted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mid, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            five = torch.tanh(self.mid(h[:5]))
            return self.last(h @ (five.T @ five))

    result = rewire.verify(made(Net), X, loss_of)
    assert not result.ok
    assert statuses(result) == {"first": "not run", "mid": "unrouted", "last": "not run"}


def test_not_converted():
    with pytest.raises(rewire.ConversionError, match="not converted"):
        rewire.verify(mlp(), X.float(), loss_of)


# -- no trace ------------------------------------------------------------------------------------------


def snapshot(model):
    states = {id(s): s for m in model.modules() if (s := m.__dict__.get("_rewire")) is not None}
    return {
        "grads": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "params": {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        "training": [m.training for m in model.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m.__dict__)) for m in model.modules()],
        "states": {
            k: (s.role, s.scale, s.scale_note, s.ran, s.settled, s.votes, s.draws, s.rule, s.observer, s.functional)
            for k, s in states.items()
        },
        "wiring": [
            (list(s.wiring.outputs), s.wiring.unsettled, set(s.wiring._warned), list(s.wiring.errors))
            for s in states.values()
        ],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "feedback": rewire.feedback(model),
        "filters": list(warnings.filters),
        "grad mode": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rule", ["brsf", "dfa", "fa"])
@pytest.mark.parametrize("build", ["cnn", "parametrized", "Reused"])
def test_no_trace(build, rule, trained):
    model = made(BUILDS[build], rule)
    model[3].eval() if build == "cnn" else None
    twin = copy.deepcopy(model)
    if trained:
        for m in (model, twin):
            torch.manual_seed(3)
            for _ in range(2):
                loss_of(m(X)).backward()
    before = snapshot(model)
    assert rewire.verify(model, X, loss_of).ok
    after = snapshot(model)
    for what in before:
        assert same(before[what], after[what]), what
    with torch.no_grad():
        assert rewire.verify(model, X, loss_of).ok
    torch.manual_seed(4)
    for m in (model, twin):  # and trains on as if nothing had been
        torch.manual_seed(5)
        for _ in range(2):
            loss_of(m(X)).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


def test_no_trace_when_the_model_raises():
    model = made(cnn)
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        rewire.verify(model, X[:, :4], loss_of)
    assert same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
def test_python_and_numpy_randomness_is_the_same_in_all_passes():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(6))
            self.last = nn.Linear(5, 4)

        def forward(self, x):
            for layer in self.layers:
                if random.random() > 0.3:
                    x = x + float(np.random.rand()) * torch.tanh(layer(x))
            return self.last(x)

    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)
        for rule in ("fa", "dfa"):
            result = rewire.verify(made(Drops, rule), X, loss_of)
            assert result.ok, str(result)


def test_the_table():
    text = str(rewire.verify(made(mlp), X, loss_of))
    assert "ok" in text and "2 live, 1 first layer" in text and "1.000" in text


def test_a_head_without_an_error_in_this_pass():
    """As a detector's, on levels where no box lies: nothing to measure a scale by, and nothing wrong."""

    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(5, 6)
            self.one, self.two = (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2))

        def forward(self, x):
            h = torch.tanh(self.stem(x))
            return self.one(h), self.two(h)

    model = made(Levels)
    both = [lambda out: loss_of(out[0]) + 0 * loss_of(out[1]), lambda out: loss_of(out[0]) + loss_of(out[1])]
    for _ in range(2):
        both[0](model(X)).backward()
    result = rewire.verify(model, X, both[0])
    assert result.ok, str(result)
    status = {layer.name: layer.status for layer in result.layers}
    assert status == {
        "stem": "first layer",
        **{"one.0": "live", "one.2": "live"},
        **{"two.0": "not run", "two.2": "not run"},
    }
    result = rewire.verify(model, X, both[1])  # its copy measures when there is an error
    assert result.ok and all(layer.status in ("live", "first layer") for layer in result.layers), str(result)


class Teacher(nn.Module):
    """A frozen head on a trunk that trains, run without gradients."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.target = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False)

    def forward(self, x):
        h = torch.relu(self.trunk(x))
        with torch.no_grad():
            t = self.target(h)
        return (self.head(h) - t).square().mean()


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_layers_that_run_without_gradients(rule):
    torch.manual_seed(0)
    model, x = rewire.convert(Teacher(), rule), torch.randn(4, 5)
    for _ in range(2):
        model(x).backward()
    assert rewire.verify(model, x, lambda loss: loss).ok
    rewire.alignment(model, x, lambda loss: loss, null=3)


@pytest.mark.parametrize("options", [{}, {"scale": 0.1}])
@pytest.mark.parametrize("between", [(), (nn.ReLU(),)], ids=["one after another", "relu"])
def test_walls_right_behind_a_layer(between, options):
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(6, 6), *between)]
    model = rewire.convert(nn.Sequential(*layers, nn.Linear(6, 3)), "dfa", skip="cut", **options)
    x = torch.randn(4, 6)
    for _ in range(2):
        model(x).square().sum().backward()
    verified = rewire.verify(model, x, lambda out: out.square().sum())
    assert verified.ok, str(verified)


class Reordered(nn.Module):
    """Tokens one by one; those in the middle in another order."""

    def __init__(self, there, back):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.there, self.back = there, back

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(self.back(torch.tanh(self.inner(self.there(h)))))


def attended(h):
    """What most tokens say is mixed; the first two are heard by one other token each."""
    weights = 0.2 + torch.rand(7, 7, generator=torch.Generator().manual_seed(0)).to(h)
    weights[:, :2] = 0
    weights[3, 0] = weights[5, 1] = 1
    return weights @ h


def told_one(h):
    weights = torch.zeros(7, 7).to(h)
    weights[0] = 1
    return weights @ h


ORDERS = {
    "as it was": (lambda h: h, lambda h: h, True),
    "flipped": (lambda h: h.flip(1), lambda h: h.flip(1), False),
    "rolled": (lambda h: h.roll(2, 1), lambda h: h.roll(-2, 1), False),
    "picked": (lambda h: h[:, [2, 0, 1, 6, 5, 3, 4]], lambda h: h[:, [1, 2, 0, 5, 6, 4, 3]], False),
    "attended to": (lambda h: h, attended, True),
    "another sequence, of which one position hears all": (lambda h: h, told_one, True),
}


@pytest.mark.parametrize("there, back, ok", ORDERS.values(), ids=ORDERS.keys())
def test_positions_that_get_the_errors_of_others(there, back, ok):
    model = made(lambda: Reordered(there, back))
    result = rewire.verify(model, torch.randn(3, 7, 5, dtype=torch.float64), lambda out: out.square().mean())
    assert result.ok == ok
    assert [layer.name for layer in result.layers if layer.status == "wrong"] == ([] if ok else ["inner"])


@pytest.mark.parametrize("rule", ["bp", "fa", "dfa", "shallow"])
@pytest.mark.parametrize("inplace", [False, True])
def test_derivatives_of_somebody_elses(rule, inplace):
    layers = (nn.Linear(5, 7), nn.ReLU(inplace), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    model = rewire.convert(
        nn.Sequential(*layers), rule, derivative={nn.ReLU: torch.sigmoid, nn.Tanh: lambda a: (a.abs() < 1).to(a)}
    )
    x = torch.randn(4, 5)
    for _ in range(2):
        result = rewire.verify(model, x, lambda out: out.square().sum())
        assert result.ok, str(result)
        model(x).square().sum().backward()


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feedback_that_has_learned_the_weight(ridge, dtype):
    """It hands back what backprop does, and is not called wrong for that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)).to(dtype)
    rewire.convert(model, f"fitted(ridge={ridge})")
    x, labels = torch.randn(64, 8, dtype=dtype), torch.randint(10, (64,))

    def loss_of(out):
        return nn.functional.cross_entropy(out, labels)

    for _ in range(2):
        loss_of(model(x)).backward()
    result = rewire.verify(model, x, loss_of)
    assert result.ok, str(result)


class Remembered(LearnedLocal):
    """Feedback that is a buffer, of float32 at least whatever the weight is."""

    trained = ()

    def start(self, form, scale, draw):
        return {"B": draw.normal("B", form.shape) * scale}

    def feedback(self, kept, form):
        return kept["B"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["wm", "wm(every=0)", "kp", "ldfa", "pfa", Remembered()], ids=str)
def test_feedback_in_wider_numbers_than_the_weight(rule, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    rewire.convert(model, rule)
    x, labels = torch.randn(16, 7).to(dtype), torch.randint(4, (16,))

    def loss_of(out):
        return nn.functional.cross_entropy(out.float(), labels)

    loss_of(model(x)).backward()
    result = rewire.verify(model, x, loss_of)
    assert result.ok, str(result)


class Scaled(nn.Linear):
    """Its weight is divided by what a norm of its own has seen, as in training for quantisation."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.BatchNorm1d(sizes[1])

    def forward(self, x):
        spread = (self.norm.running_var + 1e-5).sqrt()
        return self.norm(nn.functional.linear(x, self.weight / spread[:, None], self.bias)) * spread


@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
def test_layers_with_batch_statistics_of_their_own(rule):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(6, 8), nn.Tanh(), Scaled(8, 8), nn.Tanh(), nn.Linear(8, 3))
    rewire.convert(model, rule)
    x = torch.randn(16, 6)
    for _ in range(2):
        model(x).square().sum().backward()
    result = rewire.verify(model, x, lambda out: out.square().sum())
    assert result.ok, str(result)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_pass_that_is_not_finite(rule):
    model = rewire.convert(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), rule, scale=0.1)
    x = torch.randn(5, 4)
    x[0, 0] = float("nan")
    result = rewire.verify(model, x, lambda out: out.square().sum())
    assert not result.ok
    assert [layer.status for layer in result.layers] == ["not run"] * 2
    assert len(result.problems) == 1 and "not finite" in result.problems[0]


class TwoLevels(nn.Module):
    """Fed with one tensor; the loss looks at the first."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.one = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
        self.two = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        return self.one(h), self.two(h)


@pytest.mark.parametrize("skip", ["keep", "cut"])
def test_a_head_without_an_error_beside_one_with(skip):
    """SSD's heads on levels where no box has matched yet."""
    model, x = rewire.convert(TwoLevels(), "dfa", skip=skip), torch.randn(5, 6)

    def loss_of(out):
        return out[0].square().sum() + 0 * out[1].square().sum()

    for _ in range(3):
        loss_of(model(x)).backward()
    result = rewire.verify(model, x, loss_of)
    assert result.ok, str(result)
    assert {layer.name: layer.status for layer in result.layers}["two.0"] == "not run"


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("rule", ["bp", "fa", "dfa", "fitted", "kp"])
def test_nothing_is_proved_by_an_empty_batch(rule, passes):
    model = rewire.convert(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), rule)
    x = torch.randn(4, 8)
    for _ in range(passes):
        model(x).square().sum().backward()
    found = rewire.verify(model, x[:0], lambda out: out.square().sum())
    assert not found.ok and "NOT ok" in str(found)
    assert any("nothing was proved" in problem and "empty" in problem for problem in found.problems)
    statuses = [layer.status for layer in found.layers]
    assert statuses == (["on backprop"] * 2 if rule == "bp" else ["first layer", "not run"])
    assert rewire.verify(model, x, lambda out: out.square().sum()).ok


def test_a_layer_without_rows_among_others_is_no_problem():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.other = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            h = self.stem(x).tanh()
            return torch.cat([self.one(h), self.other(h[:0])])

    found = rewire.verify(rewire.convert(Split(), "fa"), torch.randn(4, 8), lambda out: out.square().sum())
    assert found.ok and not found.problems
    assert {layer.name: layer.note for layer in found.layers}["other"] == "its input is empty in this pass"
