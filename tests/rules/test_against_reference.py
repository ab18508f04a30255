"""Every rule's gradients on an MLP and a CNN, against NumPy, to 1e-10; and what each feedback is."""

from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import rewire
from rewire.rules.direct import DRTP

from ..reference import networks
from ..reference.networks import DIRECT, LOCAL, RULES, direct_feedback
from .checks import (
    DEFINED,
    NETS,
    SCALE,
    TOL,
    Problem,
    assert_close,
    change_weights,
    check_gradients,
    check_pass,
    check_rule,
    parameters,
    run,
    used_feedback,
)

WITH_FEEDBACK = ("dfa", "sdfa", "drtp")


def rms(a):
    return float(np.sqrt((a**2).mean()))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", NETS)
def test_gradients_and_feedback(net, rule, loss):
    check_rule(Problem(net, loss), rule)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "bp"])
@pytest.mark.parametrize("net", NETS)
def test_rule_is_not_backprop(net, rule):
    problem = Problem(net)
    rewire.convert(problem.model, rule, scale=SCALE, seed=3)
    run(problem)
    with pytest.raises(AssertionError, match="off by"):
        check_gradients(problem, problem.reference("bp"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", NETS)
def test_gradient_of_the_models_input(net, rule):
    problem = Problem(net)
    rewire.convert(problem.model, rule, scale=SCALE)
    problem.x.requires_grad_()
    for _ in range(2):
        expected, _ = check_pass(problem, rule)
        assert expected.x is not None, "the first layer hands something to the input, so it has a feedback"


@pytest.mark.parametrize("net", NETS)
def test_the_change_of_weights_in_these_tests_flips_signs(net):
    problem = Problem(net)
    before = parameters(problem.model)
    change_weights(problem.model)
    after = parameters(problem.model)
    for name in before:
        if name.endswith("weight"):
            assert (np.sign(before[name]) != np.sign(after[name])).any()


@pytest.mark.parametrize("rule", WITH_FEEDBACK)
@pytest.mark.parametrize("net", NETS)
def test_feedback_of_direct_rules_has_the_inputs_shape(net, rule):
    problem = Problem(net)
    rewire.convert(problem.model, rule, scale=SCALE, seed=5)
    _, feedback = check_pass(problem, rule)
    shapes = {name: x.shape for name, x in problem.reference("bp").handed.items()}
    for name, B in feedback.items():
        assert B.shape == (4, *shapes[name][1:])


@pytest.mark.parametrize("rule", ["fa", "dfa", "frsf"])
def test_seed_decides_the_feedback(rule):
    made = {}
    for label, seed in (("a", 0), ("again", 0), ("other", 1)):
        problem = Problem("mlp")
        rewire.convert(problem.model, rule, scale=SCALE, seed=seed)
        made[label] = check_pass(problem, rule)[1]
    for name, B in made["a"].items():
        assert_close(made["again"][name], B, name, tol=0)
        assert not np.isclose(made["other"][name], B).any()
    layers = list(made["a"])
    flat = [np.abs(made["a"][name]).ravel()[:8] for name in layers]
    assert not np.isclose(flat[-1], flat[-2]).any(), "two layers share their random numbers"


# -- scale ------------------------------------------------------------------------------------------


def wide(rule, **options):
    """A converted model with a layer of many weights, after one pass: (its feedback, its weight)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 2000), nn.Tanh(), nn.Linear(2000, 50)).double()
    rewire.convert(model, rule, **options)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, dtype=torch.float64, generator=generator)
    model(x).square().sum().backward()
    return used_feedback(model)["2"], parameters(model)["2.weight"]


@pytest.mark.parametrize("rule", ["fa", "dfa", "sdfa"])
@pytest.mark.parametrize("scale", [0.05, 1.7])
def test_a_float_scale_is_the_standard_deviation(rule, scale):
    B, _ = wide(rule, scale=scale)
    z = B.ravel() / scale
    assert z.size == 100_000
    # 5 standard errors of each moment of 1e5 standard normal numbers: 1/√n, √2/2n, √6/n, √24/n
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.std() - 1) < 5 / np.sqrt(2 * z.size)
    assert abs((z**3).mean()) < 5 * np.sqrt(15 / z.size)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / z.size)
    assert abs((np.abs(z) < 1).mean() - 0.682689) < 5 * np.sqrt(0.2166 / z.size)
    # independent entries: neighbours along either axis are uncorrelated
    grid = z.reshape(B.shape[0], -1)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize("rule", ["brsf", "frsf"])
def test_random_magnitudes_have_the_scale(rule):
    B, W = wide(rule, scale=0.2)
    assert (np.sign(B) == np.sign(W)).all()
    z = np.abs(B).ravel() / 0.2  # half-normal: mean √(2/π), mean square 1
    assert abs(z.mean() - np.sqrt(2 / np.pi)) < 5 * np.sqrt((1 - 2 / np.pi) / z.size)
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / z.size)
    assert abs(np.corrcoef(z, np.abs(W).ravel())[0, 1]) < 5 / np.sqrt(z.size)


def test_usf_is_scale_times_sign_exactly():
    B, W = wide("usf", scale=0.125)
    assert (np.sign(W) * 0.125 == B).all()


@pytest.mark.parametrize("rule", DEFINED)
@pytest.mark.parametrize("options", [{}, {"scale": "auto"}])
def test_auto_scale_of_local_rules_is_the_weights_standard_deviation(rule, options):
    B, W = wide(rule, **options)
    spread = W.std(ddof=1)
    if rule == "usf":
        assert np.allclose(np.abs(B), spread, rtol=1e-4, atol=0)
    else:
        assert abs(rms(B) / spread - 1) < 5 / np.sqrt(2 * B.size) + 1e-4


@pytest.mark.parametrize("rule", DEFINED)
def test_auto_scale_of_local_rules_is_taken_at_conversion(rule):
    problem = Problem("mlp")
    spread = {n: parameters(problem.model)[f"{n}.weight"].std(ddof=1) for n in problem.network.layers}
    rewire.convert(problem.model, rule, seed=2)
    check_pass(problem, rule)  # local rules have nothing to measure: they are live from the first pass
    with torch.no_grad():
        for p in problem.model.parameters():
            p.mul_(10)
    _, feedback = check_pass(problem, rule)
    for name in problem.network.layers[1:]:
        # usf has no randomness, so it is exact; at most 42 random numbers otherwise
        slack = 1e-6 if rule == "usf" else 0.6
        assert abs(rms(feedback[name]) / spread[name] - 1) < slack


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("rule", WITH_FEEDBACK)
@pytest.mark.parametrize("net", NETS)
def test_auto_scale_of_direct_rules(net, rule, loss):
    """The first pass is backprop and measures; then each layer hands back as much as it did exactly."""
    problem = Problem(net, loss)
    rewire.convert(problem.model, rule, seed=4)
    targets = problem.labels if rule == "drtp" else None
    run(problem, targets)
    exact = problem.reference("bp")
    check_gradients(problem, exact)

    # No step in between: the second pass has the first one's data, weights and e.
    _, feedback = check_pass(problem, rule, targets)
    signal = {"dfa": exact.e, "sdfa": np.sign(exact.e), "drtp": problem.hot.numpy()}[rule]
    for name in problem.network.layers[1:]:
        fed = direct_feedback(signal, feedback[name], exact.handed[name].shape)
        assert abs(rms(fed) / rms(exact.handed[name]) - 1) < 1e-6, name

    # It was measured once: other data and weights change nothing.
    problem.x.mul_(3)
    change_weights(problem.model)
    _, later = check_pass(problem, rule, targets)
    for name, B in feedback.items():
        assert_close(later[name], B, name, tol=0)


def test_auto_scale_is_the_scale_of_the_same_random_numbers():
    auto, fixed = Problem("mlp"), Problem("mlp")
    rewire.convert(auto.model, "dfa", seed=4)
    rewire.convert(fixed.model, "dfa", seed=4, scale=1.0)
    run(auto)
    _, scaled = check_pass(auto, "dfa")
    _, plain = check_pass(fixed, "dfa")
    for name in auto.network.layers[1:]:
        ratio = scaled[name] / plain[name]
        assert np.allclose(ratio, ratio.flat[0], rtol=1e-6)
        assert ratio.flat[0] > 0


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.d(h + self.c(torch.tanh(self.b(h))))


def test_auto_scale_with_a_skip_connection_measures_the_layers_own_share():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Residual().double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(4, (6,), generator=generator)
    rewire.convert(model, "dfa")

    def one_pass():
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        return {n: p.grad.numpy().copy() for n, p in model.named_parameters()}

    def by_hand(hand_back):
        """Gradients, and the pieces handed back; hand_back(layer, δ at its output) is the rule."""
        h = np.tanh(x.numpy() @ p["a.weight"].T + p["a.bias"])
        t = np.tanh(h @ p["b.weight"].T + p["b.bias"])
        z = h + t @ p["c.weight"].T + p["c.bias"]
        _, e = networks.cross_entropy(z @ p["d.weight"].T + p["d.bias"], y.numpy())
        share = {"d": hand_back("d", e, e)}
        share["c"] = hand_back("c", share["d"], e)
        delta_b = share["c"] * (1 - t**2)
        share["b"] = hand_back("b", delta_b, e)
        delta_a = (share["d"] + share["b"]) * (1 - h**2)  # the skip brings d's share to h unchanged
        pairs = {"a": (delta_a, x.numpy()), "b": (delta_b, h), "c": (share["d"], t), "d": (e, z)}
        grads = {}
        for name, (delta, below) in pairs.items():
            grads[f"{name}.weight"], grads[f"{name}.bias"] = delta.T @ below, delta.sum(0)
        return grads, share, e

    p = parameters(model)
    grads, share, e = by_hand(lambda name, delta, e: delta @ p[f"{name}.weight"])
    for name, g in one_pass().items():
        assert_close(g, grads[name], name)
    second = one_pass()
    B = used_feedback(model)
    for name in "bcd":
        assert abs(rms(e @ B[name]) / rms(share[name]) - 1) < 1e-6, name
    for name, g in by_hand(lambda name, delta, e: e @ B[name])[0].items():
        assert_close(second[name], g, name)


# -- targets for drtp -------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("how", ["indices", "one-hot", "recovered"])
def test_drtp_targets_of_cross_entropy(net, how):
    problem = Problem(net)
    rewire.convert(problem.model, "drtp", scale=SCALE)
    targets = {"indices": problem.labels, "one-hot": problem.hot, "recovered": None}[how]
    for _ in range(2):
        check_pass(problem, "drtp", targets)


@pytest.mark.parametrize("how", ["indices", "one-hot"])
def test_drtp_with_a_loss_that_does_not_show_the_targets(how):
    problem = Problem("mlp", "mse")
    rewire.convert(problem.model, "drtp", scale=SCALE)
    check_pass(problem, "drtp", {"indices": problem.labels, "one-hot": problem.hot}[how])


def test_drtp_hands_nothing_back_to_a_row_without_a_target():
    problem = Problem("mlp")
    rewire.convert(problem.model, "drtp", scale=SCALE)
    labels = problem.labels.clone()
    labels[[1, 4]] = -100
    x = problem.x.clone().requires_grad_()
    for _ in range(2):
        x.grad = None
        with rewire.targets(labels):
            y = problem.model(x)
        torch.nn.functional.cross_entropy(y, labels).backward()
    hot = np.stack([np.eye(4)[k] if k >= 0 else np.zeros(4) for k in labels.tolist()])
    B = used_feedback(problem.model)["0"]
    np.testing.assert_allclose(x.grad, hot @ B, atol=1e-12)


def test_drtp_trusts_the_given_targets_over_the_errors_sign():
    problem = Problem("mlp")
    rewire.convert(problem.model, "drtp", scale=SCALE)
    given = (problem.labels + 1) % 4
    problem.labels = given  # y* of the reference; the loss keeps its own target
    check_pass(problem, "drtp", given)


def test_drtp_needs_only_the_forward_inside_targets():
    problem = Problem("mlp", "mse")
    rewire.convert(problem.model, "drtp", scale=SCALE)
    with rewire.targets(problem.labels):
        out = problem.model(problem.x)
    problem.torch_loss(out, problem.target).backward()
    check_gradients(problem, problem.reference("drtp", used_feedback(problem.model)))


@pytest.mark.parametrize("scale", [SCALE, "auto"])
def test_drtp_without_targets_names_both_ways_out(scale):
    problem = Problem("mlp", "mse")
    rewire.convert(problem.model, "drtp", scale=scale)
    with pytest.raises(rewire.RewireError, match=r"(?s)rewire\.targets.*cross-entropy"):
        for _ in range(2):
            run(problem)


def drtp_signal(loss, y, labels):
    """y* as read off the error of ``loss`` at y."""
    y = y.clone().requires_grad_()
    loss(y, labels).backward()
    return DRTP().signal(y.grad, None, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gap", [0, 4, 6, 8, 12, 15, 16, 17, 18, 30, 70])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 6])
def test_drtp_knows_targets_of_samples_that_are_known_well(dtype, gap, reduction, rows):
    """Where softmax(y) is 1 but for a rounding error, and where it is 1."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 5
    hot = torch.nn.functional.one_hot(labels, 5)
    y = (torch.randn(rows, 5, generator=generator) + gap * hot).to(dtype)
    loss = functools.partial(torch.nn.functional.cross_entropy, reduction=reduction)
    assert torch.equal(drtp_signal(loss, y, labels), hot.to(dtype))


@pytest.mark.parametrize("gap", [0, 4, 8, 12])
def test_drtp_knows_targets_of_a_scaled_loss(gap):
    """As gradient scalers do: rounding errors are as many times larger."""
    labels = torch.arange(6) % 5
    hot = torch.nn.functional.one_hot(labels, 5)
    y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + gap * hot
    assert torch.equal(
        drtp_signal(lambda *args: 2**16 * torch.nn.functional.cross_entropy(*args), y, labels), hot.float()
    )


def test_drtp_reads_nothing_off_a_sample_that_has_no_error():
    y = torch.zeros(2, 3)
    y[0, 1] = 200
    found = drtp_signal(torch.nn.functional.cross_entropy, y, torch.tensor([1, 2]))
    assert found.tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, labels: torch.nn.functional.binary_cross_entropy_with_logits(y, torch.eye(5)[labels]),
        lambda y, labels: torch.nn.functional.mse_loss(y, torch.eye(5)[labels]),
        lambda y, labels: torch.nn.functional.cross_entropy(y, labels, label_smoothing=0.1),
        lambda y, labels: torch.nn.functional.mse_loss(y[:, :1], labels[:, None].float()),
        lambda y, labels: y.sum(),
        lambda y, labels: (y[:, 0] - y[:, 1:].sum(1)).sum(),
    ],
    ids=["sigmoids", "squares", "smoothed", "one output", "sum", "not balanced"],
)
def test_drtp_reads_no_targets_off_other_losses(loss):
    generator = torch.Generator().manual_seed(1)
    y = 4 * torch.randn(6, 5, generator=generator)
    with pytest.raises(rewire.PassError, match="does not show them"):
        drtp_signal(loss, y, torch.arange(6) % 5)


def test_drtp_reads_no_targets_off_one_output():
    with pytest.raises(rewire.PassError, match="does not show them"):
        drtp_signal(lambda y, t: (y - t).square().sum() * 1e-9, torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]))


# -- beside the plain case --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", WITH_FEEDBACK)
def test_channel_feedback(rule):
    problem = Problem("cnn")
    rewire.convert(problem.model, rule, scale=SCALE, feedback="channel")
    for _ in range(2):
        _, feedback = check_pass(problem, rule)
        assert feedback["2"].shape == (4, 6)
        assert feedback["5"].shape == (4, 30)


def test_channel_feedback_with_auto_scale():
    problem = Problem("cnn")
    rewire.convert(problem.model, "dfa", feedback="channel")
    run(problem)
    exact = problem.reference("bp")
    check_gradients(problem, exact)
    _, feedback = check_pass(problem, "dfa")
    for name in ("2", "5"):
        shape = exact.handed[name].shape
        fed = direct_feedback(exact.e, feedback[name], shape)
        assert abs(rms(fed) / rms(exact.handed[name]) - 1) < 1e-6, name


@pytest.mark.parametrize(
    "rules",
    [
        {"0": "fa", "2": "usf", "4": "bp"},
        {"0": "dfa", "2": "dfa", "4": "bp"},
        {"0": "fa", "2": "dfa", "4": "fa"},
        {"0": "dfa", "2": "frsf", "4": "dfa"},
        {"0": "bp", "2": "shallow", "4": "sdfa"},
    ],
    ids=lambda rules: "-".join(rules.values()),
)
def test_a_rule_per_layer(rules):
    problem = Problem("mlp")
    rewire.convert(problem.model, "bp", layers=rules, scale=SCALE)
    for _ in range(2):
        run(problem)
        expected = problem.reference(rules, used_feedback(problem.model))
        check_gradients(problem, expected)


@pytest.mark.parametrize("rule", DIRECT)
@pytest.mark.parametrize("net", NETS)
def test_output_error_is_the_gradient_at_the_output_layer(net, rule):
    problem = Problem(net)
    rewire.convert(problem.model, rule, scale=SCALE)
    run(problem)
    assert_close(rewire.output_error(problem.model), problem.reference("bp").e, "e")


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_two_passes_accumulate(rule):
    problem = Problem("mlp")
    rewire.convert(problem.model, rule, scale=SCALE)
    run(problem)
    feedback = used_feedback(problem.model)
    expected = problem.reference(rule, feedback)
    # the second pass onto the first one's gradients
    problem.torch_loss(problem.model(problem.x), problem.target).backward()
    again = problem.reference(rule, used_feedback(problem.model))
    for name, p in problem.model.named_parameters():
        assert_close(p.grad, expected.grads[name] + again.grads[name], name)


class Times(rewire.DirectRule):
    """B (k e): a rule with a number of its own."""

    def __init__(self, k):
        self.k = k

    def signal(self, error, targets, axis):
        return self.k * error


def test_two_rules_of_one_class_keep_apart():
    problem = Problem("mlp")
    factors = {"0": 5.0, "2": 2.0, "4": 3.0}
    rewire.convert(problem.model, "bp", layers={n: Times(k) for n, k in factors.items()}, scale=SCALE)
    for _ in range(2):
        run(problem)
        feedback = used_feedback(problem.model)
        scaled = {name: factors[name] * B for name, B in feedback.items()}
        check_gradients(problem, problem.reference("dfa", scaled))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [SCALE, "auto"])
@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "dfa", "sdfa", "drtp"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_copy_has_the_same_feedback(rule, scale, dtype, copied, passes):
    """Bit for bit, before and after it ran, whether the scale was given or measured."""
    problem = Problem("mlp")
    model, x = problem.model.to(dtype), problem.x.to(dtype)
    rewire.convert(model, rule, scale=scale)

    def one_pass(model):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), problem.labels).backward()
        return [p.grad.clone() for p in model.parameters()]

    for _ in range(passes):
        one_pass(model)
    other = copied(model)
    assert all(map(torch.equal, one_pass(model), one_pass(other)))
    ours, theirs = rewire.feedback(model), rewire.feedback(other)
    assert ours.keys() == theirs.keys() >= {"2", "4"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = rewire.feedback(copied(model))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_all_rules_are_covered():
    assert set(RULES) <= set(rewire.rules())
    assert set(LOCAL) | set(DIRECT) == set(RULES)
    assert TOL == 1e-10
