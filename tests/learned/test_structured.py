"""Rules that learn, with feedback of which a structure keeps a part: low rank, and sparse.

Every layer of an MLP, in NumPy and over several optimizer steps. What a rule works on is B itself, of which a sparse
structure leaves some entries at zero, or Q of B = P Q, for which e P takes the place of e. tests/learned/test_folded.py
has images, positions and layers called twice.
"""

from __future__ import annotations

import copy
import dataclasses
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
from rewire.rules.fitted import Fitted
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
# Of whose values tests/learned/test_shared.py has what there is to say: layers do not learn them by themselves.
ALL = STRUCTURES | {"shared": Shared()}
of_all = pytest.mark.parametrize("structure", ALL.values(), ids=ALL.keys())
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


@pytest.mark.parametrize("probe", [6, 2])
@every_structure
def test_fitted_by_forward_mode(structure, probe):
    """``probe`` takes the first samples of six."""
    model, ours, optimizer, kept = begin(f"fitted(by='jvp', every=1, probe={probe})", structure)
    for passes, (x, labels) in enumerate(batches(7)):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        layer = [1, 2][passes % 2]
        v = tangent(NAME[layer], passes, (probe, WIDTH[layer]), seed=SEED)
        each, wrong = kept[layer], np.zeros_like(kept[layer].M)
        for s in range(probe):
            u = each.shown(ours.jacobian(xs, layer, s) @ v[s])
            wrong += np.outer(u - each.M @ v[s], v[s])
        torch_step(model, optimizer, x, labels)
        ours.step(xs, e, {at: other.B for at, other in kept.items()})
        check_weights(model, ours)
        if passes:
            each.M = each.M + each.where(wrong) / (probe + WIDTH[layer])
        check_feedback(model, kept)


# -- several output layers -----------------------------------------------------------------------------


class Heads(nn.Module):
    """With rank 2 the error of ``one`` is squeezed, and that of ``two`` is not; both are in one fit."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.one(h), self.two(h)


def loss(outputs, *which):
    return sum(F.cross_entropy(outputs[i], torch.arange(len(outputs[i])) % outputs[i].shape[1]) for i in which)


@every_structure
def test_an_output_seen_later_joins_the_fit(structure):
    model, x = seeded(Heads), randn(6, 3, seed=1)
    plain = copy.deepcopy(model)
    rewire.convert(model, "fitted(every=1, decay=0.5, ridge=0.1, cap=0)", feedback=structure, scale=SCALE, seed=SEED)
    P = draw("lowrank", (4, 2), "normal", seed=SEED) if isinstance(structure, LowRank) else None
    there = np.ones((4 if P is not None else 6, 4), dtype=bool)
    if P is None:
        first = reference(structure, "b", (4, 4), seed=SEED)
        there = np.concatenate([first, reference(structure, "b@two", (2, 4), seed=SEED, output="@two")]) != 0
    S = R = 0.0
    for which in [(0,), (0,), (0, 1), (1,), (0, 1)]:
        loss(model(x), *which).backward()
        kept = []
        twin = copy.deepcopy(plain)
        twin.b.register_forward_pre_hook(lambda m, args, kept=kept: (args[0].retain_grad(), kept.append(args[0]))[0])
        outputs = twin(x)
        for y in outputs:
            y.retain_grad()
        loss(outputs, *which).backward()
        e = [np.zeros(y.shape) if y.grad is None else y.grad.numpy() for y in outputs]
        e = np.concatenate([e[0] if P is None else e[0] @ P, e[1]], 1)
        S, R = 0.5 * S + e.T @ e, 0.5 * R + e.T @ kept[0].grad.numpy()
    fit = np.zeros(there.shape)
    for f in range(4):
        heard = np.flatnonzero(there[:, f])
        fit[heard, f] = np.linalg.solve(ridged(S, 0.1)[np.ix_(heard, heard)], R[heard, f])
    used = rewire.feedback(model)
    one, two = np.split(fit, [len(fit) - 2])
    np.testing.assert_allclose(used["b@one"], one if P is None else P @ one, atol=TOL, rtol=0)
    np.testing.assert_allclose(used["b@two"], two, atol=TOL, rtol=0)


@pytest.mark.parametrize("structure", [NAMES["dense"], LowRank(2)], ids=["dense", "lowrank"])
def test_what_was_gathered_of_fewer_outputs_is_left_out(structure):
    """Two backwards of one forward, the second of which shows an output more."""
    model, x = seeded(Heads), randn(6, 3, seed=1)
    plain = copy.deepcopy(model)
    rewire.convert(model, "fitted(every=1, ridge=0.1, cap=0)", feedback=structure, scale=SCALE, seed=SEED)
    outputs = model(x)
    loss(outputs, 0).backward(retain_graph=True)
    loss(outputs, 1).backward()
    h = torch.tanh(plain.a(x)).detach().requires_grad_()
    out = plain.two(torch.tanh(plain.b(h)))
    out.retain_grad()
    loss((None, out), 1).backward()
    S = out.grad.numpy().T @ out.grad.numpy()
    wide = 4 if structure is NAMES["dense"] else 2  # of the other, whose error is zero
    S = np.pad(S, (wide, 0))
    fit = np.linalg.solve(ridged(S, 0.1), np.pad(out.grad.numpy().T @ h.grad.numpy(), ((wide, 0), (0, 0))))
    np.testing.assert_allclose(rewire.feedback(model)["b@two"], fit[wide:], atol=TOL, rtol=0)


@of_all
@every_rule
def test_passes_of_one_output_and_then_of_two(rule, structure):
    model, x = seeded(Heads), randn(6, 3, seed=1)
    rewire.convert(model, rule, feedback=structure)
    for which in [(0,), (0,), (0,), (0, 1), (1,), (0, 1), (1,), (0, 1)]:
        loss(model(x), *which).backward()
    result = rewire.verify(model, (x,), lambda outputs: loss(outputs, 0, 1))
    assert result.ok, result


# -- what learns, and what is kept of it ---------------------------------------------------------------


def trained(model, steps, first=0, shape=(6, 5)):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, labels in list(batches(first + steps, shape))[first:]:
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(next(model.parameters()).dtype)), labels).backward()
        optimizer.step()
    return model


def cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4))


@pytest.mark.parametrize("per", ["channel", "element"])
@every_rule
def test_sparse_feedback_stays_as_sparse_as_it_was_drawn(rule, per):
    model = seeded(cnn)
    structure = Sparse(nonzeros=1, per=per)
    rewire.convert(model, rule, feedback=structure, seed=SEED)
    trained(model, 7, shape=(6, 2, 4, 4))
    B = rewire.feedback(model)["2"]
    assert B.shape == ((4, 3, 3, 3) if per == "element" else (4, 3))
    start = torch.from_numpy(reference(structure, "2", tuple(B.shape), seed=SEED))
    assert torch.equal(B != 0, start != 0)
    assert not torch.allclose(B / B.norm(), start / start.norm())
    kept = model.get_buffer("2.rewire_B")
    assert kept.shape == (B[0].numel(), 1) and torch.equal(kept.sort(0).values, B[B != 0][:, None].sort(0).values)
    size = kept.numel() * (8 + 4)
    rows = {row.name: row for row in rewire.summary(model).rows}
    assert rows["2"].feedback_bytes == size + beside_B(model, "2")


def beside_B(model, name):
    """Bytes of what the rule keeps for a layer besides B: counts are no part of it."""
    own = ("rewire_B", "rewire_passes", "rewire_origin", "rewire_scaled_by")
    return sum(t.nbytes for key, t in model.get_submodule(name)._buffers.items() if "rewire_" in key and key not in own)


@every_rule
def test_low_rank_feedback_keeps_q_alone(rule):
    model = seeded(cnn)
    rewire.convert(model, rule, feedback="lowrank", seed=SEED, layers={"2": f"{rule[:-1]}, feedback=LowRank(rank=3))"})
    trained(model, 7, shape=(6, 2, 4, 4))
    assert model.get_buffer("2.rewire_B").shape == (3, 3)
    assert model.get_buffer("5.rewire_B").shape == (4, 16)  # four outputs are fewer than the rank: all of B
    P = torch.from_numpy(draw("lowrank", (4, 3), "normal", seed=SEED))
    torch.testing.assert_close(rewire.feedback(model)["2"], P @ model.get_buffer("2.rewire_B"), atol=1e-12, rtol=0)
    rows = {row.name: row for row in rewire.summary(model).rows}
    assert rows["2"].feedback_bytes == 3 * 3 * 8 + beside_B(model, "2")
    assert rewire.summary(model).common_bytes == 4 * 3 * 8


@every_rule
def test_e_is_squeezed_once_in_a_pass(rule, monkeypatch):
    """Not once for each layer, nor once more for learning."""
    calls = []
    real = Squeeze.__call__
    monkeypatch.setattr(Squeeze, "__call__", lambda self, *args: (calls.append(self), real(self, *args))[1])
    model = rewire.convert(mlp((5, 7, 6, 6, 6, 4)), rule, feedback=LowRank(2))
    trained(model, 5)
    calls.clear()
    trained(model, 8, first=5)
    probes = 8 if "jvp" in rule or "grape" in rule else 0
    anchors_only = sum((5 + i) % 4 != 0 for i in range(8)) if "grape" in rule else 8
    assert 8 <= len(calls) <= 8 + probes and len(calls) >= anchors_only + probes
    assert len({id(one) for one in calls}) == 1


@of_all
def test_nothing_is_made_again_when_something_was_learned(structure):
    model = rewire.convert(mlp(), "dkp", feedback=structure, scale=SCALE)
    trained(model, 2)
    (state,) = states_of(model[4])
    before = list(map(id, state.made.values()))
    trained(model, 3)
    assert before == list(map(id, state.made.values()))


def test_gradients_of_gradients_see_e_times_p():
    """Learning looks at e P before it is handed back, and must not cut it off."""
    found = []
    for rule in ("dkp(lr=0, decay=0)", "dfa"):
        model = rewire.convert(mlp(), rule, feedback=LowRank(2), scale=SCALE)
        trained(model, 2)
        x, labels = next(batches(1))
        out = model(x)
        (g,) = torch.autograd.grad(F.cross_entropy(out, labels), model[0].weight, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), model[4].weight)[0])
    assert not torch.equal(found[0], torch.zeros_like(found[0]))
    torch.testing.assert_close(*found, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@of_all
def test_what_is_kept_in_fewer_bits_learns_in_more(structure, dtype):
    """Steps of one in ten thousand add up."""
    model = mlp() if dtype is torch.float32 else mlp().to(torch.bfloat16)
    if dtype is torch.float32:
        structure = dataclasses.replace(structure, dtype=torch.bfloat16)
    rewire.convert(model, "dkp(lr=1e-4, decay=1.0)", feedback=structure, scale=SCALE)
    trained(model, 2)
    kept = model.get_buffer("4.rewire_B")
    assert kept.dtype is (torch.float64 if dtype is torch.float32 else torch.float32)
    before = kept.clone()
    trained(model, 3)
    assert not torch.equal(before, model.get_buffer("4.rewire_B"))
    assert rewire.feedback(model)["4"].dtype is torch.bfloat16
    rows = {row.name: row for row in rewire.summary(model).rows}
    numbers = 4 if isinstance(structure, Sparse) else 0  # of rows
    assert rows["4"].feedback_bytes == kept.numel() * (kept.element_size() + 2 + numbers) + beside_B(model, "4")
    assert float((model.get_buffer("4.rewire_B") / before - 1).abs()[before != 0].max()) < 2e-2


@pytest.mark.parametrize("sketch", [8, 100])
def test_errors_of_many_outputs_are_sketched_and_then_squeezed(sketch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 40)).double()
    rule = Fitted(sketch=sketch, every=2, ridge=0.1, cap=0)
    rewire.convert(model, rule, feedback=LowRank(3), seed=SEED)
    x, y = randn(20, 6), torch.arange(20)
    twin = copy.deepcopy(rewire.restore(copy.deepcopy(model)))
    F.cross_entropy(model(x), y).backward()
    h = twin[1](twin[0](x)).detach().requires_grad_()
    out = twin[2](h)
    out.retain_grad()
    F.cross_entropy(out, y).backward()
    P = draw("lowrank", (min(sketch, 40), 3), "normal", seed=SEED)
    e = rule.signal(out.grad, None, 1).numpy() @ P
    Q = np.linalg.solve(ridged(e.T @ e, 0.1), e.T @ h.grad.numpy())
    np.testing.assert_allclose(rewire.feedback(model)["2"], P @ Q, atol=TOL, rtol=0)


def step_streamed(model, x, labels):
    rewire.backward_streamed(model, x, lambda out: F.cross_entropy(out, labels))


@of_all
@every_rule
def test_streamed(rule, structure):
    """The second of two forwards is the one that counts."""
    options = {"feedback": structure, "scale": SCALE, "output": "4", "skip": "cut"}
    models = [rewire.convert(mlp(), rule, **options) for _ in range(2)]
    for x, labels in batches(5):
        models[0].zero_grad()
        F.cross_entropy(models[0](x), labels).backward()
        models[1].zero_grad()
        step_streamed(models[1], x, labels)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-10, rtol=0)
            with torch.no_grad():
                p -= 0.1 * p.grad
                q -= 0.1 * q.grad
    for name, B in rewire.feedback(models[0]).items():
        torch.testing.assert_close(rewire.feedback(models[1])[name], B, atol=1e-10, rtol=0)


# -- around it -----------------------------------------------------------------------------------------


@of_all
@every_rule
def test_a_state_dict_resumes_to_the_bit_and_copies_go_on_alike(rule, structure):
    model = trained(rewire.convert(mlp(), rule, feedback=structure), 5)
    other = rewire.load_config(mlp(seed=5), json.loads(json.dumps(rewire.config(model))))
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    copied = copy.deepcopy(model)
    for each in (model, other, copied):
        trained(each, 6, first=5)
    for name, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name
        assert torch.equal(t, copied.state_dict()[name]), name


@pytest.mark.parametrize("what", [*ALL, "context"])
def test_what_was_learned_under_another_seed_does_not_load(what):
    """What goes with it is made from the seed: P of a low rank, which entries there are, P that looks at the input."""
    rule, structure = ("fitted(every=2, context=3)", "dense") if what == "context" else ("fitted(every=2)", ALL[what])
    model = trained(rewire.convert(mlp(), rule, feedback=structure, seed=1), 3)
    other = rewire.convert(mlp(), rule, feedback=structure, seed=2)
    with pytest.raises(RuntimeError, match=r"'2'.*another seed than 2"):
        other.load_state_dict(model.state_dict())
    again = rewire.convert(mlp(), rule, feedback=structure, seed=1)
    again.load_state_dict(model.state_dict())
    dense = trained(rewire.convert(mlp(), "fitted(every=2)", seed=1), 3)  # all of it is there: any seed will do
    rewire.convert(mlp(), "fitted(every=2)", seed=2).load_state_dict(dense.state_dict())


def test_every_projection_of_an_attention_says_that_its_seed_is_another():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 6), nn.Linear(4, 5)
            self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=True)

        def forward(self, x):
            h, g = torch.tanh(self.a(x)), torch.tanh(self.b(x))
            return self.head(self.attention(h, g, g)[0])

    saved, other = (rewire.convert(seeded(Attends), "dkp", feedback=LowRank(2), seed=seed) for seed in (1, 2))
    for model in (saved, other):
        for step in range(3):
            model(randn(6, 7, 3, seed=step)).square().mean().backward()
    with pytest.raises(RuntimeError) as problem:
        other.load_state_dict(saved.state_dict())
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert f"'attention.{name}': what its feedback has learned goes with random numbers of another" in str(
            problem.value
        )


@of_all
@every_rule
def test_verify_alignment_and_restore(rule, structure):
    model = trained(rewire.convert(mlp(), rule, feedback=structure), 5)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    x, labels = next(batches(1))
    loss_fn = lambda out: F.cross_entropy(out, labels)  # noqa: E731
    assert rewire.verify(model, x, loss_fn).ok
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rewire.alignment(model, x, loss_fn)
    assert all(layer.weight_angle is not None for layer in found.layers)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    plain = mlp().state_dict()
    model.load_state_dict(plain)
    rewire.restore(model)
    assert list(model.state_dict()) == list(plain)


def test_verify_finds_a_q_that_does_not_go_with_what_was_handed_back(monkeypatch):
    from rewire.structures.lowrank import Product

    model = trained(rewire.convert(mlp(), "fitted(every=2)", feedback=LowRank(2)), 5)
    x, labels = next(batches(1))
    real = Product.__call__
    monkeypatch.setattr(Product, "__call__", lambda self, rows: real(self, rows) * 1.01)
    assert not rewire.verify(model, x, lambda out: F.cross_entropy(out, labels)).ok


@of_all
def test_for_a_while_by_use_rule(structure):
    model = trained(rewire.convert(mlp(), "dfa", feedback=structure, scale=SCALE), 2)
    before = rewire.feedback(model)["4"].clone()
    with rewire.use_rule(model, "dkp"):
        trained(model, 3)
        learned = rewire.feedback(model)["4"]
        assert not torch.allclose(before, learned)
    assert torch.equal(rewire.feedback(model)["4"], before)
    with rewire.use_rule(model, "dkp"):
        assert torch.equal(rewire.feedback(model)["4"], learned)


@of_all
def test_compiled_models_run_such_layers_outside_of_the_graph(structure):
    models = [trained(rewire.convert(mlp(), "dkp", feedback=structure), 3) for _ in range(2)]
    compiled = torch.compile(models[0], backend="eager")
    for model, run in zip(models, (compiled, models[1]), strict=True):
        for x, labels in batches(3, seed=9):
            model.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rewire.RewireWarning)
                F.cross_entropy(run(x), labels).backward()
    for name, t in models[1].state_dict().items():
        assert torch.equal(t, models[0].state_dict()[name]), name


@pytest.mark.parametrize("rule", ["fitted", "dkp", "grape", "switch(first=bp, then=dkp, at=3)"])
@pytest.mark.parametrize(
    ("structure", "why"),
    [
        ("seeded", "keeps nothing"),
        (Dense("ternary", dtype=torch.int8), "keeps signs"),
    ],
)
def test_what_cannot_learn_says_why_and_what_can(rule, structure, why):
    model = mlp()
    message = f"layer '0': .*{why}.*'dense', 'channel'.*'sparse', 'lowrank', 'shared'$"
    with pytest.raises(rewire.ConversionError, match=message):
        rewire.convert(model, rule, feedback=structure)
    assert type(model[0]) is nn.Linear
    with pytest.raises(rewire.ConversionError, match=message.replace("'0'", "'2'")):
        rewire.convert(model, "bp", layers={"2": rule}, feedback=structure)
    rewire.convert(model, "dfa", feedback=structure)
    with pytest.raises(rewire.ConversionError, match=why), rewire.use_rule(model, rule):
        pass


def test_a_structure_of_the_rules_own_is_what_counts():
    with pytest.raises(rewire.ConversionError, match=r"layer '2'.*Seeded\(\) keeps nothing"):
        rewire.convert(mlp(), "dkp", layers={"2": "fitted(feedback='seeded')"})
    rewire.convert(mlp(), "fitted(feedback=Sparse())", feedback="seeded", layers={"0": "dfa"})


@every_structure
def test_a_rule_of_ones_own_learns_with_them(structure):
    """It need not know of structures at all."""
    seen, masks = [], []

    class Mine(LearnedDirect):
        watches = True

        def signal(self, error, targets, axis):
            return error

        def gather(self, rows: Rows):
            masks.append(rows.mask())
            return {"G": rows.e.T @ rows.summed()}

        def learn(self, B, memory, sums):
            assert memory == {} and sums.keys() - {"mask"} == {"G", "samples"}
            masks.append(sums.get("mask"))
            seen.append(tuple(B.shape))
            return B + sums["G"]

    Mine.name = "mine"
    model = rewire.convert(mlp(), Mine(), feedback=structure, scale=SCALE, seed=SEED, output="4")
    kept = {layer: Kept(structure, layer) for layer in (1, 2)}
    ours = NumpyMLP(mlp())
    for x, labels in batches(4):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        F.cross_entropy(model(x), labels).backward()
        for layer, each in kept.items():
            each.M = each.where(each.M + each.shown(e).T @ xs[layer])
        check_feedback(model, kept)
    assert set(seen) == {kept[1].M.shape, kept[2].M.shape} and masks
    for mask in masks:
        layer = next((i for i, width in WIDTH.items() if mask is not None and mask.shape[1] == width), 1)
        assert (mask is None) == (kept[layer].there is None)
        assert mask is None or np.array_equal(mask, kept[layer].there)
    assert "mine" not in _registry


class Reversed(Structure):
    """Of one's own; with :attr:`fixed` it says that its plain tensor may learn."""

    per, dtype = "channel", None

    def __init__(self, fixed=None):
        self._fixed = fixed

    def __repr__(self):
        return "Reversed()"

    def make(self, place):
        return Dense(per="channel").make(place).flip(0)

    @property
    def fixed(self):
        return super().fixed if self._fixed is None else self._fixed

    def size(self, shape, itemsize):
        return 0


def test_a_structure_of_ones_own():
    with pytest.raises(rewire.ConversionError, match=r"Reversed\(\) does not say that what it keeps can learn"):
        rewire.convert(mlp(), "dkp", feedback=Reversed())
    dense, ours = (
        trained(rewire.convert(mlp(), "dkp", feedback=feedback, scale=SCALE, seed=SEED), 1)
        for feedback in (Dense(per="channel"), Reversed(""))
    )
    x = randn(3, 5)
    for model in (dense, ours):
        with rewire.use_rule(model, "dfa"):
            model(x).sum().backward()
    torch.testing.assert_close(rewire.feedback(ours)["4"], model.get_buffer("4.rewire_B").clone())
    assert not torch.allclose(rewire.feedback(ours)["4"], rewire.feedback(dense)["4"])


def test_learned_feedback_that_does_not_fit_any_more_is_said():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(2, 3, 2), nn.Conv2d(3, 5, 2), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))).mean((2, 3)))

    model = rewire.convert(seeded(Pooled), "dkp", scale=SCALE)
    trained(model, 2, shape=(6, 2, 5, 5))
    with pytest.warns(rewire.RewireWarning, match=r"'b': .*\(4, 3, 4, 4\), does not fit.*\(4, 3, 5, 5\).*channel"):
        trained(model, 2, shape=(6, 2, 6, 6))


# -- least squares -------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 40, 2**24])
def test_least_squares_of_columns_with_different_numbers_of_entries(most, monkeypatch):
    monkeypatch.setattr(solver, "_MOST", most)
    E = randn(20, 6, seed=1)
    S, R = E.T @ E + 0.1 * torch.eye(6, dtype=torch.float64), randn(6, 9, seed=2)
    mask = randn(6, 9, seed=3) > 0.3
    mask[:, 4], mask[:, 5], mask[:, 6] = False, True, torch.arange(6) == 2
    B = least_squares(S, R, mask)
    for f in range(9):
        heard = mask[:, f].nonzero()[:, 0].numpy()
        wanted = np.zeros(6)
        wanted[heard] = np.linalg.solve(S.numpy()[np.ix_(heard, heard)], R.numpy()[heard, f])
        np.testing.assert_allclose(B[:, f], wanted, atol=1e-10, rtol=0)
    assert not least_squares(S, R, torch.zeros_like(mask)).any()
    torch.testing.assert_close(least_squares(S, R, torch.ones_like(mask)), torch.linalg.solve(S, R))


def test_which_structures_learn():
    assert {name for name, structure in NAMES.items() if structure.fixed} == {"seeded"}
    assert Seeded("binary").fixed and not LowRank(3).fixed and not Sparse(nonzeros=1).fixed and not Shared().fixed
