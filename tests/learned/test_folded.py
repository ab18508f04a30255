"""Learned direct feedback where rows of a layer's input are more than samples, or lie in another order.

Frames of a video folded into the batch, two batches behind one another, one layer called twice, sequences first: what B
learns is compared with plain loops over gradients of plain autograd, on an unconverted copy of the model, for several
optimizer steps; and what is handed back with the same copy, whose gradient is replaced at that one layer.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewire
from rewire.feedback import quick_normal
from rewire.learning import glance
from rewire.structures import NAMES, LowRank, Sparse
from rewire.swap import states_of

from ..plain import randn, seeded
from ..test_structures import draw, reference

N, T, CLASSES = 3, 4, 4
PICKED = [2, 0]
Array = np.ndarray


class Frames(nn.Module):
    """(N, T, C, H, W): convolutions see N T images; the mean over a video's frames is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 3, 2), nn.Conv2d(3, 5, 2), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.tanh(self.a(x.flatten(0, 1)))).tanh().mean((2, 3))
        return self.head(h.unflatten(0, x.shape[:2]).mean(1))


class FoldedLinear(nn.Module):
    """The same with vectors for images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.tanh(self.a(x.flatten(0, 1)))).tanh()
        return self.head(h.unflatten(0, x.shape[:2]).mean(1))


class Stacked(nn.Module):
    """(2, N, C, H, W): both images of each pair through one trunk, in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 3, 2), nn.Conv2d(3, 5, 2), nn.Linear(5, CLASSES)

    def trunk(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).tanh().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.trunk(torch.cat([x[0], x[1]])).chunk(2)
        return self.head(one * other)


class StackedLinear(Stacked):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 5)

    def trunk(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).tanh()


class Twice(Stacked):
    """The trunk is called once for each."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x[0]) * self.trunk(x[1]))


class Picked(Frames):
    """(N, C, H, W): some images are picked by index, and what becomes of them goes back to where they came from."""

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor(PICKED)
        h = self.b(torch.tanh(self.a(x))[index]).tanh().mean((2, 3))
        return self.head(h.new_zeros(len(x), 5).index_add(0, index, h))


class SequenceFirst(nn.Module):
    """(T, N, F)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.tanh(self.a(x))).tanh().mean(0))


class Transformer(nn.Module):
    """PyTorch's own layers, whose default is sequence first; ``b`` is the wide layer of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.a(x)).mean(0))


@dataclass
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    owner: list[int]  # which sample each image, or each row, of a call is of
    name: str = "b"
    whole: bool = False  # images: B has a value for every element


VIDEO = [i // T for i in range(N * T)]
PAIRS = [*range(N), *range(N)]
SEQUENCE = [n for _ in range(T) for n in range(N)]
CASES = {
    "frames": Case(Frames, (N, T, 2, 5, 4), VIDEO, whole=True),
    "folded rows": Case(FoldedLinear, (N, T, 5), VIDEO),
    "stacked": Case(Stacked, (2, N, 2, 5, 4), PAIRS, whole=True),
    "stacked rows": Case(StackedLinear, (2, N, 5), PAIRS),
    "picked": Case(Picked, (N, 2, 5, 4), PICKED, whole=True),
    "twice": Case(Twice, (2, N, 2, 5, 4), [*range(N)], whole=True),
    "sequence first": Case(SequenceFirst, (T, N, 5), SEQUENCE),
    "transformer": Case(Transformer, (T, N, 5), SEQUENCE, "block.linear1"),
}
IMAGES = [name for name, case in CASES.items() if case.whole]


class Handed(torch.autograd.Function):
    """x, whose gradient is what it is given."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.save_for_backward(back)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None


@dataclass
class Seen:
    """One pass of plain autograd: e, and by call the layer's input and its exact gradient."""

    e: Array = field(default_factory=lambda: np.zeros(0))
    inputs: list[Array] = field(default_factory=list)
    exact: list[Array] = field(default_factory=list)


def look(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Seen:
    model = copy.deepcopy(model)
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        inputs.append(args[0].clone())  # the layer's own share, without that of a residual connection
        inputs[-1].retain_grad()
        return (inputs[-1],)

    model.get_submodule(name).register_forward_pre_hook(keep)
    out = model(x)
    out.retain_grad()
    F.cross_entropy(out, y).backward()
    assert out.grad is not None
    return Seen(out.grad.numpy(), [t.detach().numpy() for t in inputs], [t.grad.numpy() for t in inputs])


def gradients_with(model: nn.Module, name: str, x: Tensor, y: Tensor, back: list[Array]) -> dict[str, Tensor]:
    """Of all parameters, if ``name`` hands back what it is given, by call."""
    model = copy.deepcopy(model)
    given = iter(back)
    model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: (Handed.apply(args[0], torch.from_numpy(next(given))),)
    )
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def pushed(model: nn.Module, name: str, x: Tensor, tangents: list[Array]) -> Array:
    """What tangents at the inputs of a layer become at the output: derivatives in one number that scales them."""
    model = copy.deepcopy(model).requires_grad_(False)
    given = iter(tangents)
    along = torch.zeros((), dtype=torch.float64, requires_grad=True)
    model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: (args[0] + along * torch.from_numpy(next(given)),)
    )
    out = model(x)
    u = [float(torch.autograd.grad(value, along, retain_graph=True)[0]) for value in out.flatten()]
    return np.array(u).reshape(out.shape)


def positions(t: Array) -> list[Array]:
    """(features,) at each position of one image or row."""
    return [t] if t.ndim == 1 else list(np.moveaxis(t, 0, -1).reshape(-1, t.shape[0]))


def units(case: Case, t: Array, whole: bool) -> Iterator[tuple[int, Array]]:
    """Whose it is, and its numbers, for everything in a call that B has a row of values for."""
    images = t.reshape(-1, t.shape[-1]) if t.ndim < 4 else t
    for owner, image in zip(case.owner, images, strict=True):
        if whole:
            yield owner, image.reshape(-1)
        else:
            yield from ((owner, row) for row in positions(image))


def ridged(S: Array, ridge: float = 0.1) -> Array:
    d = np.diag(S)
    return S + np.diag(d * ridge + d.mean() * 1e-2 * ridge + np.finfo(np.float64).tiny)


class Training:
    """A model of which one layer is under a rule and all else under backprop, with a plain copy beside it.

    Where B is P Q, B in these tests is Q, and the rule is shown e P; where it is sparse, B has zeros that stay.
    """

    def __init__(self, case: Case, rule: str, feedback: str = "dense") -> None:
        self.case, self.name = case, case.name
        self.structure = STRUCTURES[feedback]
        self.whole = case.whole and self.structure.per == "element"
        self.P: Array | None = None
        if isinstance(self.structure, LowRank):
            self.P = draw("lowrank", (CLASSES, self.structure.rank), self.structure.distribution, seed=0)
        self.model = seeded(case.make)
        self.plain = copy.deepcopy(self.model)
        # The first layer has nothing to hand back to, whatever its rule is.
        rewire.convert(self.model, "bp", layers={"a": "dfa", case.name: rule}, feedback=self.structure, scale=0.3)
        (self.state,) = states_of(self.model.get_submodule(case.name))
        self.steps = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        self.steps += 1
        labels = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(self.steps))
        return randn(*self.case.shape, seed=self.steps), labels

    @property
    def B(self) -> Array:
        """(n, features or elements); Q is (r, features or elements)."""
        dense = rewire.feedback(self.model)[self.name].flatten(1).numpy().copy()
        if self.P is None:
            return dense
        Q = np.linalg.lstsq(self.P, dense, rcond=None)[0]  # P has independent columns
        np.testing.assert_allclose(self.P @ Q, dense, atol=1e-12, rtol=0)
        return Q

    def shown(self, e: Array) -> Array:
        return e if self.P is None else np.stack([row @ self.P for row in e])

    def kept(self, B: Array, like: Array) -> Array:
        """B where it may have entries, which is where feedback drawn by a definition written here is not zero."""
        if not isinstance(self.structure, Sparse):
            return B
        shape = (CLASSES, *(like.shape[1:] if self.whole else (like.shape[1 if self.case.whole else -1],)))
        drawn = reference(self.structure, self.name, shape, seed=0).reshape(CLASSES, -1)
        return np.where(np.repeat(drawn != 0, len(B) // CLASSES, 0), B, 0)

    def solved(self, S: Array, R: Array, like: Array, masked: bool = True) -> Array:
        """Ridge least squares; column by column where B has few entries."""
        there = self.kept(np.ones(R.shape), like) if masked else np.ones(R.shape)
        B, full = np.zeros(R.shape), ridged(S)
        for f in range(R.shape[1]):
            (rows,) = there[:, f].nonzero()
            B[rows, f] = np.linalg.solve(full[np.ix_(rows, rows)], R[rows, f])
        return B

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Train; the gradients, of which the plain copy's are taken in as well."""
        self.model.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        grads = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p -= 0.2 * grads[name]
                self.plain.get_parameter(name).copy_(p)
        return grads

    def fed(self, e: Array, x: Array, B: Array, P: Array | None = None, C: Array | None = None) -> Array:
        """e B at every place of an input, and what C makes of e and x P there."""
        back = np.zeros(x.shape)
        images = back.reshape(-1, x.shape[-1]) if x.ndim < 4 else back
        inputs = x.reshape(images.shape)
        e = self.shown(e)
        for k, owner in enumerate(self.case.owner):
            row = e[owner] @ B
            image = images[k]
            image += row.reshape(image.shape) if self.whole or image.ndim == 1 else row[:, None, None]
            if C is None or P is None:
                continue
            for place in np.ndindex(image.shape[1:]):
                c = inputs[(k, slice(None), *place)] @ P
                image[(slice(None), *place)] += np.einsum("i,j,ijf->f", e[owner], c, C)
        return back


def check_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, g in expected.items():
        torch.testing.assert_close(ours[name], g, atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


STRUCTURES = {
    "dense": NAMES["dense"],
    "channel": NAMES["channel"],
    "lowrank": LowRank(2),
    "lowrank per element": LowRank(3, per="element"),
    "sparse": Sparse(nonzeros=2),
    "sparse per element": Sparse(density=0.25, per="element", distribution="binary"),
}


def cases(*without: str) -> list[tuple[str, str]]:
    names = [name for name in CASES if name not in without]
    everywhere = [(name, feedback) for feedback in ("dense", "lowrank", "sparse") for name in names]
    of_images = [feedback for feedback in STRUCTURES if feedback not in ("dense", "lowrank", "sparse")]
    return [*everywhere, *((name, feedback) for feedback in of_images for name in names if name in IMAGES)]


@pytest.mark.parametrize(("name", "feedback"), cases())
@pytest.mark.parametrize("context", [0, 3])
def test_fitted(name: str, feedback: str, context: int) -> None:
    case = CASES[name]
    at = Training(case, f"fitted(every=2, decay=0.5, ridge=0.1, cap=0, context={context})", feedback)
    memory: dict[str, Array | float] = {"S": 0.0, "R": 0.0, "T": 0.0, "Q": 0.0}
    B, C, P = np.zeros(0), None, None
    for step in range(5):
        x, y = at.batch()
        seen = look(at.plain, at.name, x, y)
        plain = copy.deepcopy(at.plain)
        ours = at.step(x, y)
        if step % 2:  # fed back
            back = [at.fed(seen.e, x_l, B, P, C) for x_l in seen.inputs]
            check_gradients(ours, gradients_with(plain, at.name, x, y, back))
            np.testing.assert_array_equal(at.B, B)
            continue
        check_gradients(ours, gradients_with(plain, at.name, x, y, seen.exact))
        if context:
            features = seen.inputs[0].shape[1 if case.whole else -1]
            P = glance(at.state, context, features).double().numpy()
        memory = {what: 0.5 * value for what, value in memory.items()}
        e, like, n = at.shown(seen.e), seen.inputs[0], at.shown(seen.e).shape[1]
        for x_l, G in zip(seen.inputs, seen.exact, strict=True):
            S, R = 0.0, 0.0
            rows = zip(units(case, G, at.whole), units(case, x_l, at.whole), strict=True)
            for (owner, g), (_, c) in rows:
                phi = e[owner]
                if context and not at.whole:
                    phi = np.kron(phi, np.concatenate([[1.0], c @ P]))
                S, R = S + np.outer(phi, phi), R + np.outer(phi, g)
            memory["S"], memory["R"] = memory["S"] + S, memory["R"] + R
            if context and at.whole:
                own = at.solved(S, R, like)
                for k, owner in enumerate(case.owner):
                    left = (G[k].reshape(-1) - e[owner] @ own).reshape(G[k].shape)
                    for g, c in zip(positions(left), positions(x_l[k]), strict=True):
                        phi = np.kron(e[owner], c @ P)
                        memory["T"] = memory["T"] + np.outer(phi, phi)
                        memory["Q"] = memory["Q"] + np.outer(phi, g)
        B = at.solved(memory["S"], memory["R"], like)
        if context and at.whole:
            C = at.solved(memory["T"], memory["Q"], like, masked=False).reshape(n, context, -1)
        elif context:
            B = B.reshape(n, 1 + context, -1)
            B, C = B[:, 0], B[:, 1:]
        np.testing.assert_allclose(at.B, B, atol=1e-8, rtol=0)
        if context:
            C_ours = at.model.state_dict()[f"{at.name}.rewire_C"]
            np.testing.assert_allclose(C_ours, C, atol=1e-8, rtol=0)
            C = C_ours.numpy().copy()
        B = at.B  # what one step is off by does not add up to the next


@pytest.mark.parametrize(("name", "feedback"), [case for case in cases("picked") if case[1] in ("dense", "channel")])
@pytest.mark.parametrize("context", [0, 2])
def test_fitted_takes_the_first_samples_of_a_pass(name: str, feedback: str, context: int) -> None:
    """All their rows, wherever they lie, and no others."""
    case = CASES[name]
    at = Training(case, f"fitted(every=5, ridge=0.1, cap=0, probe=2, context={context})", feedback)
    x, y = at.batch()
    seen = look(at.plain, at.name, x, y)
    at.step(x, y)
    S = R = 0.0
    whole = at.whole or not context
    P = glance(at.state, context, seen.inputs[0].shape[1 if case.whole else -1]).double().numpy() if context else None
    for x_l, G in zip(seen.inputs, seen.exact, strict=True):
        for (owner, g), (_, c) in zip(units(case, G, at.whole), units(case, x_l, at.whole), strict=True):
            if owner < 2:
                phi = seen.e[owner] if whole else np.kron(seen.e[owner], np.concatenate([[1.0], c @ P]))
                S, R = S + np.outer(phi, phi), R + np.outer(phi, g)
    B = np.linalg.solve(ridged(S), R)
    B = B if whole else B.reshape(CLASSES, 1 + context, -1)[:, 0]
    np.testing.assert_allclose(at.B, B, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("name", "feedback"), cases())
@pytest.mark.parametrize("normalise", [True, False])
def test_dkp(name: str, feedback: str, normalise: bool) -> None:
    """u is the same in whatever order samples lie: the norms of their e, once for each call."""
    case = CASES[name]
    at = Training(case, f"dkp(lr=0.2, decay=0.3, normalise={normalise})", feedback)
    B, unit = None, None
    for _ in range(4):
        x, y = at.batch()
        seen = look(at.plain, at.name, x, y)
        plain = copy.deepcopy(at.plain)
        ours = at.step(x, y)
        if B is None:
            other = Training(case, "dfa", feedback)
            other.step(x, y)
            B = other.B
        back = [at.fed(seen.e, x_l, B) for x_l in seen.inputs]
        check_gradients(ours, gradients_with(plain, at.name, x, y, back))
        G = np.zeros(B.shape)
        e = at.shown(seen.e)
        for x_l in seen.inputs:
            for owner, values in units(case, x_l, at.whole):
                G += np.outer(e[owner], values)
        if unit is None:
            there = sorted(set(case.owner))  # of picked rows those that are there
            unit = np.linalg.norm(e[there], axis=1).sum() * len(seen.inputs) if normalise else 1.0
        B = B - 0.2 * (at.kept(G, seen.inputs[0]) / unit + 0.3 * B)
        np.testing.assert_allclose(at.B, B, atol=1e-8, rtol=0)


def tangents(at: Training, draw: int, inputs: list[Array]) -> list[Array]:
    seed = at.state.wiring.seed
    names = (f"{at.name}:tangent:{call}:0" for call in itertools.count())
    return [
        quick_normal(x.shape, seed=seed, name=name, draw=draw, scale=1.0).numpy().astype(np.float64)
        for name, x in zip(names, inputs, strict=False)
    ]


@pytest.mark.parametrize(("name", "feedback"), cases("picked"))  # probes do not reach picked rows, and say so
def test_grape(name: str, feedback: str) -> None:
    case = CASES[name]
    at = Training(case, "grape(every=1, lr=0.4, anchor=3)", feedback)
    B = None
    for step in range(5):
        x, y = at.batch()
        seen = look(at.plain, at.name, x, y)
        plain = copy.deepcopy(at.plain)
        J = np.zeros(0)
        if B is not None:  # from the second pass on the shape of B is known
            v = tangents(at, step, seen.inputs)
            u = at.shown(pushed(plain, at.name, x, v))
            J = np.zeros(B.shape)
            for v_call in v:
                for owner, values in units(case, v_call, at.whole):
                    J += np.outer(u[owner], values)
            J = at.kept(J, seen.inputs[0])
        ours = at.step(x, y)
        if B is None:
            other = Training(case, "dfa", feedback)
            other.step(x, y)
            B = other.B
        anchor = step % 3 == 0
        back = seen.exact if anchor else [at.fed(seen.e, x_l, B) for x_l in seen.inputs]
        check_gradients(ours, gradients_with(plain, at.name, x, y, back))
        if J.size:
            size = np.linalg.norm(B)
            unit, to = B / size, J / np.linalg.norm(J)
            unit = unit + 0.4 * (to - (to * unit).sum() * unit)
            B = unit * size / np.linalg.norm(unit)
        if anchor:
            fed = [at.fed(seen.e, x_l, B) for x_l in seen.inputs]
            B = B * np.linalg.norm(np.stack(seen.exact)) / np.linalg.norm(np.stack(fed))
        np.testing.assert_allclose(at.B, B, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("name", "feedback"), cases("picked"))
def test_fitted_by_forward_mode(name: str, feedback: str) -> None:
    """Tangents at all places of one sample are one equation, in whatever order the places lie."""
    case = CASES[name]
    at = Training(case, "fitted(by='jvp', every=1)", feedback)
    B = None
    for step in range(4):
        x, y = at.batch()
        seen = look(at.plain, at.name, x, y)
        plain = copy.deepcopy(at.plain)
        ours = at.step(x, y)
        if B is None:
            other = Training(case, "dfa", feedback)
            other.step(x, y)
            B = other.B
        elif step:
            v = tangents(at, step, seen.inputs)
            u = at.shown(pushed(plain, at.name, x, v))
            wrong, number = np.zeros(B.shape), 0
            for v_call in v:
                for sample in range(N):
                    places = [values for owner, values in units(case, v_call, at.whole) if owner == sample]
                    total = np.sum(places, 0)
                    wrong += np.outer(u[sample] - B @ total, total) / len(places)
                    number += 1
            before, B = B, B + at.kept(wrong, seen.inputs[0]) / (number + B.shape[1])
            back = [at.fed(seen.e, x_l, before) for x_l in seen.inputs]
            check_gradients(ours, gradients_with(plain, at.name, x, y, back))
        np.testing.assert_allclose(at.B, B, atol=1e-8, rtol=0)
