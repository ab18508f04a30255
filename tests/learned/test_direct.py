"""dkp and grape against NumPy, written from their equations: feedback updates included, over several steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rewire
from rewire.feedback import quick_normal
from rewire.rules.dkp import DKP
from rewire.rules.grape import Grape
from tests.rules.checks import parameters, used_feedback

TOL = 1e-8
LR = 0.3


def mlp(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def cnn(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)
        ).double()


def batches(n, shape=(6, 5), seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        yield (
            torch.randn(*shape, dtype=torch.float64, generator=generator),
            torch.randint(4, shape[:1], generator=generator),
        )


class NumpyMLP:
    """Softmax regression on tanh layers, trained by gradient descent; layer l hands back by ``B[l]`` (n, inputs)."""

    def __init__(self, model):
        p = parameters(model)
        self.W = [p[f"{i}.weight"] for i in (0, 2, 4)]
        self.b = [p[f"{i}.bias"] for i in (0, 2, 4)]

    def forward(self, x):
        """Inputs of the layers, and the output."""
        xs = [x]
        for W, b in zip(self.W[:-1], self.b[:-1], strict=True):
            xs.append(np.tanh(xs[-1] @ W.T + b))
        return xs, xs[-1] @ self.W[-1].T + self.b[-1]

    def error(self, y, labels):
        p = np.exp(y - y.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), labels] -= 1
        return p / len(y)

    def jacobian(self, xs, layer, s):
        """J of the output with respect to the input of ``layer`` for sample s."""
        J = np.eye(self.W[layer].shape[1])
        for at in range(layer, len(self.W)):
            J = self.W[at] @ J
            if at + 1 < len(self.W):
                J = np.diag(1 - xs[at + 1][s] ** 2) @ J
        return J

    def step(self, xs, e, B):
        """One step of gradient descent with feedback B by layer; None: backprop's own."""
        delta, grads = e, []
        for at in reversed(range(len(self.W))):
            grads.append((delta.T @ xs[at], delta.sum(0)))
            if at:
                back = delta @ self.W[at] if B is None else e @ B[at]
                delta = back * (1 - xs[at] ** 2)
        for at, (gW, gb) in zip(reversed(range(len(self.W))), grads, strict=True):
            self.W[at] = self.W[at] - LR * gW
            self.b[at] = self.b[at] - LR * gb


def torch_step(model, optimizer, x, labels):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()


def check_weights(model, ours):
    p = parameters(model)
    for i, W, b in zip((0, 2, 4), ours.W, ours.b, strict=True):
        np.testing.assert_allclose(p[f"{i}.weight"], W, atol=TOL, rtol=0)
        np.testing.assert_allclose(p[f"{i}.bias"], b, atol=TOL, rtol=0)


def drawn(model, x, **options):
    """Feedback as it is before anything has been learned: that of dfa."""
    rewire.convert(model, "dfa", **options)
    model(x).sum().backward()
    return used_feedback(model)


# -- dkp -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_dkp_against_its_equation(normalise):
    model = mlp()
    ours = NumpyMLP(model)
    rewire.convert(model, DKP(lr=0.2, decay=0.05, normalise=normalise), scale=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    B, unit = None, None
    for x, labels in batches(6):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        torch_step(model, optimizer, x, labels)
        if B is None:
            used = drawn(mlp(), x, scale=0.3)
            B = {1: used["2"], 2: used["4"]}
        ours.step(xs, e, B)
        check_weights(model, ours)
        if unit is None:
            unit = np.sqrt((e**2).sum(1)).sum() if normalise else 1.0
        for at in B:
            update = np.zeros_like(B[at])
            for s in range(len(e)):
                update += np.outer(e[s], xs[at][s])
            B[at] = B[at] - 0.2 * (update / unit + 0.05 * B[at])
        used = used_feedback(model)
        for at, name in ((1, "2"), (2, "4")):
            np.testing.assert_allclose(used[name], B[at], atol=TOL, rtol=0)


def test_dkp_of_images_and_channels():
    for feedback, shape in (("dense", (4, 3, 3, 3)), ("channel", (4, 3))):
        model = cnn()
        rewire.convert(model, DKP(lr=0.5, decay=0.0, normalise=False, feedback=feedback), scale=0.3)
        ((x, labels),) = batches(1, (5, 2, 4, 4))
        nn.functional.cross_entropy(model(x), labels).backward()
        before = drawn(cnn(), x, scale=0.3, feedback=feedback)["2"]
        e = rewire.output_error(model).numpy()
        after = used_feedback(model)["2"]
        h = torch.tanh(model[0](x)).detach().numpy()
        assert after.shape == shape
        expected = before.copy()
        for s in range(5):
            for i in range(4):
                for c in range(3):
                    if feedback == "dense":
                        expected[i, c] -= 0.5 * e[s, i] * h[s, c]
                    else:
                        expected[i, c] -= 0.5 * e[s, i] * h[s, c].sum()
        np.testing.assert_allclose(after, expected, atol=TOL, rtol=0)


def test_dkp_of_a_sequence_has_one_b_for_all_positions():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))).mean(1))

    torch.manual_seed(0)
    model = Tokens().double()
    rewire.convert(model, DKP(lr=0.5, decay=0.0, normalise=False), scale=0.3)
    ((x, labels),) = batches(1, (5, 7, 3))
    nn.functional.cross_entropy(model(x), labels).backward()
    before = drawn(Tokens().double(), x, scale=0.3)["two"]
    e = rewire.output_error(model).numpy()
    h = torch.tanh(model.one(x)).detach().numpy()
    expected = before - 0.5 * sum(np.outer(e[s], h[s, t]) for s in range(5) for t in range(7))
    np.testing.assert_allclose(used_feedback(model)["two"], expected, atol=TOL, rtol=0)


def test_dkp_does_not_depend_on_the_losss_scale():
    found = []
    for factor in (1.0, 1000.0):
        model = mlp()
        rewire.convert(model, "dkp", scale=0.3)
        for x, labels in batches(3):
            (factor * nn.functional.cross_entropy(model(x), labels)).backward()
        found.append(used_feedback(model)["4"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-12, rtol=0)


def test_dkp_waits_while_errors_are_not_finite():
    model = mlp()
    rewire.convert(model, "dkp", scale=0.3)
    (x, labels), (x2, labels2) = batches(2)
    (nn.functional.cross_entropy(model(x), labels) * float("inf")).backward()
    before = used_feedback(model)
    assert all(np.isfinite(B).all() for B in before.values())
    nn.functional.cross_entropy(model(x2), labels2).backward()
    assert not np.allclose(used_feedback(model)["4"], before["4"])


def test_dkp_waits_while_errors_are_zero():
    """u is that of the first pass from which anything can be learned."""
    found = []
    for silent in (0, 2):
        model = mlp()
        rewire.convert(model, "dkp(decay=0)", scale=0.3)
        for x, labels in batches(silent):
            (0 * nn.functional.cross_entropy(model(x), labels)).backward()
        for x, labels in batches(2, seed=7):
            nn.functional.cross_entropy(model(x), labels).backward()
        found.append(used_feedback(model)["4"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"decay": "much"}, {"lr": float("nan")}])
def test_numbers_dkp_refuses(wrong):
    with pytest.raises(rewire.ConversionError, match=next(iter(wrong))):
        DKP(**wrong)


# -- grape ---------------------------------------------------------------------------------------------


def tangent(name, passes, shape, call=0, seed=0):
    """v as the library draws it; what becomes of it is computed here."""
    return quick_normal(shape, seed=seed, name=f"{name}:tangent:{call}:0", draw=passes, scale=1.0).double().numpy()


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_grape_against_its_equations(every, together, samples):
    """With ``samples`` the first ones of the batch are probed, and those alone."""
    model = mlp()
    ours = NumpyMLP(model)
    rule = Grape(every=every, lr=0.3, anchor=4, together=together, samples=samples)
    rewire.convert(model, rule, scale=0.3, output="4")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    names = {1: "2", 2: "4"}
    B = None
    for passes, (x, labels) in enumerate(batches(8)):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        # the probe, on the weights before the step
        J = {}
        if passes % every == 0 and passes > 0:
            layers = [1, 2] if together else [[1, 2][(passes // every) % 2]]
            probed = len(x) if samples is None else samples
            shapes = {at: (probed, xs[at].shape[1]) for at in layers}
            v = {at: tangent(names[at], passes, shapes[at], call=i) for i, at in enumerate(layers)}
            for at in layers:
                J[at] = np.zeros((4, xs[at].shape[1]))
            for s in range(probed):
                u = sum(ours.jacobian(xs, at, s) @ v[at][s] for at in layers)
                for at in layers:
                    J[at] += np.outer(u, v[at][s])
        torch_step(model, optimizer, x, labels)
        if B is None:
            used = drawn(mlp(), x, scale=0.3, output="4")
            B = {at: used[name] for at, name in names.items()}
        anchor = passes % 4 == 0
        exact = {}
        delta = e
        for at in (2, 1):
            exact[at] = delta @ ours.W[at]
            delta = exact[at] * (1 - xs[at] ** 2)
        ours.step(xs, e, None if anchor else B)
        check_weights(model, ours)
        for at in B:
            if at in J:
                size = np.linalg.norm(B[at])
                cos = (J[at] * B[at]).sum() / np.linalg.norm(J[at]) / size
                unit = B[at] / size + 0.3 * (J[at] / np.linalg.norm(J[at]) - cos * B[at] / size)
                B[at] = size * unit / np.linalg.norm(unit)
            if anchor:
                B[at] = B[at] * np.linalg.norm(exact[at]) / np.linalg.norm(e @ B[at])
        used = used_feedback(model)
        for at, name in names.items():
            np.testing.assert_allclose(used[name], B[at], atol=TOL, rtol=0)


def test_a_probe_is_the_jacobian_on_average():
    model = mlp()
    ours = NumpyMLP(model)
    rewire.convert(model, Grape(lr=0.0, anchor=0), scale=0.3, output="4")
    seen = {}
    real = Grape.observe

    def observe(self, rows, B):
        sums = real(self, rows, B)
        seen.setdefault(tuple(sums["J"].shape), []).append(sums["J"] / len(rows.e))
        return sums

    ((x, labels),) = batches(1)
    x, labels = x.repeat(50, 1), labels.repeat(50)
    Grape.observe = observe
    try:
        for _ in range(60):
            nn.functional.cross_entropy(model(x), labels).backward()
    finally:
        Grape.observe = real
    xs, _ = ours.forward(x.numpy())
    for at, shape in ((1, (4, 7)), (2, (4, 6))):
        J = np.mean([ours.jacobian(xs, at, s) for s in range(6)], 0)
        estimate = torch.stack(seen[shape]).mean(0).numpy()
        assert np.linalg.norm(estimate - J) < 0.06 * np.linalg.norm(J)
        assert np.linalg.norm(estimate + J) > np.linalg.norm(J)


def test_broken_on_purpose(monkeypatch):
    """The comparison above sees a wrong sign, and tangents that never reach the layer."""
    real = Grape.observe
    monkeypatch.setattr(Grape, "observe", lambda self, rows, B: {"J": -real(self, rows, B)["J"]})
    with pytest.raises(AssertionError):
        test_grape_against_its_equations(1, False, None)
    monkeypatch.setattr(Grape, "observe", real)
    monkeypatch.setattr(
        DKP, "gather", lambda self, rows: {"G": -rows.e.T @ rows.summed(), "size": rows.e.sum() * 0 + 1}
    )
    with pytest.raises(AssertionError):
        test_dkp_against_its_equation(False)


def test_costs_are_shown():
    model = mlp()
    rewire.convert(model, "grape(every=4, anchor=50)", layers={"0": "switch(first=bp, then=dfa, at=3)"})
    rows = {row.name: row for row in rewire.summary(model).rows}
    assert "exact in 2 % of passes; a forward-mode probe before 25 % of passes" in rows["2"].note
    assert rows["0"].rule == "bp" and "by switch(first='bp', then='dfa', at=3)" in rows["0"].note


@pytest.mark.parametrize("rule", ["fitted", "dkp", "grape", "switch(first=bp, then=dfa, at=5)"])
def test_averages_made_after_three_passes(rule):
    """As docs/training.md says: buffers are paired by their order, and all of them are there by then."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)]
    model = rewire.convert(nn.Sequential(*layers), rule)
    x = torch.randn(8, 5)
    for _ in range(3):
        model(x).square().sum().backward()
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(4):
        model(x).square().sum().backward()
        average.update_parameters(model)
        for (name, p), q in zip(model.named_parameters(), average.module.parameters(), strict=True):
            torch.testing.assert_close(p, q, msg=name)  # nothing steps here
    assert len([*average.module.buffers()]) == len([*model.buffers()])
