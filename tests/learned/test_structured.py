"""Rules that learn, with feedback of which a structure keeps a part: low rank, and sparse.

Every layer of an MLP, in NumPy and over several optimizer steps. What a rule works on is B itself, of which a sparse
structure leaves some entries at zero, or Q of B = P Q, for which e P takes the place of e. tests/learned/test_folded.py
has images, positions and layers called twice.
"""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.learning import glance
from rewire.rules import least_squares as solver
from rewire.rules.base import LearnedDirect, Rows, _registry
from rewire.rules.least_squares import least_squares
from rewire.structures import NAMES, Dense, LowRank, Seeded, Shared, Sparse, Structure
from rewire.structures.lowrank import Squeeze
from rewire.swap import states_of

from ..plain import mlp, randn, seeded
from ..test_structures import draw, reference
from .test_direct import LR, TOL, NumpyMLP, batches, check_weights, drawn, tangent, torch_step
from .test_fitted import ridged

SCALE, SEED = 0.3, 3
NAME = {1: "2", 2: "4"}  # layers that hand back, by their number
WIDTH = {1: 7, 2: 6}
STRUCTURES = {"lowrank": LowRank(2), "sparse": Sparse(nonzeros=2), "sparse half": Sparse(density=0.5)}
RULES = [
    "fitted(every=2)",
    "fitted(every=2, context=2)",
    "fitted(by='jvp', every=1)",
    "dkp(lr=0.2, decay=0.3)",
    "grape(every=1, anchor=4)",
]
every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
every_rule = pytest.mark.parametrize("rule", RULES)


class Kept:
    """What is learned of one layer's B, as the definitions in docs/structures.md have it."""

    def __init__(self, structure, layer):
        self.P = self.there = None
        shape = (4, WIDTH[layer])
        if isinstance(structure, LowRank):
            r = structure.rank
            self.P = draw("lowrank", (4, r), "normal", seed=SEED)
            unit = draw(NAME[layer], (r, WIDTH[layer]), "normal", seed=SEED)
            self.M = (unit.astype(np.float32) * np.float32(SCALE / np.sqrt(r))).astype(float)
        else:
            self.M = reference(structure, NAME[layer], shape, scale=SCALE, seed=SEED)
            self.there = self.M != 0
            fixed = drawn(mlp(), randn(3, 5), feedback=structure, scale=SCALE, seed=SEED, output="4")[NAME[layer]]
            np.testing.assert_allclose(fixed, self.M, atol=1e-7, rtol=0)
            self.M = fixed  # to the last bit: numbers are drawn in float32

    def shown(self, e):
        return e if self.P is None else e @ self.P

    def where(self, M):
        return M if self.there is None else np.where(self.there, M, 0.0)

    @property
    def B(self):
        return self.M if self.P is None else self.P @ self.M

    def solved(self, S, R):
        """Each column's own ridge regression, on what it may hear."""
        if self.there is None:
            return np.linalg.solve(ridged(S, 0.05), R)
        there = np.repeat(self.there, len(R) // len(self.there), 0)
        found = np.zeros_like(R)
        for f in range(R.shape[1]):
            heard = np.flatnonzero(there[:, f])
            found[heard, f] = np.linalg.solve(ridged(S, 0.05)[np.ix_(heard, heard)], R[heard, f])
        return found


def begin(rule, structure):
    model = mlp()
    ours = NumpyMLP(model)
    rewire.convert(model, rule, feedback=structure, scale=SCALE, seed=SEED, output="4")
    kept = {layer: Kept(structure, layer) for layer in (1, 2)}
    return model, ours, torch.optim.SGD(model.parameters(), lr=LR), kept


def check_feedback(model, kept, tol=TOL):
    used = rewire.feedback(model)
    for layer, name in NAME.items():
        np.testing.assert_allclose(used[name], kept[layer].B, atol=tol, rtol=0)


def exact_gradients(ours, xs, e):
    found, delta = {}, e
    for layer in (2, 1):
        found[layer] = delta @ ours.W[layer]
        delta = found[layer] * (1 - xs[layer] ** 2)
    return found


@every_structure
def test_before_anything_is_learned_b_is_the_structures(structure):
    model, _, _, kept = begin("dkp(lr=0)", structure)
    x, labels = next(batches(1))
    F.cross_entropy(model(x), labels).backward()
    check_feedback(model, kept, 1e-7)
    B = rewire.feedback(model)
    fixed = rewire.convert(mlp(), "dfa", feedback=structure, scale=SCALE, seed=SEED, output="4")
    F.cross_entropy(fixed(x), labels).backward()
    for name, same in rewire.feedback(fixed).items():
        torch.testing.assert_close(B[name], same, atol=1e-8, rtol=0)  # drawn in float32, kept in float64


@pytest.mark.parametrize("normalise", [True, False])
@every_structure
def test_dkp(structure, normalise):
    model, ours, optimizer, kept = begin(f"dkp(lr=0.2, decay=0.3, normalise={normalise})", structure)
    unit = {}
    for x, labels in batches(6):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        torch_step(model, optimizer, x, labels)
        ours.step(xs, e, {layer: each.B for layer, each in kept.items()})
        check_weights(model, ours)
        for layer, each in kept.items():
            G, size = np.zeros_like(each.M), 0.0
            for s in range(len(x)):
                heard = each.shown(e[s : s + 1])[0]
                G += np.outer(heard, xs[layer][s])
                size += np.sqrt((heard**2).sum())
            u = unit.setdefault(layer, size if normalise else 1.0)
            each.M = each.where(each.M - 0.2 * (G / u + 0.3 * each.M))
        check_feedback(model, kept)


@pytest.mark.parametrize("together", [False, True])
@every_structure
def test_grape(structure, together):
    model, ours, optimizer, kept = begin(f"grape(every=1, lr=0.3, anchor=4, together={together})", structure)
    for passes, (x, labels) in enumerate(batches(8)):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        layers = [] if passes == 0 else [1, 2] if together else [[1, 2][passes % 2]]
        v = {at: tangent(NAME[at], passes, xs[at].shape, call=i, seed=SEED) for i, at in enumerate(layers)}
        J = {at: np.zeros_like(kept[at].M) for at in layers}
        for s in range(len(x)):
            u = sum(ours.jacobian(xs, at, s) @ v[at][s] for at in layers)
            for at in layers:
                J[at] += kept[at].where(np.outer(kept[at].shown(u), v[at][s]))
        exact = exact_gradients(ours, xs, e)
        torch_step(model, optimizer, x, labels)
        anchor = passes % 4 == 0
        ours.step(xs, e, None if anchor else {layer: each.B for layer, each in kept.items()})
        check_weights(model, ours)
        for layer, each in kept.items():
            if layer in J:
                size, j = np.linalg.norm(each.M), J[layer] / np.linalg.norm(J[layer])
                unit = each.M / size
                unit = unit + 0.3 * (j - (j * unit).sum() * unit)
                each.M = size * unit / np.linalg.norm(unit)
            if anchor:
                each.M = each.M * np.linalg.norm(exact[layer]) / np.linalg.norm(e @ each.B)
        check_feedback(model, kept)


@pytest.mark.parametrize("cap", [0, 0.5])
@pytest.mark.parametrize("context", [0, 3])
@every_structure
def test_fitted(structure, context, cap):
    rule = f"fitted(every=3, decay=0.7, ridge=0.05, cap={cap}, context={context})"
    model, ours, optimizer, kept = begin(rule, structure)
    state = {layer: states_of(model.get_submodule(name))[0] for layer, name in NAME.items()}
    look = {layer: glance(state[layer], context, WIDTH[layer]).numpy() for layer in kept} if context else {}
    memory, first, C = {}, {}, {}
    for passes, (x, labels) in enumerate(batches(11)):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        exact = exact_gradients(ours, xs, e)
        torch_step(model, optimizer, x, labels)
        if passes % 3 == 0:
            ours.step(xs, e, None)
        else:
            step_with_context(ours, xs, e, kept, C, look)
        check_weights(model, ours)
        if passes % 3:
            continue
        for layer, each in kept.items():
            phi = each.shown(e)
            if context:
                c = np.concatenate([np.ones((len(e), 1)), xs[layer] @ look[layer]], 1)
                phi = np.stack([np.kron(phi[s], c[s]) for s in range(len(e))])
            S, R = memory.get(layer, (0, 0))
            memory[layer] = S, R = 0.7 * S + phi.T @ phi, 0.7 * R + phi.T @ exact[layer]
            fit = each.solved(S, R)
            norm = np.linalg.norm(fit)
            first.setdefault(layer, norm)
            fit = fit * (min(1, cap * first[layer] / norm) if cap else 1)
            each.M = fit
            if context:
                fit = fit.reshape(len(R) // (1 + context), 1 + context, -1)
                each.M, C[layer] = fit[:, 0], fit[:, 1:]
                held = model.state_dict()[f"{NAME[layer]}.rewire_C"]
                np.testing.assert_allclose(held, C[layer], atol=TOL, rtol=0)
                if each.there is not None:
                    assert not C[layer][~each.there.repeat(context, 1).reshape(4, -1, context).swapaxes(1, 2)].any()
        check_feedback(model, kept)


def step_with_context(ours, xs, e, kept, C, look):
    """A step of gradient descent, layers handing back e B and what C makes of e and of their own input."""
    delta, grads = e, []
    for at in reversed(range(3)):
        grads.append((at, delta.T @ xs[at], delta.sum(0)))
        if at:
            back = e @ kept[at].B
            if at in C:
                heard, c = kept[at].shown(e), xs[at] @ look[at]
                for i in range(heard.shape[1]):
                    for j in range(c.shape[1]):
                        back = back + (heard[:, i] * c[:, j])[:, None] * C[at][i, j]
            delta = back * (1 - xs[at] ** 2)
    for at, gW, gb in grads:
        ours.W[at], ours.b[at] = ours.W[at] - LR * gW, ours.b[at] - LR * gb


@every_structure
def test_fitted_by_forward_mode(structure):
    model, ours, optimizer, kept = begin("fitted(by='jvp', every=1)", structure)
    for passes, (x, labels) in enumerate(batches(7)):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        layer = [1, 2][passes % 2]
        v = tangent(NAME[layer], passes, xs[layer].shape, seed=SEED)
        each, wrong = kept[layer], np.zeros_like(kept[layer].M)
        for s in range(len(x)):
            u = each.shown(ours.jacobian(xs, layer, s) @ v[s])
            wrong += np.outer(u - each.M @ v[s], v[s])
        torch_step(model, optimizer, x, labels)
        ours.step(xs, e, {at: other.B for at, other in kept.items()})
        check_weights(model, ours)
        if passes:
            each.M = each.M + each.where(wrong) / (len(x) + WIDTH[layer])
        check_feedback(model, kept)
