"""``alignment``: its numbers against plain autograd and NumPy, and that it leaves no trace."""

import copy
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.diagnose import measure, trust
from rewire.diagnose.watch import layers_of

from .test_verify import (
    LossInside,
    Residual,
    Reused,
    TwoHeads,
    X,
    Y,
    cnn,
    loss_of,
    made,
    mlp,
    own_forward,
    parametrized,
    same,
    snapshot,
)

CLOSE = dict(abs=2e-5)  # degrees


def degrees(a, b):
    """Between two arrays as vectors."""
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return math.degrees(math.acos(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)))


def train(model, x=X, loss=loss_of, steps=4, lr=0.2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)).backward()
        optimizer.step()
    model.zero_grad()
    return model


def by_name(result):
    return {layer.name: layer for layer in result.layers}


# -- written out ---------------------------------------------------------------------------------------------


def numpy_mlp(model, rule):
    """Gradients of the weights and of the inputs of the three layers of ``mlp``: {name: (dW, dx)}."""
    Ws = {n: model.get_submodule(n).weight.detach().numpy() for n in "024"}
    bs = {n: model.get_submodule(n).bias.detach().numpy() for n in "024"}
    B = {n: b.numpy() for n, b in rewire.feedback(model).items()} if rule != "bp" else {}
    x0 = X.numpy()
    x2 = np.tanh(x0 @ Ws["0"].T + bs["0"])
    x4 = np.tanh(x2 @ Ws["2"].T + bs["2"])
    y = x4 @ Ws["4"].T + bs["4"]
    p = np.exp(y - y.max(1, keepdims=True))
    e = p / p.sum(1, keepdims=True)
    e[np.arange(len(Y)), Y.numpy()] -= 1
    e /= len(Y)

    def back(name, delta):
        if rule == "bp":
            return delta @ Ws[name]
        return delta @ B[name] if rule == "fa" else e @ B[name]

    found, delta = {}, e
    for name, x in (("4", x4), ("2", x2), ("0", x0)):
        dx = back(name, delta) if name != "0" else None
        found[name] = (delta.T @ x, dx)
        delta = None if dx is None else dx * (1 - x**2)
    return found, {"0": x0 @ Ws["0"].T + bs["0"], "2": x2 @ Ws["2"].T + bs["2"], "4": y}


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_the_numbers_of_an_mlp_are_those_of_numpy(rule):
    model = train(made(mlp, rule))
    result = rewire.alignment(model, X, loss_of)
    ours, outputs = numpy_mlp(model, rule)
    plain, _ = numpy_mlp(model, "bp")
    B = rewire.feedback(model)

    for name, layer in by_name(result).items():
        assert layer.weight_angle == pytest.approx(degrees(ours[name][0], plain[name][0]), **CLOSE)
        assert layer.norm == pytest.approx(np.linalg.norm(ours[name][0]), rel=1e-9)
        assert layer.backprop_norm == pytest.approx(np.linalg.norm(plain[name][0]), rel=1e-9)
        assert layer.activation_norm == pytest.approx(np.sqrt(np.mean(outputs[name] ** 2)), rel=1e-6)
        assert layer.weight_norm == pytest.approx(float(model.get_submodule(name).weight.detach().norm()), rel=1e-9)
        if name == "0":
            assert layer.input_angle is None
        else:
            assert layer.input_angle == pytest.approx(degrees(ours[name][1], plain[name][1]), **CLOSE)
        if rule == "fa":
            W = model.get_submodule(name).weight.detach()
            assert layer.feedback_angle == pytest.approx(degrees(W, B[name]), **CLOSE)
            assert layer.feedback_ratio == pytest.approx(float(B[name].norm() / W.norm()), rel=1e-9)
        else:
            assert layer.feedback_angle is layer.feedback_ratio is None
    cosines = [math.cos(math.radians(degrees(ours[n][0], plain[n][0]))) for n in "02"]
    assert result.gamma == pytest.approx(sum(cosines) / 2, rel=1e-6)
    assert degrees(ours["2"][0], plain["2"][0]) > 1


def small_cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        *(nn.Conv1d(1, 3, 3, padding=1), nn.Tanh()),
        *(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4)),
    )


def written_out(model, rule):
    """One layer at a time, with each operation's plain derivative: {layer: (dW, dx)}."""
    B = rewire.feedback(model) if rule != "bp" else {}
    steps, h = [], X
    for name, module in model.named_children():
        x = h.detach().requires_grad_()
        W = module.weight.detach().clone().requires_grad_() if hasattr(module, "weight") else None
        h = plain_call(module, x, W)
        steps.append((name, module, x, W, h))
    y = h.detach().requires_grad_()
    (e,) = torch.autograd.grad(loss_of(y), y)
    delta, found = e, {}
    for name, module, x, W, h in reversed(steps):
        if W is None:
            (delta,) = torch.autograd.grad(h, x, delta)
            continue
        dW, exact = torch.autograd.grad(h, (W, x), delta)
        if rule == "fa":
            (dx,) = torch.autograd.grad(plain_call(module, x, B[name]), x, delta)
        else:
            dx = exact if rule == "bp" or name not in B else (e @ B[name].flatten(1)).reshape(x.shape)
        found[name] = dW, dx
        delta = dx
    return found


def plain_call(module, x, W):
    if isinstance(module, nn.Linear):
        return F.linear(x, W, module.bias)
    if isinstance(module, nn.Conv1d):
        return F.conv1d(x, W, module.bias, padding=module.padding)
    return module(x)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_the_numbers_of_a_cnn_are_those_of_its_operations(rule):
    model = train(made(small_cnn, rule))
    result = rewire.alignment(model, X, loss_of, null=0)
    ours, plain = written_out(model, rule), written_out(model, "bp")
    assert list(by_name(result)) == ["1", "3", "6", "8"]
    for name, layer in by_name(result).items():
        assert layer.weight_angle == pytest.approx(degrees(ours[name][0], plain[name][0]), **CLOSE)
        if name != "1":
            assert layer.input_angle == pytest.approx(degrees(ours[name][1], plain[name][1]), **CLOSE)
    assert [layer.counted for layer in result.layers] == [True, True, True, False]
    assert all(layer.weight_angle > 1 for layer in result.layers if layer.counted)


# -- two copies and plain autograd ------------------------------------------------------------------------------


def two_copies(model, inputs, loss, seed):
    """.grad of the converted model and of a restored copy, after ``.backward()`` on each."""
    found = []
    for plain in (False, True):
        one = copy.deepcopy(model)
        if plain:
            rewire.restore(one)
        one.zero_grad()
        torch.manual_seed(seed)
        out = one(**inputs) if isinstance(inputs, dict) else one(*inputs) if isinstance(inputs, tuple) else one(inputs)
        loss(out).backward()
        found.append({n: p.grad.numpy() for n, p in one.named_parameters() if p.grad is not None})
    return found


def frozen():
    model = mlp()
    model[2].requires_grad_(False)
    return model


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = self.inward(x.unsqueeze(1) * torch.arange(1, 4, dtype=x.dtype).view(1, 3, 1))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h.mean(1))


def heads_loss(out):
    return loss_of(out["one"]) + out["two"].square().mean()


MODELS = {
    "cnn with dropout and batch norm": (cnn, X, loss_of, {}),
    "used three times": (Reused, X, loss_of, {}),
    "residual": (Residual, X, loss_of, {}),
    "two heads": (TwoHeads, X, heads_loss, {}),
    "loss inside": (LossInside, {"x": X, "labels": Y}, lambda out: out["loss"], {}),
    "forward of its own": (own_forward, X, loss_of, {}),
    "parametrized": (parametrized, X, loss_of, {}),
    "frozen": (frozen, X, loss_of, {}),
    "attention": (Attention, X, loss_of, {}),
    "skip cut": (Residual, X, loss_of, {"skip": "cut"}),
    "head on bp": (mlp, X, loss_of, {"layers": {"4": "bp"}}),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("rule", ["fa", "dfa", "frsf"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_angles_and_norms_are_those_of_two_copies(kind, rule, mode):
    build, inputs, loss, options = MODELS[kind]
    if options.get("skip") == "cut" and rule != "dfa":
        pytest.skip("direct rules only")
    model = train(made(build, rule, **options), inputs, loss)
    model.train(mode == "train")
    torch.manual_seed(7)
    result = rewire.alignment(model, inputs, loss, null=2)
    ours, plain = two_copies(model, inputs, loss, seed=7)

    checked = 0
    for name, layer in by_name(result).items():
        at = f"{name}.weight" if f"{name}.weight" in ours else f"{name}_weight"  # an attention's in_proj_weight
        if at not in ours:
            continue
        checked += 1
        assert layer.weight_angle == pytest.approx(degrees(ours[at], plain[at]), **CLOSE), name
        assert layer.norm == pytest.approx(np.linalg.norm(ours[at]), rel=1e-9)
        assert layer.backprop_norm == pytest.approx(np.linalg.norm(plain[at]), rel=1e-9)
    assert checked >= 2 - (kind == "parametrized")
    assert any(layer.counted and layer.weight_angle > 0.1 for layer in result.layers)


@pytest.mark.parametrize("steps", [0, 4])
def test_feedback_that_is_redrawn_is_that_of_the_next_training_step(steps):
    model = train(made(mlp, "brsf"), steps=steps)
    result = by_name(rewire.alignment(model, X, loss_of, null=2))
    ours, plain = two_copies(model, X, loss_of, 0)
    for name in "02":
        assert result[name].weight_angle == pytest.approx(
            degrees(ours[f"{name}.weight"], plain[f"{name}.weight"]), **CLOSE
        )


def test_the_angle_at_the_input_is_of_the_whole_gradient():
    """Residual: three users of h, of which two hand back a rule's feedback."""
    model = train(made(Residual, "dfa"))
    result = rewire.alignment(model, X, loss_of, null=0)

    found = []
    for plain in (False, True):
        one = copy.deepcopy(model)
        if plain:
            rewire.restore(one)
        h = torch.tanh(one.first(X)).detach().requires_grad_()
        loss_of(one.last(h + torch.tanh(one.a(h)) + torch.tanh(one.b(h)))).backward()
        found.append(h.grad.numpy())
    angle = degrees(*found)
    layers = by_name(result)
    assert angle > 1
    assert layers["a"].input_angle == pytest.approx(angle, **CLOSE)
    assert layers["b"].input_angle == pytest.approx(angle, **CLOSE)


def test_a_wall_s_whole_gradient_is_the_feedback():
    model = train(made(Residual, "dfa", skip="cut"))
    result = rewire.alignment(model, X, loss_of, null=0)
    one = rewire.restore(copy.deepcopy(model))
    h = torch.tanh(one.first(X)).detach().requires_grad_()
    y = one.last(h + torch.tanh(one.a(h)) + torch.tanh(one.b(h)))
    y.retain_grad()
    loss_of(y).backward()
    B = rewire.feedback(model)
    fed = y.grad @ (B["a"] + B["b"])
    assert by_name(result)["a"].input_angle == pytest.approx(degrees(fed, h.grad), **CLOSE)


def test_surrogate_derivatives_are_not_backprop_s():
    model = made(mlp, "fa", derivative={nn.Tanh: lambda a: (a.abs() < 1).to(a.dtype)})
    train(model)
    result = rewire.alignment(model, X, loss_of, null=0)
    ours, plain = two_copies(model, X, loss_of, 0)
    assert by_name(result)["0"].weight_angle == pytest.approx(degrees(ours["0.weight"], plain["0.weight"]), **CLOSE)
    assert type(model[1]) is not nn.Tanh


def test_a_block_s_weights_are_one_vector():
    def build():
        return nn.Sequential(nn.Linear(5, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 4))

    model = train(made(build, "dfa", blocks=["1"]))
    result = rewire.alignment(model, X, loss_of, null=0)
    ours, plain = two_copies(model, X, loss_of, 0)
    assert by_name(result)["1"].weight_angle == pytest.approx(degrees(ours["1.1.weight"], plain["1.1.weight"]), **CLOSE)


def test_autocast():
    model = rewire.convert(mlp().float(), "dfa")
    x = X.float()

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    with autocast():
        train(model, x)
        result = rewire.alignment(model, x, loss_of, null=2)
        ours, plain = two_copies(model, x, loss_of, 0)
    for name in "02":
        angle = degrees(ours[f"{name}.weight"], plain[f"{name}.weight"])
        assert by_name(result)[name].weight_angle == pytest.approx(angle, abs=1e-3)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers_and_torchvision(rule):
    transformers = pytest.importorskip("transformers")
    torchvision = pytest.importorskip("torchvision")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(config).double().eval()
    batch = {"input_ids": torch.randint(30, (4, 6)), "labels": torch.tensor([0, 1, 1, 0])}
    net = torchvision.models.mobilenet_v3_small(num_classes=3).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for model, inputs, loss in (
        (bert, batch, lambda out: out.loss),
        (net, images, lambda out: F.cross_entropy(out, torch.tensor([0, 1, 2, 1]))),
    ):
        rewire.convert(model, rule)
        train(model, inputs, loss, steps=3, lr=0.01)
        torch.manual_seed(3)
        result = rewire.alignment(model, inputs, loss, null=1)
        ours, plain = two_copies(model, inputs, loss, 3)
        for layer in result.layers:
            at = f"{layer.name}.weight"
            if layer.weight_angle is not None:
                assert layer.weight_angle == pytest.approx(degrees(ours[at], plain[at]), abs=1e-4), layer.name
        counted = [layer for layer in result.layers if layer.counted]
        assert len(counted) > len(result.layers) / 2
        json.dumps(result.record(), allow_nan=False)


# -- what fresh feedback makes of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_the_null_is_the_rule_under_other_seeds(rule):
    model = train(made(mlp, rule, seed=5))
    result = rewire.alignment(model, X, loss_of, null=4)
    scale = {name: s for name, s in rewire.scales(model).items()}
    angles = {"0": [], "2": []}
    for number in range(4):
        other = rewire.convert(copy.deepcopy(model), rule, seed=measure._seed(5, number), scale=scale)
        loss_of(other(X)).backward()  # finds the output layer
        ours, plain = two_copies(other, X, loss_of, 0)
        for name, found in angles.items():
            found.append(degrees(ours[f"{name}.weight"], plain[f"{name}.weight"]))
    for name, found in angles.items():
        layer = by_name(result)[name]
        assert layer.null_angle == pytest.approx(np.mean(found), **CLOSE)
        assert layer.null_spread == pytest.approx(np.std(found, ddof=1), **CLOSE)


def test_the_null_depends_on_the_conversion_s_seed_alone():
    model = train(made(mlp, "dfa", seed=1))
    torch.manual_seed(0)
    first = rewire.alignment(model, X, loss_of, null=3).record()
    torch.manual_seed(1)
    np.random.seed(1)
    assert rewire.alignment(model, X, loss_of, null=3).record() == first
    # Other draws for another seed, of the very same weights.
    model[0].__dict__["_rewire"].wiring.seed = 2
    assert rewire.alignment(model, X, loss_of, null=3).layers[0].null_angle != first["layers"]["0"]["null_angle"]


@pytest.mark.parametrize("rule", ["usf", "frsf", "brsf"])
def test_rules_that_read_the_weight_are_compared_with_feedback_that_does_not(rule):
    torch.manual_seed(0)
    model = rewire.convert(
        nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)), rule
    )
    x, y = torch.randn(40, 20), torch.randint(5, (40,))
    result = rewire.alignment(model, x, lambda out: F.cross_entropy(out, y))
    for layer in result.layers[:2]:
        assert layer.weight_angle < 70
        assert 75 < layer.null_angle < 105
    assert result.ok, str(result)


# -- what is not measurable ---------------------------------------------------------------------------------------


def test_backprop_has_no_gamma():
    result = rewire.alignment(train(made(mlp, "bp")), X, loss_of)
    assert result.gamma is None
    assert result.ok
    assert [layer.weight_angle for layer in result.layers] == pytest.approx([0, 0, 0], abs=1e-5)
    assert not any(layer.counted for layer in result.layers)


def test_zeros_are_not_measurable():
    result = rewire.alignment(train(made(mlp, "shallow")), X, loss_of)
    assert result.gamma is None
    for layer in result.layers[:2]:
        assert layer.weight_angle is layer.null_angle is None
        assert "the rule's gradient is zero" in layer.note
        assert layer.norm == 0 and layer.backprop_norm > 0
    result = rewire.alignment(train(made(mlp, "dfa")), X, lambda out: (out * 0).sum())
    assert result.gamma is None
    assert all(layer.weight_angle is None and "backprop's gradient is zero" in layer.note for layer in result.layers)


class Spikes(nn.Module):
    def forward(self, a):
        return (a > 0).to(a.dtype)


@pytest.mark.parametrize("rule", ["bp", "fa", "dfa"])
def test_below_hard_thresholds_backprop_s_gradient_is_zero(rule):
    """Autograd gives the weights below none at all, where the rules have the surrogate's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), Spikes(), nn.Linear(9, 8), Spikes(), nn.Linear(8, 4))
    model = rewire.convert(net, rule, derivative={Spikes: lambda a: (1 - a.abs()).clamp(min=0)})
    x, y = torch.randn(6, 5), torch.randint(4, (6,))

    def loss(out):
        return F.cross_entropy(out, y)

    train(model, x, loss, steps=2)
    recorder = rewire.Recorder(model, loss, every=1, inputs=x)
    result = recorder.step()
    for name, layer in by_name(result).items():
        if name == "4":
            assert layer.weight_angle == pytest.approx(0, **CLOSE)
        else:
            assert "not measurable: backprop's gradient is zero" in layer.note
            assert layer.weight_angle is layer.null_angle is layer.rounding_angle is None
            assert layer.norm > 0 and layer.backprop_norm == 0
    assert result.gamma is None and result.ok


def test_frozen_layers_have_no_weight_angle_but_one_at_the_input():
    result = by_name(rewire.alignment(train(made(frozen, "dfa")), X, loss_of))
    assert result["2"].weight_angle is result["2"].norm is None
    assert result["2"].note == "frozen"
    assert result["2"].input_angle > 1
    assert result["0"].counted and not result["2"].counted


def test_layers_that_do_not_run_are_said():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = mlp(), nn.Linear(5, 5)

        def forward(self, x):
            return self.net(x)

    model = train(made(Spare, "dfa"))
    layer = by_name(rewire.alignment(model, X, loss_of))["spare"]
    assert layer.note == "did not run in this pass"
    assert layer.weight_angle is layer.input_angle is layer.activation_norm is None
    assert not layer.counted


@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
def test_gradients_that_are_not_finite():
    model = train(made(mlp, "dfa"))
    result = rewire.alignment(model, X, lambda out: loss_of(out) * math.inf)
    assert result.gamma is None
    assert any("not finite" in flag for flag in result.flags)
    assert all(layer.weight_angle is None for layer in result.layers)
    json.dumps(result.record(), allow_nan=False)

    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    result = rewire.alignment(model, X, loss_of)
    assert any(flag.startswith("activations are not finite: 0") for flag in result.flags)
    json.dumps(result.record(), allow_nan=False)


def test_the_output_layer_is_exact_and_left_out():
    result = rewire.alignment(train(made(mlp, "dfa")), X, loss_of)
    last = result.layers[-1]
    assert last.output and not last.counted
    assert last.weight_angle == pytest.approx(0, abs=1e-5)
    assert "not in Γ" in last.note
    assert result.gamma < 0.99


def test_layers_that_no_feedback_lies_above_are_left_out():
    model = train(made(mlp, "dfa", layers={"2": "bp", "4": "bp"}))
    result = rewire.alignment(model, X, loss_of)
    assert result.gamma is None
    assert "no feedback above it" in result.layers[1].note


def test_shared_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inward, self.a, self.b, self.head = (nn.Linear(5, 5) for _ in range(4))
            self.b.weight = self.a.weight

        def forward(self, x):
            for layer in (self.inward, self.a, self.b):
                x = torch.tanh(layer(x))
            return self.head(x)

    model = train(made(Tied, "dfa"))
    result = rewire.alignment(model, X, loss_of)
    assert [layer.counted for layer in result.layers] == [True, True, False, False], str(result)
    assert result.layers[1].weight_angle == result.layers[2].weight_angle
    assert "shares its weight with 'a'" in result.layers[2].note


def test_what_a_rule_has_learned_is_no_part_of_the_model():
    model = train(made(mlp, "fa"))
    plain = rewire.alignment(model, X, loss_of).record()
    model[2].register_parameter("rewire_feedback", nn.Parameter(torch.randn(6, 7, dtype=torch.float64)))
    model[2].register_buffer("rewire_steps", torch.zeros(()))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    assert rewire.alignment(model, X, loss_of).record() == plain
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())


# -- no trace -----------------------------------------------------------------------------------------------------


class Temperature(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, out):
        return loss_of(out / self.t)


@pytest.mark.parametrize("rule", ["fa", "brsf", "dfa"])
@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("build", [mlp, cnn, Residual])
def test_no_trace(build, rule, trained):
    model = made(build, rule)
    for _ in range(trained):
        loss_of(model(X)).backward()
    x = X.clone().requires_grad_()
    criterion = Temperature()
    criterion(torch.zeros(6, 4, dtype=torch.float64)).backward()
    criterion.t.grad.fill_(3.0)
    draws = {name: layer.state.draws for name, layer in layers_of(model).items()}
    starts = {name: layer.state.start for name, layer in layers_of(model).items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    before = snapshot(model)
    with torch.no_grad():
        rewire.alignment(model, x, criterion)
    assert same(before, snapshot(model))
    assert draws == {name: layer.state.draws for name, layer in layers_of(model).items()}
    assert starts == {name: layer.state.start for name, layer in layers_of(model).items()}
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert x.grad is None
    assert float(criterion.t.grad) == 3.0


def test_training_goes_on_as_if_nobody_had_looked():
    def run(look):
        torch.manual_seed(0)
        random.seed(0)
        model = rewire.convert(cnn().double(), "brsf", layers={"9": "dfa"})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(6):
            if look:
                rewire.alignment(model, X, loss_of, null=3)
            optimizer.zero_grad()
            loss_of(model(X)).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), rewire.output_error(model)

    (a, e), (b, f) = run(False), run(True)
    assert torch.equal(a, b) and torch.equal(e, f)


def test_a_model_that_changes_its_input_in_place_is_measured_all_the_same():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.mul_(0.5))

    model, x = made(InPlace, "dfa"), X.clone()
    result = rewire.alignment(model, x, loss_of, null=2)
    assert torch.equal(x, X)
    assert result.layers[-1].weight_angle == pytest.approx(0, abs=1e-5)


# -- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fa", "dfa", "bp"])
def test_the_first_pass_notes_how_large_activations_are(rule):
    model = made(mlp, rule)
    assert rewire.alignment(model, X, loss_of, null=0).layers[1].growth is None
    with torch.no_grad():
        h, sizes = X, []
        for module in model:
            h = module(h)
            if isinstance(module, nn.Linear):
                sizes.append(float(h.square().mean().sqrt()))
    train(model, lr=2.0)
    starts = [layer.state.start for layer in layers_of(model).values()]
    assert starts == pytest.approx(sizes, rel=1e-6)

    result = rewire.alignment(model, X, loss_of, null=0)
    for layer, size in zip(result.layers, sizes, strict=True):
        assert layer.growth == pytest.approx(layer.activation_norm / size, rel=1e-6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [layer.state.start for layer in layers_of(other).values()] == starts


def test_a_baseline_takes_the_place_of_the_start():
    model = train(made(mlp, "dfa"))
    baseline = rewire.alignment(model, X, loss_of, null=0)
    train(model, lr=3.0)
    result = rewire.alignment(model, X, loss_of, null=0, baseline=baseline)
    for now, then in zip(result.layers, baseline.layers, strict=True):
        assert now.growth == pytest.approx(now.activation_norm / then.activation_norm)
    again = rewire.Alignment.from_record(json.loads(json.dumps(baseline.record())))
    assert again.layers == baseline.layers and again.flags == baseline.flags


# -- words and errors -------------------------------------------------------------------------------------------------


def test_the_table_and_the_record():
    result = rewire.alignment(train(made(mlp, "fa")), X, loss_of)
    text = str(result)
    assert f"Γ = {result.gamma:.3f}" in text
    assert f"{result.layers[0].weight_angle:.1f}°" in text
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert set(record) == {"gamma", "flags", "layers"}
    assert list(record["layers"]) == ["0", "2", "4"]
    angles = {"weight_angle", "input_angle", "feedback_angle", "null_angle"}
    norms = {"feedback_ratio", "activation_norm", "norm", "backprop_norm"}
    assert {"type", "rule", "note", *angles, *norms} <= set(record["layers"]["0"])


def test_wrong_arguments():
    model = made(mlp, "fa")
    with pytest.raises(rewire.ConversionError, match="is not converted"):
        rewire.alignment(mlp(), X, loss_of)
    with pytest.raises(rewire.ConversionError, match="not -1"):
        rewire.alignment(model, X, loss_of, null=-1)
    with pytest.raises(rewire.ConversionError, match="baseline"):
        rewire.alignment(model, X, loss_of, baseline={})
    with pytest.raises(rewire.ConversionError, match=r"nn\.Module"):
        rewire.alignment(lambda x: x, X, loss_of)


def test_mean_cosine():
    assert trust.mean_cosine([]) is None
    assert trust.mean_cosine([None, 60.0, 90.0]) == pytest.approx(0.25)


@pytest.mark.parametrize("rule", ["fitted(every=1)", "grape(anchor=1)"])
def test_rules_that_learn_are_measured_in_a_pass_of_their_own(rule):
    """Every training pass is an anchor here, whose gradients are backprop's."""
    torch.manual_seed(0)
    model = rewire.convert(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)), rule)
    x, y = torch.randn(12, 8), torch.randint(5, (12,))
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
    found = rewire.alignment(model, x, lambda out: F.cross_entropy(out, y))
    assert found.gamma is not None and found.layers[0].weight_angle > 0.01
