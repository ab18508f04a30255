"""Rules that learn, with one matrix M for all layers: what each layer has learned, in NumPy, and M made of it.

A layer's B is its scale times the first columns of M. In a step each layer learns the B that it would have learned
alone; a column of M is then the mean of theirs, divided by their scales, over the layers that have it and learned.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.learning import glance
from rewire.rules.base import LearnedDirect
from rewire.structures import NAMES, Shared
from rewire.structures.shared import Columns
from rewire.swap import states_of

from ..plain import mlp, randn, seeded
from ..test_structures import draw
from .test_direct import LR, TOL, batches, tangent
from .test_fitted import ridged

SEED = 3
WIDTHS = (5, 7, 3, 6, 4)
WIDTH = {1: 7, 2: 3, 3: 6}  # of what layers hand back to, by their number
NAME = {1: "2", 2: "4", 3: "6"}
SCALES = {1: 0.3, 2: 0.7, 3: 0.15}
BY_NAME = {"0": 1.0} | {NAME[at]: s for at, s in SCALES.items()}


def drawn_M(columns, output="", n=4, distribution="normal", seed=SEED):
    """(n, columns), as docs/structures.md has it: drawn column by column, in float32."""
    return draw(f"shared{output}", (n,), distribution, total=n * columns, seed=seed).reshape(columns, n).T.copy()


def agreed(M, alone, scales=SCALES):
    """M after a step in which layers have learned ``alone``, {layer: (n, columns)}."""
    new = M.copy()
    for j in range(M.shape[1]):
        have = [B[:, j] / scales[at] for at, B in alone.items() if B.shape[1] > j]
        if have:
            new[:, j] = sum(have) / len(have)
    return new


class Ours:
    """A tanh MLP of any depth trained by gradient descent, layers handing back e times their B; and M."""

    def __init__(self, model, M):
        self.W = [m.weight.detach().numpy().copy() for m in model if isinstance(m, nn.Linear)]
        self.b = [m.bias.detach().numpy().copy() for m in model if isinstance(m, nn.Linear)]
        self.M = M
        self.more = {}  # layer: (P, C) of what looks at its input

    @property
    def B(self):
        return {at: SCALES[at] * self.M[:, :columns] for at, columns in WIDTH.items()}

    def run(self, x, labels):
        self.xs = [x]
        for W, b in zip(self.W[:-1], self.b[:-1], strict=True):
            self.xs.append(np.tanh(self.xs[-1] @ W.T + b))
        y = self.xs[-1] @ self.W[-1].T + self.b[-1]
        p = np.exp(y - y.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), labels] -= 1
        self.e = p / len(y)
        self.exact, delta = {}, self.e
        for at in (3, 2, 1):
            self.exact[at] = delta @ self.W[at]
            delta = self.exact[at] * (1 - self.xs[at] ** 2)
        return self.e

    def jacobian(self, at, s):
        J = self.W[at]
        for above in range(at + 1, 4):
            J = self.W[above] @ np.diag(1 - self.xs[above][s] ** 2) @ J
        return J

    def step(self, exact=False):
        delta, grads = self.e, {}
        for at in (3, 2, 1, 0):
            grads[at] = delta.T @ self.xs[at], delta.sum(0)
            if at:
                back = self.e @ self.B[at]
                if at in self.more:
                    P, C = self.more[at]
                    back = back + np.einsum("si,sj,ijf->sf", self.e, self.xs[at] @ P, C)
                delta = (self.exact[at] if exact else back) * (1 - self.xs[at] ** 2)
        for at, (W, b) in grads.items():
            self.W[at], self.b[at] = self.W[at] - LR * W, self.b[at] - LR * b


def begin(rule, feedback="shared", **options):
    model = mlp(WIDTHS)
    ours = Ours(model, drawn_M(7))
    rewire.convert(model, rule, feedback=feedback, scale=BY_NAME, seed=SEED, output="6", **options)
    return model, ours, torch.optim.SGD(model.parameters(), lr=LR)


def train_step(model, optimizer, x, labels):
    optimizer.zero_grad()
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()


def check(model, ours):
    """Weights, what is handed back, and that all layers have the same M to the last bit."""
    linear = [m for m in model if isinstance(m, nn.Linear)]
    for m, W, b in zip(linear, ours.W, ours.b, strict=True):
        np.testing.assert_allclose(m.weight.detach(), W, atol=TOL, rtol=0)
        np.testing.assert_allclose(m.bias.detach(), b, atol=TOL, rtol=0)
    used, kept = rewire.feedback(model), model.state_dict()
    for at, name in NAME.items():
        np.testing.assert_allclose(used[name], ours.B[at], atol=TOL, rtol=0)
        assert torch.equal(kept[f"{name}.rewire_B"], kept["2.rewire_B"][: WIDTH[at]])


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_dkp(normalise):
    model, ours, optimizer = begin(f"dkp(lr=0.2, decay=0.3, normalise={normalise})")
    unit = None
    for x, labels in batches(6):
        e = ours.run(x.numpy(), labels.numpy())
        before = ours.B
        ours.step()
        train_step(model, optimizer, x, labels)
        unit = unit or (np.sqrt((e**2).sum(1)).sum() if normalise else 1.0)
        alone = {}
        for at, B in before.items():
            G = sum(np.outer(e[s], ours.xs[at][s]) for s in range(len(e)))
            alone[at] = B - 0.2 * (G / unit + 0.3 * B)
        ours.M = agreed(ours.M, alone)
        check(model, ours)


def capped(M, first, cap):
    """M as a whole so small that no layer's B is larger than it may be."""
    norms = {at: SCALES[at] * np.linalg.norm(M[:, : WIDTH[at]]) for at in first}
    return M * min(1, *(cap * first[at] / norms[at] for at in first))


@pytest.mark.parametrize("cap", [0, 0.5, 1.5])
@pytest.mark.parametrize("context", [0, 2])
def test_fitted(context, cap):
    model, ours, optimizer = begin(f"fitted(every=2, decay=0.7, ridge=0.05, cap={cap}, context={context})")
    memory, first, bound = {}, {}, 0
    for passes, (x, labels) in enumerate(batches(11)):
        e = ours.run(x.numpy(), labels.numpy())
        anchor = passes % 2 == 0
        ours.step(exact=anchor)
        train_step(model, optimizer, x, labels)
        if anchor:
            alone = {}
            for at, name in NAME.items():
                phi, P = e, None
                if context:
                    P = glance(states_of(model.get_submodule(name))[0], context, WIDTH[at]).numpy()
                    c = np.concatenate([np.ones((len(e), 1)), ours.xs[at] @ P], 1)
                    phi = np.stack([np.kron(e[s], c[s]) for s in range(len(e))])
                S, R = memory.get(at, (0, 0))
                memory[at] = S, R = 0.7 * S + phi.T @ phi, 0.7 * R + phi.T @ ours.exact[at]
                fit = np.linalg.solve(ridged(S, 0.05), R)
                norm = np.linalg.norm(fit)
                first.setdefault(at, norm)
                fit = fit * (min(1, cap * first[at] / norm) if cap else 1)
                fit = fit.reshape(4, 1 + context, WIDTH[at])
                alone[at] = fit[:, 0]
                if context:
                    ours.more[at] = P, fit[:, 1:]
            M = agreed(ours.M, alone)
            ours.M = capped(M, first, cap) if cap else M
            bound += not np.array_equal(M, ours.M)
            if cap:
                assert all(np.linalg.norm(B) <= cap * first[at] * (1 + 1e-12) for at, B in ours.B.items())
        check(model, ours)
    assert bound if cap == 0.5 and not context else True


@pytest.mark.parametrize("together", [False, True])
def test_grape(together):
    model, ours, optimizer = begin(f"grape(every=1, lr=0.3, anchor=4, together={together})")
    for passes, (x, labels) in enumerate(batches(9)):
        e = ours.run(x.numpy(), labels.numpy())
        layers = [] if passes == 0 else [1, 2, 3] if together else [[1, 2, 3][passes % 3]]
        v = {at: tangent(NAME[at], passes, ours.xs[at].shape, call=i, seed=SEED) for i, at in enumerate(layers)}
        J = {at: np.zeros((4, WIDTH[at])) for at in layers}
        for s in range(len(x)):
            u = sum(ours.jacobian(at, s) @ v[at][s] for at in layers)
            for at in layers:
                J[at] += np.outer(u, v[at][s])
        before, anchor = ours.B, passes % 4 == 0
        ours.step(exact=anchor)
        train_step(model, optimizer, x, labels)
        alone = {}
        for at, B in before.items():
            if at in J:
                size, j = np.linalg.norm(B), J[at] / np.linalg.norm(J[at])
                unit = B / size
                unit = unit + 0.3 * (j - (j * unit).sum() * unit)
                alone[at] = size * unit / np.linalg.norm(unit)
            if anchor:
                B = alone.get(at, B)
                alone[at] = B * np.linalg.norm(ours.exact[at]) / np.linalg.norm(e @ B)
        if alone:
            wide = max(WIDTH[at] for at in alone)
            M = agreed(ours.M, alone)
            size = sum(np.linalg.norm(B / SCALES[at]) ** 2 for at, B in alone.items())
            left = sum(np.linalg.norm(M[:, : WIDTH[at]]) ** 2 for at in alone)
            M[:, :wide] *= math.sqrt(size / left)
            ours.M = M
        check(model, ours)


@pytest.mark.parametrize("probe", [6, 2])
def test_fitted_by_forward_mode(probe):
    """One layer learns in each pass, and the others' columns follow."""
    model, ours, optimizer = begin(f"fitted(by='jvp', every=1, probe={probe})")
    for passes, (x, labels) in enumerate(batches(8)):
        ours.run(x.numpy(), labels.numpy())
        at = [1, 2, 3][passes % 3]
        v = tangent(NAME[at], passes, (probe, WIDTH[at]), seed=SEED)
        B = ours.B[at]
        wrong = sum(np.outer(ours.jacobian(at, s) @ v[s] - B @ v[s], v[s]) for s in range(probe))
        ours.step()
        train_step(model, optimizer, x, labels)
        if passes:
            ours.M = agreed(ours.M, {at: B + wrong / (probe + WIDTH[at])})
        check(model, ours)


class Mine(LearnedDirect):
    """Adds e^T x to B; knows nothing of structures."""

    watches = True

    def signal(self, error, targets, axis):
        return error

    def gather(self, rows):
        return {"G": rows.e.T @ rows.summed()}

    def learn(self, B, memory, sums):
        return B + sums["G"]


def test_a_rule_of_ones_own():
    model, ours, optimizer = begin(Mine())
    for x, labels in batches(4):
        e = ours.run(x.numpy(), labels.numpy())
        before = ours.B
        ours.step()
        train_step(model, optimizer, x, labels)
        ours.M = agreed(ours.M, {at: B + e.T @ ours.xs[at] for at, B in before.items()})
        check(model, ours)


def test_layers_under_rules_that_do_not_learn_keep_what_was_drawn():
    """And two rules that learn learn one matrix."""
    model, ours, optimizer = begin("dfa", layers={"2": "dkp(lr=0.2, decay=0, normalise=False)", "6": Mine()})
    drawn = drawn_M(7)
    for x, labels in batches(4):
        e = ours.run(x.numpy(), labels.numpy())
        train_step(model, optimizer, x, labels)
        alone = {1: ours.B[1] - 0.2 * e.T @ ours.xs[1], 3: ours.B[3] + e.T @ ours.xs[3]}
        ours.M = agreed(ours.M, alone)
        for at, M in {1: ours.M, 2: drawn, 3: ours.M}.items():
            np.testing.assert_allclose(
                rewire.feedback(model)[NAME[at]], SCALES[at] * M[:, : WIDTH[at]], atol=TOL, rtol=0
            )
        ours = Ours(model, ours.M)
    assert "4.rewire_B" not in model.state_dict()


@pytest.mark.parametrize("distribution", ["binary"])
def test_distributions_are_matrices_of_their_own(distribution):
    model = mlp(WIDTHS)
    own = f"dkp(lr=0.2, decay=0, normalise=False, feedback=Shared(distribution={distribution!r}))"
    rewire.convert(model, own, layers={"6": own.replace(repr(distribution), "'normal'")}, scale=BY_NAME, seed=SEED)
    a, b = drawn_M(7, distribution=distribution), drawn_M(6)
    ours = Ours(model, None)
    for x, labels in batches(2):
        e = ours.run(x.numpy(), labels.numpy())
        F.cross_entropy(model(x), labels).backward()
        learned = {at: SCALES[at] * (b if at == 3 else a)[:, : WIDTH[at]] - 0.2 * e.T @ ours.xs[at] for at in WIDTH}
        b = agreed(b, {3: learned.pop(3)})
        a = agreed(a, learned)
    used = rewire.feedback(model)
    for at, M in {1: a, 2: a, 3: b}.items():
        np.testing.assert_allclose(used[NAME[at]], SCALES[at] * M[:, : WIDTH[at]], atol=TOL, rtol=0)


def test_scales_that_are_measured():
    """The first pass measures, with M as it was drawn; from the next on layers learn."""
    model = mlp(WIDTHS)
    ours = Ours(model, drawn_M(7))
    rewire.convert(model, "dkp(lr=0.2, decay=0.3, normalise=False)", feedback="shared", seed=SEED)
    x, labels = next(batches(1))
    e = ours.run(x.numpy(), labels.numpy())
    for _ in range(2):
        F.cross_entropy(model(x), labels).backward()
    used, scales = rewire.feedback(model), rewire.scales(model)
    s, alone = {at: scales[NAME[at]] for at in NAME}, {}
    for at, columns in WIDTH.items():
        unit = ours.M[:, :columns]
        assert s[at] == pytest.approx(np.linalg.norm(ours.exact[at]) / np.linalg.norm(e @ unit), rel=1e-12)
        alone[at] = s[at] * unit - 0.2 * (e.T @ ours.xs[at] + 0.3 * s[at] * unit)
    M = agreed(ours.M, alone, s)
    for at, columns in WIDTH.items():
        np.testing.assert_allclose(used[NAME[at]], s[at] * M[:, :columns], atol=TOL, rtol=0)


# -- images, several outputs, layers that come and go --------------------------------------------------


@pytest.mark.parametrize("structures", [("channel", "channel"), ("element", "element"), ("element", "channel")])
def test_convolutions_beside_linear_layers(structures):
    """Columns are columns: of channels, of elements in memory's order, of features."""
    conv, head = structures
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)
        )
    )
    plain = copy.deepcopy(model)
    rule = "dkp(lr=0.5, decay=0.1, normalise=False, feedback=Shared(per={!r}))"
    scale = {"0": 1.0, "2": 0.3, "5": 0.8}
    rewire.convert(model, rule.format(head), layers={"2": rule.format(conv)}, scale=scale, seed=SEED)
    M = drawn_M(27 if conv == "element" else 16)
    for x, labels in batches(3, (6, 2, 4, 4)):
        h = torch.tanh(plain[0](x)).detach()
        flat = torch.tanh(plain[2](h)).flatten(1).detach()
        out = plain[5](flat).detach().requires_grad_()
        F.cross_entropy(out, labels).backward()
        e = out.grad.numpy()
        F.cross_entropy(model(x), labels).backward()
        seen = {2: h.flatten(1).numpy() if conv == "element" else h.sum((2, 3)).numpy(), 5: flat.numpy()}
        alone = {}
        for at, inputs in seen.items():
            B = scale[str(at)] * M[:, : inputs.shape[1]]
            alone[at] = B - 0.5 * (e.T @ inputs + 0.1 * B)
        M = agreed(M, alone, {2: 0.3, 5: 0.8})
        used = rewire.feedback(model)
        np.testing.assert_allclose(used["5"], 0.8 * M[:, :16], atol=TOL, rtol=0)
        shape = (4, 3, 3, 3) if conv == "element" else (4, 3)
        np.testing.assert_allclose(used["2"], 0.3 * M[:, : math.prod(shape[1:])].reshape(shape), atol=TOL, rtol=0)
    assert rewire.verify(model, x, lambda out: F.cross_entropy(out, labels)).ok


class Heads(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        self.a, self.b, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(5, n)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.one(h), self.two(h)


@pytest.mark.parametrize("n", [4, 2])
def test_each_output_layer_has_a_matrix(n):
    model = seeded(Heads, n)
    plain = copy.deepcopy(model)
    scale = {"a": 1.0, "b": 0.3, "one": 0.5, "two": 0.9}
    rule = "dkp(lr=0.5, decay=0.1, normalise=False)"
    rewire.convert(model, rule, feedback="shared", scale=scale, seed=SEED, output=["one", "two"])
    M = {"one": drawn_M(5), "two": drawn_M(5, "@two", n)}
    for seed in range(3):
        x = randn(6, 3, seed=seed)
        h = torch.tanh(plain.a(x)).detach()
        g = torch.tanh(plain.b(h)).detach()
        e = {}
        for name in M:
            y = plain.get_submodule(name)(g).detach().requires_grad_()
            F.cross_entropy(y, torch.arange(6) % y.shape[1]).backward()
            e[name] = y.grad.numpy()
        outputs = model(x)
        sum(F.cross_entropy(y, torch.arange(6) % y.shape[1]) for y in outputs).backward()
        for name in M:
            below, above = scale["b"] * M[name][:, :4], scale[name] * M[name]
            alone = {
                "b": below - 0.5 * (e[name].T @ h.numpy() + 0.1 * below),
                name: above - 0.5 * (e[name].T @ g.numpy() + 0.1 * above),
            }
            M[name] = agreed(M[name], alone, scale)
    used = rewire.feedback(model)
    np.testing.assert_allclose(used["b@one"], 0.3 * M["one"][:, :4], atol=TOL, rtol=0)
    np.testing.assert_allclose(used["b@two"], 0.3 * M["two"][:, :4], atol=TOL, rtol=0)
    np.testing.assert_allclose(used["one"], 0.5 * M["one"], atol=TOL, rtol=0)
    np.testing.assert_allclose(used["two"], 0.9 * M["two"], atol=TOL, rtol=0)


def test_a_cap_is_one_of_b_of_all_output_layers_together():
    model = seeded(Heads)
    scale = {"a": 1.0, "b": 3.0, "one": 0.5, "two": 0.5}  # so it is b whose cap binds
    rewire.convert(model, "fitted(every=1, cap=0.3)", feedback="shared", scale=scale, output=["one", "two"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tight = []
    for seed in range(6):
        optimizer.zero_grad()
        sum(F.cross_entropy(y, torch.arange(6) % y.shape[1]) for y in model(randn(6, 3, seed=seed))).backward()
        optimizer.step()
        B, kept = rewire.feedback(model), model.state_dict()
        norms = {
            "b": torch.cat([B["b@one"], B["b@two"]]).norm(),
            "one": B["one"].norm(),
            "two": B["two"].norm(),
        }
        share = {name: float(norm / (0.3 * kept[f"{name}.rewire_first"])) for name, norm in norms.items()}
        assert max(share.values()) <= 1 + 1e-12
        tight.append(max(share.values()))
        for name, other in (("B", "one"), ("B_at_two", "two")):
            mine = kept[f"b.rewire_{name}"]
            assert torch.equal(kept[f"{other}.rewire_{name}"][: len(mine)], mine)
        assert share["b"] == max(share.values())
    assert max(tight) > 1 - 1e-9


def test_errors_of_other_numbers_of_outputs_have_another_matrix():
    """A count sketch leaves two numbers of an error of four."""
    model, ours, optimizer = begin(
        "dkp(lr=0.2, decay=0.3, normalise=False)", layers={"4": "fitted(every=2, sketch=2, cap=0)"}
    )
    M = drawn_M(7)
    for x, labels in batches(5):
        ours = Ours(model, M)
        e = ours.run(x.numpy(), labels.numpy())
        train_step(model, optimizer, x, labels)
        M = agreed(M, {at: ours.B[at] - 0.2 * (e.T @ ours.xs[at] + 0.3 * ours.B[at]) for at in (1, 3)})
        used = rewire.feedback(model)
        assert used["4"].shape == (2, 3)
        for at in (1, 3):
            np.testing.assert_allclose(used[NAME[at]], SCALES[at] * M[:, : WIDTH[at]], atol=TOL, rtol=0)


class Both(nn.Module):
    """Two inputs, of which the second may not be there."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, x, y=None):
        return self.first(x) if y is None else self.first(x) + self.second(y)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.both, self.head = nn.Linear(3, 4), nn.Linear(3, 5), Both(), nn.Linear(6, 4)

    def forward(self, x, two):
        h, g = torch.tanh(self.a(x)), torch.tanh(self.g(x))
        return self.head(torch.tanh(self.both(h, g) if two else self.both(h)))


def test_every_input_of_a_layer_has_columns_of_its_own():
    model = seeded(TwoInputs)
    plain = copy.deepcopy(model)
    rule = "dkp(lr=0.5, decay=0.1, normalise=False)"
    scale = {"a": 1.0, "g": 1.0, "both": 0.3, "head": 0.8}
    rewire.convert(model, rule, feedback="shared", blocks=["both"], scale=scale, seed=SEED)
    M = drawn_M(6)
    for seed, two in enumerate([True, False, True, False]):
        x, labels = randn(6, 3, seed=seed), torch.arange(6) % 4
        h, g = (torch.tanh(layer(x)).detach() for layer in (plain.a, plain.g))
        top = torch.tanh(plain.both(h, g) if two else plain.both(h)).detach()
        y = plain.head(top).detach().requires_grad_()
        F.cross_entropy(y, labels).backward()
        e = y.grad.numpy()
        F.cross_entropy(model(x, two), labels).backward()
        alone = {}
        for name, inputs in (
            {"both": h, "both second": g, "head": top}.items() if two else {"both": h, "head": top}.items()
        ):
            B = scale[name.split()[0]] * M[:, : inputs.shape[1]]
            alone[name] = B - 0.5 * (e.T @ inputs.numpy() + 0.1 * B)
        M = agreed(M, alone, scale | {"both second": 0.3})
        kept = model.state_dict()
        for name, columns in {"both.rewire_B": 4, "both.rewire_B_1": 5, "head.rewire_B": 6}.items():
            np.testing.assert_allclose(kept[name].T, M[:, :columns], atol=TOL, rtol=0)


class Overflows(Mine):
    def gather(self, rows):
        return {"G": rows.e.T @ rows.summed() * (float("inf") if rows.summed().shape[1] == 3 else 1)}


def test_a_layer_whose_sums_are_not_finite_counts_for_nothing():
    model, ours, optimizer = begin(Overflows())
    with pytest.warns(rewire.RewireWarning, match=r"'4'.*not finite, and is left out"):
        for x, labels in batches(3):
            e = ours.run(x.numpy(), labels.numpy())
            before = ours.B
            ours.step()
            train_step(model, optimizer, x, labels)
            ours.M = agreed(ours.M, {at: before[at] + e.T @ ours.xs[at] for at in (1, 3)})
            check(model, ours)


class Sometimes(nn.Module):
    """``wide`` is asked for: it may run in some passes only, or for the first time after others have learned."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.grow, self.wide = nn.Linear(3, 9), nn.Linear(9, 6)

    def forward(self, x, wide):
        h = self.b(torch.tanh(self.a(x)))
        if wide:
            h = h + self.wide(torch.tanh(self.grow(x)))
        return self.head(torch.tanh(h))


def test_layers_that_do_not_run_in_every_pass():
    """What did not run has learned nothing, and follows; M has its other columns once it runs."""
    model = seeded(Sometimes)
    plain = copy.deepcopy(model)
    scale = {"a": 1.0, "grow": 1.0, "b": 0.3, "wide": 0.5, "head": 0.8}
    rewire.convert(model, "dkp(lr=0.5, decay=0.1, normalise=False)", feedback="shared", scale=scale, seed=SEED)
    M = drawn_M(9)
    for step, wide in enumerate([False, False, True, True, False, True]):
        x, labels = randn(6, 3, seed=step), torch.arange(6) % 4
        inputs = {"b": torch.tanh(plain.a(x)).detach(), "wide": torch.tanh(plain.grow(x)).detach()}
        h = plain.b(inputs["b"]) + (plain.wide(inputs["wide"]) if wide else 0)
        inputs["head"] = torch.tanh(h).detach()
        y = plain.head(inputs["head"]).detach().requires_grad_()
        F.cross_entropy(y, labels).backward()
        e = y.grad.numpy()
        model.zero_grad()
        F.cross_entropy(model(x, wide), labels).backward()
        if wide:  # in this very pass: before anything is learned of it
            fed = e @ (0.5 * M)
            delta = torch.from_numpy(fed) * (1 - inputs["wide"] ** 2)
            torch.testing.assert_close(model.grow.weight.grad, delta.T @ x, atol=TOL, rtol=0)
        alone = {}
        for name in ("b", "wide", "head") if wide else ("b", "head"):
            B = scale[name] * M[:, : inputs[name].shape[1]]
            alone[name] = B - 0.5 * (e.T @ inputs[name].numpy() + 0.1 * B)
        M = agreed(M, alone, scale)
        used = rewire.feedback(model)
        for name in ("b", "wide", "head") if step >= 2 else ("b", "head"):
            columns = inputs[name].shape[1]
            np.testing.assert_allclose(used[name], scale[name] * M[:, :columns], atol=TOL, rtol=0)


def test_fits_that_are_not_taken_in_by_a_layer_do_not_lift_its_cap():
    """A layer that did not run has its norm bounded too, when M is what others have learned."""
    model = seeded(Sometimes)
    scale = {"a": 1.0, "grow": 1.0, "b": 0.3, "wide": 5.0, "head": 0.8}
    rewire.convert(model, "fitted(every=1, cap=1.0)", feedback="shared", scale=scale, seed=SEED)
    labels = torch.arange(6) % 4
    for step, wide in enumerate([True, False, False, True, False]):
        F.cross_entropy(model(randn(6, 3, seed=step), wide), labels).backward()
        used, kept = rewire.feedback(model), model.state_dict()
        for name in ("b", "wide", "head"):
            assert float(used[name].norm()) <= float(kept[f"{name}.rewire_first"]) * (1 + 1e-12)
            columns = kept[f"{name}.rewire_B"]
            assert torch.equal(kept["wide.rewire_B"][: len(columns)], columns)


def test_a_branch_that_starts_at_zero_caps_nobody():
    """Its first fit is zero, and says nothing about how large M may be."""
    model, labels = seeded(Sometimes), torch.arange(6) % 4
    nn.init.zeros_(model.wide.weight)
    scale = {"a": 1.0, "grow": 1.0, "b": 0.3, "wide": 0.5, "head": 0.8}
    rewire.convert(model, "fitted(every=1, cap=2.0)", feedback="shared", scale=scale, seed=SEED)
    for step in range(3):
        F.cross_entropy(model(randn(6, 3, seed=step), True), labels).backward()
        assert all(float(B.norm()) > 0.01 for B in rewire.feedback(model).values())
        assert float(model.state_dict()["wide.rewire_first"]) == 0


# -- what is kept ----------------------------------------------------------------------------------------


def trained(model, steps, first=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, labels in list(batches(first + steps))[first:]:
        train_step(model, optimizer, x.to(next(model.parameters()).dtype), labels)
    return model


def same_M(model):
    kept = {name: model.state_dict()[f"{name}.rewire_B"] for name in NAME.values()}
    return all(torch.equal(t, kept["2"][: len(t)]) for t in kept.values())


RULES = ["fitted(every=2)", "fitted(every=2, context=2)", "fitted(by='jvp', every=1)", "dkp(lr=0.2)", "grape(anchor=4)"]
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.mark.parametrize("rule", [rule for rule in RULES if "jvp" not in rule and "grape" not in rule])
def test_a_state_dict_alone_has_all_of_it(rule):
    """Of a model whose scales were measured: they are what M is multiplied by."""
    model = trained(rewire.convert(mlp(WIDTHS), rule, feedback="shared"), 5)
    kept, file = model.state_dict(), io.BytesIO()
    assert len({t.untyped_storage().data_ptr() for t in kept.values()}) == len(kept)  # nothing is in there twice
    torch.save(kept, file)
    file.seek(0)
    other = rewire.convert(mlp(WIDTHS, seed=9), rule, feedback="shared")
    other.load_state_dict(torch.load(file))
    scales = rewire.scales(model)
    assert all(rewire.scales(other)[name] == scales[name] for name in NAME.values())
    for each in (model, other):
        trained(each, 1, first=5)
    for name, B in rewire.feedback(model).items():
        torch.testing.assert_close(rewire.feedback(other)[name], B, atol=1e-12, rtol=0)


@every_rule
def test_resumed_copied_and_pickled_they_go_on_alike(rule):
    model = trained(rewire.convert(mlp(WIDTHS), rule, feedback="shared"), 5)
    other = rewire.load_config(mlp(WIDTHS, seed=5), json.loads(json.dumps(rewire.config(model))))
    other.load_state_dict(model.state_dict())
    each = [model, other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in each:
        trained(one, 6, first=5)
        assert same_M(one)
    for name, t in model.state_dict().items():
        assert all(torch.equal(t, one.state_dict()[name]) for one in each), name


def test_a_part_that_was_loaded_is_what_it_was_saved_as_and_then_agrees():
    model, ours, optimizer = begin("dkp(lr=0.2, decay=0.3, normalise=False)")
    (x, labels), (x2, labels2) = batches(2)
    train_step(model, optimizer, x, labels)
    saved = {k: v.clone() for k, v in model[4].state_dict().items()}
    before = rewire.feedback(model)
    train_step(model, optimizer, x2, labels2)
    rewire.feedback(model)  # takes in the step
    model[4].load_state_dict(saved)
    used = rewire.feedback(model)
    assert torch.equal(used["4"], before["4"]) and not torch.equal(used["2"], before["2"])
    kept = model.state_dict()
    owns = {at: kept[f"{name}.rewire_B"].numpy().T.copy() for at, name in NAME.items()}
    now = Ours(model, None)
    e = now.run(x.numpy(), labels.numpy())
    alone = {}
    for at, U in owns.items():
        B = SCALES[at] * U
        alone[at] = B - 0.2 * (e.T @ now.xs[at] + 0.3 * B)
    train_step(model, optimizer, x, labels)
    ours.M = agreed(owns[1], alone)
    assert same_M(model)
    for at, B in ours.B.items():
        np.testing.assert_allclose(rewire.feedback(model)[NAME[at]], B, atol=TOL, rtol=0)


def test_scales_survive_casts_of_the_module_to_the_last_bit():
    model = trained(rewire.convert(mlp(WIDTHS), "dkp", feedback="shared"), 2)
    scales = rewire.scales(model)
    model.to(torch.bfloat16).double()
    assert rewire.scales(model) == scales
    other = rewire.convert(mlp(WIDTHS), "dkp", feedback="shared")
    other.load_state_dict(model.state_dict())
    assert rewire.scales(other) == {name: s for name, s in scales.items() if name != "0"}


def test_a_state_saved_before_a_scale_was_measured_is_measured_after_it():
    model = rewire.convert(mlp(WIDTHS), "dkp", feedback="shared", output="6")
    x, labels = next(batches(1))
    with pytest.warns(rewire.RewireWarning, match="not finite"):
        (F.cross_entropy(model(x), labels) * float("inf")).backward()
        kept = model.state_dict()
    assert "2.rewire_B" in kept and not any("scaled_by" in name for name in kept)
    other = rewire.convert(mlp(WIDTHS), "dkp", feedback="shared", output="6")
    other.load_state_dict(kept)
    whole = rewire.convert(mlp(WIDTHS), "dkp", feedback="shared", output="6")
    trained(other, 3), trained(whole, 3)
    assert rewire.scales(other) == rewire.scales(whole)
    for name, B in rewire.feedback(whole).items():
        assert torch.equal(rewire.feedback(other)[name], B)


@every_rule
def test_plain_checkpoints_load_and_restore_strips(rule):
    model, plain = trained(rewire.convert(mlp(WIDTHS), rule, feedback="shared"), 5), mlp(WIDTHS).state_dict()
    before = rewire.feedback(model)
    model.load_state_dict(plain)
    assert all(torch.equal(B, before[name]) for name, B in rewire.feedback(model).items())
    rewire.restore(model)
    assert list(model.state_dict()) == list(plain) and type(model[0]) is nn.Linear


def test_a_layer_back_under_its_rule_has_what_the_others_learned_meanwhile():
    rule = "dkp(lr=0.2)"
    model = rewire.convert(mlp(WIDTHS), rule, layers={"4": f"switch(first={rule}, then=dfa, at=2)"}, feedback="shared")
    trained(model, 6)
    assert same_M(model)  # kept up to date, though what is handed back is drawn
    drawn = torch.from_numpy(drawn_M(3, seed=0)) * rewire.scales(model)["4"]
    torch.testing.assert_close(rewire.feedback(model)["4"], drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_every_layers_columns(dtype):
    """float32 learns in place; of fewer bits there is a copy."""
    model = rewire.convert(mlp(WIDTHS).to(dtype), "dkp", feedback="shared", scale=0.3)
    x = torch.zeros(6, 5, dtype=dtype)
    expected = rewire.summary(model, x)
    trained(model, 3)
    states = [states_of(model.get_submodule(name))[0] for name in NAME.values()]
    tensors = {id(t): t.nbytes for s in states for n, t in s.learned.items() if n in ("rewire_B", "rewire_unit")}
    tensors |= {id(B.own): B.own.nbytes for s in states for B in s.made.values()}
    found = rewire.summary(model)
    each = 4 if dtype is torch.float32 else 6
    assert {row.name: row.feedback_bytes for row in found.rows} == {
        "0": 0,
        "2": 28 * each + 4,  # and dkp's u
        "4": 12 * each + 4,
        "6": 24 * each + 4,
    }
    assert found.common_bytes == expected.common_bytes == 0 and expected.feedback_bytes == found.feedback_bytes
    assert sum(tensors.values()) == found.feedback_bytes
    assert not any("shared" in str(key) for key in states[0].wiring.common)
    fixed = rewire.convert(mlp(WIDTHS).to(dtype), "dkp", layers={"2": "dfa"}, feedback="shared", scale=0.3)
    trained(fixed, 3)
    assert rewire.summary(fixed).common_bytes == 28 * dtype.itemsize


def test_copies_in_fewer_bits_follow_what_others_have_learned():
    """One layer learns in each pass; what the others multiply with is made again."""
    model, _, _ = begin("fitted(by='jvp', every=1)", Shared(dtype=torch.float32))
    for step in range(6):
        trained(model, 1, first=step)
        used, kept = rewire.feedback(model), model.state_dict()
        for at, name in NAME.items():
            assert used[name].dtype is torch.float32
            expected = SCALES[at] * kept[f"{name}.rewire_B"].t()
            torch.testing.assert_close(used[name].double(), expected, atol=1e-6, rtol=0)


def test_a_configuration_brings_its_scales_into_what_is_saved():
    model, other = (rewire.convert(mlp(WIDTHS, seed=seed), "dkp", feedback="shared") for seed in (0, 1))
    trained(model, 2), trained(other, 2)
    scales = rewire.scales(model)
    assert rewire.scales(other) != scales
    rewire.load_config(other, rewire.config(model))
    trained(other, 1)
    fresh = rewire.convert(mlp(WIDTHS), "dkp", feedback="shared")
    fresh.load_state_dict(other.state_dict())
    assert all(rewire.scales(fresh)[name] == scales[name] for name in NAME.values())


def test_verify_finds_columns_that_are_not_what_was_handed_back(monkeypatch):
    model = trained(rewire.convert(mlp(WIDTHS), "fitted(every=2)", feedback="shared"), 5)
    x, labels = next(batches(1))
    real = Columns.__call__
    monkeypatch.setattr(Columns, "__call__", lambda self, rows: real(self, rows) * 1.01)
    assert not rewire.verify(model, x, lambda out: F.cross_entropy(out, labels)).ok


def test_one_layer_has_nobody_to_agree_with():
    model = mlp(WIDTHS)
    ours = Ours(model, drawn_M(7))
    rule = "dkp(lr=0.2, decay=0, normalise=False)"
    rewire.convert(model, "bp", layers={"2": rule}, feedback="shared", scale=BY_NAME, seed=SEED)
    x, labels = next(batches(1))
    e = ours.run(x.numpy(), labels.numpy())
    F.cross_entropy(model(x), labels).backward()
    np.testing.assert_allclose(rewire.feedback(model)["2"], ours.B[1] - 0.2 * e.T @ ours.xs[1], atol=TOL, rtol=0)


def test_which_layers_have_one_matrix():
    assert Shared().joint == Shared(per="element").joint == Shared(dtype=torch.bfloat16).joint != Shared("binary").joint
    assert {name for name, structure in NAMES.items() if structure.joint is not None} == {"shared"}
