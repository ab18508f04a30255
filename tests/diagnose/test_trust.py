"""What ``alignment`` flags, and what it must not flag."""

import math
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.ablation import models
from rewire.diagnose import trust
from rewire.diagnose.alignment import LayerAlignment
from rewire.diagnose.watch import layers_of

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images / 16).float().unsqueeze(1)
LABELS = torch.tensor(DIGITS.target)
PROBE = slice(0, 256)


def probe_loss(out):
    return F.cross_entropy(out, LABELS[PROBE])


class Block(nn.Module):
    """Pre-norm, residual: what it adds has no bound, and what reads it is normalised."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h):
        return h + self.b(F.gelu(self.a(self.norm(h))))


def residual_mlp(width=64, depth=3):
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


def trained(build, rule, steps, lr, seed=0, noise=0.0):
    torch.manual_seed(seed)
    model = rewire.convert(build(), rule, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        batch = torch.randint(len(IMAGES), (32,))
        wrong = torch.rand(32) < noise
        labels = torch.where(wrong, torch.randint(10, (32,)), LABELS[batch])
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES[batch]), labels).backward()
        optimizer.step()
    return model


def measured(model, **options):
    return rewire.alignment(model, IMAGES[PROBE], probe_loss, **options)


# -- whole networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_healthy_mlp_is_not_flagged(rule, seed):
    result = measured(trained(lambda: models.mlp((1, 8, 8), 10), rule, 200, 2e-3, seed))
    assert result.ok, str(result)
    assert result.gamma > 0.35


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_healthy_lenet_is_not_flagged(rule, seed):
    result = measured(trained(lambda: models.lenet((1, 8, 8), 10), rule, 350, 2e-3, seed))
    assert result.ok, str(result)
    assert result.gamma > 0.15


def test_a_residual_mlp_that_ends_in_a_norm_is_not_flagged_while_it_is_well():
    result = measured(trained(residual_mlp, "dfa", 500, 1e-3))
    assert result.ok, str(result)


@pytest.mark.parametrize("seed", range(3))
def test_a_residual_mlp_that_ends_in_a_norm_and_blows_up_is_flagged(seed):
    """Labels that are partly noise keep the error from vanishing, as a harder task would."""
    result = measured(trained(residual_mlp, "dfa", 300, 2e-2, seed, noise=0.5))
    assert not result.ok
    said = [flag for flag in result.flags if flag.startswith("activations have blown up")]
    assert len(said) == 1 and ".b (×" in said[0], result.flags
    assert "NOT to be trusted" in str(result)


def test_the_same_network_under_backprop_is_not_flagged():
    result = measured(trained(residual_mlp, "bp", 300, 2e-3, noise=0.5))
    assert result.ok, str(result)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_before_training_everything_is_chance(rule):
    torch.manual_seed(0)
    result = measured(rewire.convert(models.mlp((1, 8, 8), 10), rule))
    assert [flag for flag in result.flags if flag.startswith("not distinguishable from chance: 1")], str(result)
    assert not [flag for flag in measured(rewire.convert(models.mlp((1, 8, 8), 10), rule), null=2).flags]


def test_a_network_far_gone_is_at_the_floor_even_if_nobody_saw_its_start():
    model = trained(residual_mlp, "dfa", 30, 1e-3)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(".b"):
                module.weight.mul_(1e6)
    for layer in layers_of(model).values():
        layer.state.start = None
    result = measured(model)
    assert result.flags[0].startswith("backprop's gradient is at the numeric floor"), str(result)
    at_floor = [layer for layer in result.layers if "numeric floor" in layer.note]
    assert {layer.name for layer in at_floor} >= {"2.b", "3.b", "4.b"}
    assert all(layer.weight_angle is None and not layer.counted for layer in at_floor)
    assert all(layer.backprop_norm > 0 for layer in at_floor)


def test_a_gradient_made_of_rounding_is_at_the_floor():
    """Errors of a hundredth, of outputs so large that their last place is worth as much."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    nn.init.constant_(net[4].bias, 1e5)
    model, x = rewire.convert(net, "fa"), torch.randn(32, 8)
    targets = (model(x) - 1e5).detach() + 0.01 * torch.randn(32, 3)

    def loss(out):
        return (out - 1e5 - targets).square().sum()

    result = rewire.alignment(model, x, loss)
    assert result.flags[0].startswith("backprop's gradient is at the numeric floor"), str(result)
    assert result.gamma is None
    assert all("when weights are rounded" in layer.note for layer in result.layers)
    exact = rewire.alignment(model.double(), x.double(), loss)
    assert not [flag for flag in exact.flags if "floor" in flag], str(exact)


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_the_scale_of_the_loss_makes_no_difference(scale):
    model = trained(lambda: models.mlp((1, 8, 8), 10), "fa", 150, 2e-3)
    plain = measured(model)
    scaled = rewire.alignment(model, IMAGES[PROBE], lambda out: probe_loss(out) * scale)
    assert scaled.ok, str(scaled)
    assert scaled.gamma == pytest.approx(plain.gamma, abs=1e-4)


# -- each check, on numbers ----------------------------------------------------------------------------------------


def layer(name, angle=50.0, **fields):
    plain = dict(
        weight_angle=angle,
        null_angle=90.0,
        null_spread=5.0,
        norm=1.0,
        backprop_norm=1.0,
        weight_norm=1.0,
        activation_norm=1.0,
        growth=2.0,
        rounding_angle=1e-4,
        dtype="float32",
        counted=True,
    )
    return LayerAlignment(name, "Linear", "dfa", **{**plain, **fields})


HEAD = layer("head", 0.0, null_angle=0.0, null_spread=0.0, output=True, counted=False)


def flags(*layers, draws=8):
    return trust.judge(layers, draws)[1]


def test_nothing_wrong():
    assert flags(layer("a"), layer("b"), HEAD) == []


@pytest.mark.parametrize(
    ("growth", "output", "flagged"),
    [(90, 1, False), (110, 1, True), (110, 15, False), (160, 15, True), (9_000, 2_000, False), (11_000, 2_000, True)],
)
def test_growth(growth, output, flagged):
    found = flags(layer("a", growth=float(growth)), layer("b"), replace(HEAD, growth=float(output)))
    assert bool(found) is flagged
    assert not found or (found[0].startswith("activations have blown up") and "a (×" in found[0])


def test_growth_where_outputs_started_at_zero_or_were_never_seen():
    for growth, flagged in ((900.0, False), (1100.0, True)):
        assert bool(flags(layer("a", growth=growth), layer("b"), replace(HEAD, growth=None))) is flagged
    assert flags(layer("a", growth=None), layer("b"), HEAD) == []
    assert flags(layer("a"), layer("b"), replace(HEAD, growth=1e9)) == []


@pytest.mark.parametrize(("size", "flagged"), [(2e-7, False), (1e-7, True)])
@pytest.mark.parametrize("weight", [1.0, 30.0])
def test_the_floor_is_relative_to_weights_and_to_the_largest(size, weight, flagged):
    layers, found = trust.judge([layer("a", backprop_norm=size * weight, weight_norm=weight), layer("b"), HEAD], 8)
    assert bool(found) is flagged
    assert (layers[0].weight_angle is None) is flagged
    assert layers[0].counted is not flagged
    assert not flagged or "numeric floor" in layers[0].note
    halves = [replace(x, dtype="bfloat16") for x in (layer("a", backprop_norm=size), layer("b"), HEAD)]
    assert bool(flags(*halves)) is flagged
    doubles = [replace(x, dtype="float64") for x in (layer("a", backprop_norm=size), layer("b"), HEAD)]
    assert flags(*doubles) == []


@pytest.mark.parametrize(("angle", "flagged"), [(14.0, False), (16.0, True), (None, True)])
def test_rounding(angle, flagged):
    assert bool(flags(layer("a", rounding_angle=angle), layer("b"), HEAD)) is flagged


def test_chance_is_a_note_for_one_layer_and_a_flag_for_most():
    good, bad = layer("good", 79.0), layer("bad", 81.0)
    layers, found = trust.judge([good, bad, HEAD], 8)
    assert found == []
    assert [x.note for x in layers] == ["", "could be chance", ""]
    assert flags(good, replace(bad, name="c"), replace(bad, name="d"), HEAD) == []
    found = flags(layer("good", 70.0), *(replace(bad, name=n) for n in "cdef"), HEAD)
    assert found == ["not distinguishable from chance: " + ", ".join(f"{n} (81.0°, by chance 90.0°)" for n in "cdef")]
    assert flags(bad, bad, HEAD, draws=2) == []


def test_one_layer_that_carries_the_mean():
    carried = [layer("top", 25.0), *(layer(n, 88.0, null_angle=120.0) for n in "abcd"), HEAD]
    found = flags(*carried)
    gamma = (math.cos(math.radians(25)) + 4 * math.cos(math.radians(88))) / 5
    assert found == [f"one layer carries Γ: {gamma:.3f}, and {math.cos(math.radians(88)):.3f} without top"]
    assert flags(layer("top", 25.0), layer("a", 70.0), HEAD) == []
    assert flags(layer("top", 79.0, null_angle=120.0), layer("a", 90.0, null_angle=120.0), HEAD) == []


def test_what_is_not_finite():
    found = flags(
        layer("a", activation_norm=math.nan), layer("b", norm=math.inf), layer("c", None, backprop_norm=math.nan)
    )
    assert found == [
        "activations are not finite: a",
        "backprop's gradient is not finite: c",
        "the rule's gradient is not finite: b",
    ]
