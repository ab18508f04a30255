"""Structures of feedback: what is drawn, what it multiplies to, what it keeps.

Every B is built a second time below, in NumPy and from the definitions in docs/structures.md, and every gradient is
written out with that B; nothing is read back from the library except where a test says so.
"""

import copy
import dataclasses
import hashlib
import math
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rewire
from rewire.rules.direct import DFA, SDFA
from rewire.structures import NAMES, Dense, Feedback, LowRank, Seeded, Shared, Sparse, Structure, resolve
from rewire.structures.seeded import blocks
from rewire.structures.sparse import Lanes, distinct
from rewire.swap import state_of

from .plain import chain, randn, seeded

SCALE = 0.3
SEED = 5
STRUCTURES = {
    **NAMES,
    "lowrank 2": LowRank(2),
    "lowrank 3 per element": LowRank(3, per="element", distribution="uniform"),
    "sparse 1": Sparse(nonzeros=1),
    "sparse half": Sparse(density=0.5, distribution="binary"),
    "sparse per element": Sparse(nonzeros=3, per="element"),
    "shared per element": Shared("ternary", per="element"),
    "seeded per channel": Seeded("binary", per="channel"),
    "ternary in bytes": Dense("ternary", dtype=torch.int8),
    "binary in bytes": Dense("binary", dtype=torch.int8, per="channel"),
    "orthogonal per channel": Dense("orthogonal", per="channel"),
}
every = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


# -- the same numbers, from their definitions --------------------------------------------------------


def stream(name, shape, distribution, chunk=0, seed=SEED):
    text = f"{seed}|{name}|{tuple(shape)}|{distribution}|0|{chunk}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def draw(name, shape, distribution, total=None, seed=SEED):
    """Fewer numbers than a chunk holds, float64."""
    size = math.prod(shape) if total is None else total
    random = stream(name, shape, distribution, seed=seed)
    if distribution == "normal":
        flat = random.standard_normal(size, dtype=np.float32).astype(float)
    elif distribution == "uniform":
        flat = (random.random(size, dtype=np.float32).astype(float) - 0.5) * math.sqrt(12)
    elif distribution == "binary":
        flat = random.integers(0, 2, size, dtype=np.int8).astype(float) * 2 - 1
    else:
        flat = random.integers(-1, 2, size, dtype=np.int8).astype(float) * math.sqrt(1.5)
    return flat.reshape(shape) if total is None else flat


def reference(structure, name, shape, output="", scale=SCALE, seed=SEED):
    """B of ``shape`` = (n, ...), float64."""
    n, columns = shape[0], math.prod(shape[1:])
    law = structure.distribution
    if isinstance(structure, (Dense, Seeded)) or (isinstance(structure, LowRank) and n <= structure.rank):
        if law != "orthogonal":
            return scale * draw(name, shape, law, seed=seed)
        small, large = sorted((n, columns))
        q, r = np.linalg.qr(draw(f"{name}|orthogonal", (large, small), "normal", seed=seed))
        q = q * np.sign(np.diag(r)) * math.sqrt(large)
        return scale * (q.T if n <= columns else q).reshape(shape)
    if isinstance(structure, LowRank):
        r = structure.rank
        p = draw(f"lowrank{output}", (n, r), law, seed=seed)
        q = draw(name, (r, *shape[1:]), law, seed=seed).reshape(r, columns)
        return (p @ q * scale / math.sqrt(r)).reshape(shape)
    if isinstance(structure, Shared):
        m = draw(f"shared{output}", (n,), law, total=n * columns, seed=seed).reshape(columns, n)
        return scale * m.T.reshape(shape)
    k = structure.per_column(n)
    random, chosen = stream(name, shape, f"{k} of {n}", seed=seed), [[] for _ in range(columns)]
    for last in range(n - k, n):
        for rows, number in zip(chosen, random.integers(0, last + 1, columns, dtype=np.int32), strict=True):
            rows.append(last if number in rows else int(number))
    values = draw(name, (columns, k), law, seed=seed) * math.sqrt(n / k)
    dense = np.zeros((n, columns))
    for column, rows in enumerate(chosen):
        dense[rows, column] = values[column]
    return scale * dense.reshape(shape)


def B_of(structure, name, shape, **more):
    return torch.from_numpy(np.ascontiguousarray(reference(structure, name, shape, **more)))


def close(a, b, tolerance=1e-6):
    # Unit numbers are drawn and scaled in float32: that much, and no more, is lost against the definitions.
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= tolerance * float(b.abs().max())


def error(y, loss):
    y = y.detach().requires_grad_()
    return torch.autograd.grad(loss(y), y)[0]


def convert(model, structure, rule="dfa", **more):
    return rewire.convert(model, rule, feedback=structure, seed=SEED, **{"scale": SCALE, **more})


def storages(model):
    """Bytes of all tensors that the states of a converted model keep for feedback."""
    found, seen = {}, set()

    def walk(thing):
        if id(thing) in seen or isinstance(thing, (str, torch.dtype, torch.device, Structure)):
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                walk(value)
        elif isinstance(thing, (tuple, list)):
            for value in thing:
                walk(value)
        elif hasattr(thing, "__dict__"):
            walk(vars(thing))

    states = [state for m in model.modules() if (state := state_of(m)) is not None]
    walk([(s.made, s.routes, s.last and s.last[1:], s.randoms, s.wiring.common) for s in states])
    return sum(found.values())


# -- values ------------------------------------------------------------------------------------------


@every
def test_an_mlp(structure):
    model = convert(seeded(chain, 5, 7, 6, 8), structure)
    x, target = randn(9, 5), randn(9, 8, seed=1)
    loss = lambda y: ((y - target) ** 2 / 2).sum()  # noqa: E731
    for step in range(2):
        W0, b0, W1, b1, W2, b2 = [p.detach().clone() for p in model.parameters()]
        h1 = torch.tanh(x @ W0.T + b0)
        h2 = torch.tanh(h1 @ W1.T + b1)
        e = h2 @ W2.T + b2 - target
        d2 = (e @ B_of(structure, "4", (8, 6))) * (1 - h2**2)
        d1 = (e @ B_of(structure, "2", (8, 7))) * (1 - h1**2)
        model.zero_grad()
        loss(model(x)).backward()
        for p, expected in zip(
            model.parameters(), (d1.T @ x, d1.sum(0), d2.T @ h1, d2.sum(0), e.T @ h2, e.sum(0)), strict=True
        ):
            close(p.grad, expected)
        with torch.no_grad():  # another e, the same B
            for p in model.parameters():
                p -= 0.1 * (step + 1) * p.grad


def cnn(n=8):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, n)
    )


@every
def test_a_cnn(structure):
    model = convert(seeded(cnn), structure)
    x, target = randn(5, 2, 7, 7), randn(5, 8, seed=1)
    h1 = torch.tanh(model[0](x)).detach()
    h2 = torch.tanh(model[2](h1)).detach()
    e = model[5](h2.flatten(1)).detach() - target
    if structure.per == "element":
        fed1 = (e @ B_of(structure, "2", (8, 3, 5, 5)).flatten(1)).reshape(h1.shape)
    else:
        fed1 = (e @ B_of(structure, "2", (8, 3)))[:, :, None, None].expand(h1.shape)
    d1 = fed1 * (1 - h1**2)
    d2 = (e @ B_of(structure, "5", (8, 16))).reshape(h2.shape) * (1 - h2**2)
    ((model(x) - target) ** 2 / 2).sum().backward()
    close(model[0].weight.grad, nn.grad.conv2d_weight(x, model[0].weight.shape, d1))
    close(model[2].weight.grad, nn.grad.conv2d_weight(h1, model[2].weight.shape, d2, stride=2))


@every
def test_tokens(structure):
    """One error per position."""
    model = convert(seeded(chain, 5, 7, 6, 8), structure)
    x, target = randn(3, 4, 5), randn(3, 4, 8, seed=1)
    W0, b0, W1, b1, *_ = [p.detach() for p in model.parameters()]
    h1 = torch.tanh(x @ W0.T + b0)
    h2 = torch.tanh(h1 @ W1.T + b1)
    ((model(x) - target) ** 2 / 2).sum().backward()
    e = rewire.output_error(model)
    d1 = torch.einsum("btn,nf->btf", e, B_of(structure, "2", (8, 7))) * (1 - h1**2)
    d2 = torch.einsum("btn,nf->btf", e, B_of(structure, "4", (8, 6))) * (1 - h2**2)
    close(model[0].weight.grad, torch.einsum("btf,bti->fi", d1, x))
    close(model[2].weight.grad, torch.einsum("btf,bti->fi", d2, h1))


@every
def test_an_error_with_space(structure):
    """A segmentation's e, (N, n, H, W): features in the second dimension."""
    model = convert(
        seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 8, 1))), structure
    )
    x, target = randn(2, 2, 4, 5), randn(2, 8, 4, 5, seed=1)
    h = torch.tanh(model[0](x)).detach()
    ((model(x) - target) ** 2 / 2).sum().backward()
    e = rewire.output_error(model)
    d = torch.einsum("bnhw,nc->bchw", e, B_of(structure, "2", (8, 3))) * (1 - h**2)
    close(model[0].weight.grad, nn.grad.conv2d_weight(x, model[0].weight.shape, d, padding=1))


@every
def test_feedback_is_the_b_of_the_definition(structure):
    model = convert(seeded(cnn), structure)
    model(randn(5, 2, 7, 7)).square().sum().backward()
    used = rewire.feedback(model)
    close(used["5"], B_of(structure, "5", (8, 16)))
    close(used["2"], B_of(structure, "2", (8, 3, 5, 5) if structure.per == "element" else (8, 3)))


@every
@pytest.mark.parametrize("rule", ["sdfa", "drtp"])
def test_other_rules_and_one_layer_under_another(structure, rule):
    """The signal of each rule is projected, not that of another rule in the same pass."""
    model = convert(seeded(chain, 5, 7, 6, 8), structure, layers={"2": rule})
    x, labels = randn(9, 5), torch.arange(9) % 8
    loss = lambda y: F.cross_entropy(y, labels)  # noqa: E731
    W0, b0, W1, b1, *_ = [p.detach() for p in model.parameters()]
    h1 = torch.tanh(x @ W0.T + b0)
    h2 = torch.tanh(h1 @ W1.T + b1)
    loss(model(x)).backward()
    e = rewire.output_error(model)
    signal = e.sign() if rule == "sdfa" else F.one_hot(labels, 8).double()
    d1 = (signal @ B_of(structure, "2", (8, 7))) * (1 - h1**2)
    d2 = (e @ B_of(structure, "4", (8, 6))) * (1 - h2**2)
    close(model[0].weight.grad, d1.T @ x)
    close(model[2].weight.grad, d2.T @ h1)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.a(h), self.b(h)


@every
def test_several_outputs_have_feedback_of_their_own(structure):
    model = convert(seeded(TwoHeads), structure, output=["a", "b"])
    x = randn(9, 5)
    h = torch.tanh(model.body(x)).detach()
    ya, yb = model(x)
    (ya.square().sum() / 2 + yb.pow(3).sum() / 3).backward()
    ea, eb = ya.detach(), yb.detach() ** 2
    fed = ea @ B_of(structure, "a", (8, 6))
    fed = fed + eb @ B_of(structure, "b@b", (8, 6), output="@b")
    close(model.body.weight.grad, (fed * (1 - h**2)).T @ x)
    assert rewire.summary(model).feedback_bytes == storages(model)


@every
def test_every_structure_is_verified_and_a_wrong_one_is_found(structure, monkeypatch):
    model, x = convert(seeded(cnn), structure), randn(5, 2, 7, 7)
    loss = lambda y: y.square().sum()  # noqa: E731
    assert rewire.verify(model, x, loss).ok
    for cls in {type(B) for B in _made(model, x) if isinstance(B, Feedback)}:
        monkeypatch.setattr(cls, "__call__", lambda self, rows, real=cls.__call__: real(self, rows) * 1.01)
        assert not rewire.verify(model, x, loss).ok


def _made(model, x):
    model(x).square().sum().backward()
    return [B for m in model.modules() if (s := state_of(m)) is not None for B in s.made.values()]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_in_another_dtype(structure, dtype):
    structure = dataclasses.replace(structure, dtype=dtype)
    model = convert(seeded(cnn), structure)
    x = randn(5, 2, 7, 7)
    expected = rewire.summary(model, x).feedback_bytes
    model(x).square().sum().backward()
    e = rewire.output_error(model)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    d2 = (e @ B_of(structure, "5", (8, 16))).reshape(5, 4, 2, 2)
    h1 = torch.tanh(model[0](x)).detach()
    h2 = torch.tanh(model[2](h1)).detach()
    close(
        model[2].weight.grad, nn.grad.conv2d_weight(h1, (4, 3, 3, 3), d2 * (1 - h2**2), stride=2), tolerance=tolerance
    )
    for made in _made(model, x):
        assert made.dtype is dtype
    assert expected == storages(model) == rewire.summary(model).feedback_bytes
    assert rewire.verify(model, x, lambda y: y.square().sum()).ok


@every
def test_torch_func(structure):
    """Per-sample gradients by vmap(grad) are those of one backward per sample."""
    model = convert(seeded(cnn), structure, output="5")
    x = randn(4, 2, 7, 7)
    params = dict(model.named_parameters())

    def loss(p, sample):
        return torch.func.functional_call(model, p, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i in range(4):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, p in params.items():
            close(each[name][i], p.grad, 1e-12)


@pytest.mark.parametrize("chunk", [5, 1 << 20])
@every
def test_gradients_of_gradients_see_the_same_b(structure, chunk, monkeypatch):
    """create_graph: what was handed back depends on e as e B does."""
    monkeypatch.setattr(sys.modules["rewire.feedback"], "CHUNK", chunk)
    model = convert(seeded(chain, 5, 7, 8), structure)
    model(randn(9, 5)).square().sum().backward()
    x = randn(9, 5)
    y = model(x)
    (g,) = torch.autograd.grad((y**3).sum(), model[0].bias, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), model[2].bias)
    h = torch.tanh(model[0](x)).detach()
    B = rewire.feedback(model)["2"] if chunk == 5 else B_of(structure, "2", (8, 7))
    close(second, ((6 * y.detach()) * ((1 - h**2) @ B.T)).sum(0))


def test_a_graph_of_the_backward_keeps_every_tile(monkeypatch):
    """float32 on the CPU, where a tile is used in place."""
    monkeypatch.setattr(sys.modules["rewire.feedback"], "CHUNK", 5)
    found = []
    for structure in ("dense", "seeded"):
        model = convert(seeded(chain, 5, 7, 8).float(), structure, output="2")
        y = model(randn(9, 5).float())
        (g,) = torch.autograd.grad((y**3).sum(), model[0].bias, create_graph=True)
        found.append(torch.autograd.grad(g.sum(), model[2].bias)[0])
    close(*found)


# -- distributions -----------------------------------------------------------------------------------

LARGE = {
    "lowrank": LowRank(64),
    "sparse": Sparse(nonzeros=20),
    **{name: NAMES[name] for name in ("dense", "uniform", "orthogonal", "binary", "ternary", "shared", "seeded")},
    "lowrank binary": LowRank(64, distribution="binary"),
}


def large(structure, n=200, features=400):
    model = rewire.convert(chain(3, features, n), "dfa", feedback=structure, scale=SCALE, seed=SEED)
    model(torch.randn(4, 3)).square().sum().backward()
    return rewire.feedback(model)["2"].double()


@pytest.mark.parametrize("structure", LARGE.values(), ids=LARGE.keys())
def test_entries_have_mean_zero_and_the_scale(structure):
    B = large(structure)
    assert abs(float(B.square().mean().sqrt()) / SCALE - 1) < 0.04
    assert abs(float(B.mean())) < 0.02 * SCALE


def test_shapes_of_the_distributions():
    uniform, binary, ternary = (large(NAMES[name]) / SCALE for name in ("uniform", "binary", "ternary"))
    assert float(uniform.abs().max()) <= math.sqrt(3) + 1e-6 and float(uniform.abs().max()) > 1.72
    assert abs(float((uniform.abs() < math.sqrt(3) / 2).double().mean()) - 0.5) < 0.01
    assert sorted({round(v, 5) for v in binary.unique().tolist()}) == [-1, 1]
    assert [round(v, 4) for v in ternary.unique().tolist()] == [-1.2247, 0, 1.2247]
    for value in (-1, 0, 1):
        assert abs(float((ternary.sign() == value).double().mean()) - 1 / 3) < 0.01


@pytest.mark.parametrize(("n", "features"), [(20, 50), (50, 20), (30, 30)])
def test_orthogonal_is_orthogonal(n, features):
    B = large(NAMES["orthogonal"], n, features)
    gram = B @ B.T if n <= features else B.T @ B
    close(gram, torch.eye(min(n, features), dtype=torch.float64) * SCALE**2 * max(n, features), 1e-5)


@pytest.mark.parametrize("rank", [1, 5])
def test_low_rank_has_that_rank(rank):
    model = rewire.convert(chain(3, 30, 20).double(), "dfa", feedback=LowRank(rank), scale=SCALE)
    model(randn(4, 3)).square().sum().backward()
    assert torch.linalg.matrix_rank(rewire.feedback(model)["2"]) == rank


def test_layers_share_p_but_not_q_and_slices_of_one_matrix():
    x = randn(6, 3)
    model = convert(chain(3, 30, 12, 20).double(), LowRank(4))
    model(x).square().sum().backward()
    one, two = rewire.feedback(model).values()
    assert torch.linalg.matrix_rank(torch.cat([one, two], 1)) == 4  # the same column space
    assert not torch.allclose(one[:, :12], two)
    model = convert(chain(3, 30, 12, 20).double(), "shared")
    model(x).square().sum().backward()
    one, two = rewire.feedback(model).values()
    assert torch.equal(one[:, :12], two)


@pytest.mark.parametrize(
    ("structure", "k"),
    [
        (Sparse(), 2),
        (Sparse(nonzeros=7), 7),
        (Sparse(density=0.05), 10),
        (Sparse(density=1e-9), 1),
        (Sparse(nonzeros=999), 200),
    ],
)
def test_nonzeros_per_column(structure, k):
    assert ((large(structure) != 0).sum(0) == k).all()
    assert Sparse().per_column(50_000) == 32 and Sparse().per_column(10) == 1
    # A hundredth, and a density's share, to the nearest whole number.
    assert [Sparse().per_column(n) for n in (149, 151, 1000, 3149, 3151)] == [1, 2, 10, 31, 32]
    assert [Sparse(density=0.1).per_column(n) for n in (3, 14, 16)] == [1, 1, 2]
    assert Sparse(density=1).per_column(7) == 7


def test_sparse_rows_are_a_fair_draw():
    """All pairs of 5 rows equally likely: a chi-squared test with 9 degrees of freedom."""
    rows = np.sort(distinct(5, 2, 20_000, stream("fair", (1,), "test")), 1)
    _, counts = np.unique(rows[:, 0] * 5 + rows[:, 1], return_counts=True)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # 0.1 %
    everything = distinct(6, 6, 50, stream("all", (1,), "test"))
    assert (np.sort(everything, 1) == np.arange(6)).all()


def test_sparse_lays_e_out_once_in_a_pass(monkeypatch):
    """Each feature in one piece, so that no layer has to copy it again."""
    made = []
    real = Lanes.__call__
    monkeypatch.setattr(Lanes, "__call__", lambda self, *args: (made.append(real(self, *args)), made[-1])[1])
    model = convert(seeded(chain, 5, 7, 6, 9, 8), Sparse(nonzeros=2), output="6")
    for passes in (1, 2, 3):
        model(randn(9, 5)).square().sum().backward()
        assert len(made) == passes
    assert all(e.shape == (9, 8) and e.t().is_contiguous() for e in made)
    assert Lanes(torch.float64)(randn(2, 3, 4), 1).movedim(1, 0).is_contiguous()
    (B,) = state_of(model[4]).made.values()
    assert B(made[0]).is_contiguous()


def test_sparse_layers_that_keep_other_dtypes_do_not_share_e():
    """One of float32 below one of float64."""
    wide, narrow = Sparse(nonzeros=2), Sparse(nonzeros=2, dtype=torch.float32)
    model = convert(seeded(chain, 5, 7, 6, 8), wide, layers={"2": DFA(feedback=narrow)})
    x = randn(9, 5)
    W0, b0, W1, b1, *_ = [p.detach() for p in model.parameters()]
    h1 = torch.tanh(x @ W0.T + b0)
    h2 = torch.tanh(h1 @ W1.T + b1)
    model(x).square().sum().backward()
    e = rewire.output_error(model)
    close(model[0].weight.grad, ((e @ B_of(narrow, "2", (8, 7))) * (1 - h1**2)).T @ x)
    close(model[2].weight.grad, ((e @ B_of(wide, "4", (8, 6))) * (1 - h2**2)).T @ h1)


# -- seeded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 7, 48, 64, 10_000])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "binary", "ternary"])
@pytest.mark.parametrize("per", ["element", "channel"])
def test_seeded_is_dense(monkeypatch, chunk, distribution, per):
    monkeypatch.setattr(sys.modules["rewire.feedback"], "CHUNK", chunk)
    x = randn(5, 2, 7, 7)
    models = [convert(seeded(cnn), cls(distribution, per=per)) for cls in (Dense, Seeded)]
    for model in models:
        model(x).square().sum().backward()
    a, b = (rewire.feedback(model) for model in models)
    assert all(torch.equal(a[name], b[name]) for name in ("2", "5"))
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        close(p.grad, q.grad, 1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30))
def test_blocks_of_tiles_cover_the_matrix_once(rows, columns, size):
    flat = torch.arange(rows * columns, dtype=torch.float64)
    out = torch.full((rows, columns), -1.0, dtype=torch.float64)
    for start in range(0, rows * columns, size):
        for row, column, block in blocks(start, flat[start : start + size], columns):
            place = out[row : row + block.shape[0], column : column + block.shape[1]]
            assert (place == -1).all()
            place.copy_(block)
        tile = flat[start : start + size]
        assert len(list(blocks(start, tile, columns))) <= 3  # rest of a row, whole rows at once, beginning of a row
    assert torch.equal(out, flat.view(rows, columns))


@pytest.mark.parametrize("chunk", [5, 10_000])
def test_seeded_in_several_tiles_under_torch_func(chunk, monkeypatch):
    """What one tile adds must not replace what the others have: in vmap they are added up by another operation."""
    monkeypatch.setattr(sys.modules["rewire.feedback"], "CHUNK", chunk)
    model = convert(seeded(chain, 5, 7, 6, 8), "seeded", output="4")
    x = randn(4, 5)
    params = dict(model.named_parameters())

    def loss(p, sample):
        return torch.func.functional_call(model, p, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, p in params.items():
            close(each[name][i], p.grad, 1e-12)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_the_memory_of_seeded_is_one_tile(monkeypatch):
    monkeypatch.setattr(sys.modules["rewire.feedback"], "CHUNK", 100_000)
    peaks = {}
    for structure in ("seeded", "dense"):
        model = rewire.convert(chain(3, 2000, 500), "dfa", feedback=structure, scale=SCALE)
        x = torch.randn(2, 3)
        model(x).square().sum().backward()  # finds the output layer
        loss = model(x).square().sum()
        for p in model.parameters():
            p.grad = None
        state_of(model[2]).forget_routes()
        tracemalloc.start()
        with Largest() as largest:
            torch.autograd.grad(loss, model[0].weight)
        peaks[structure] = max(largest.bytes, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks["dense"] >= 500 * 2000 * 4  # the instrument sees a B
    assert peaks["seeded"] <= 1.2 * 100_000 * 4


# -- bytes -------------------------------------------------------------------------------------------


@every
def test_bytes_said_are_bytes_kept(structure):
    for dtype in (torch.float32, torch.float64):
        model = convert(cnn(n=40).to(dtype), structure)
        x = torch.randn(5, 2, 7, 7, dtype=dtype)
        assert storages(model) == 0
        before = rewire.summary(model, x)
        assert storages(model) == 0
        for _ in range(3):
            model(x).square().sum().backward()
        model(x[:2]).square().sum().backward()  # another batch size keeps nothing more
        after = rewire.summary(model)
        assert before.feedback_bytes == after.feedback_bytes == storages(model)
        assert before.common_bytes == after.common_bytes
        assert [row.feedback_shape for row in before.rows] == [row.feedback_shape for row in after.rows]


def test_bytes_of_each_by_hand():
    model, x = cnn(n=100), torch.randn(1, 2, 7, 7)
    said = {
        name: rewire.summary(convert(model, name), x).feedback_bytes
        for name in ("dense", "channel", "sparse", "lowrank", "shared", "seeded", "ternary")
    }
    assert said == {
        "dense": 4 * 100 * (3 * 5 * 5 + 16),
        "channel": 4 * 100 * (3 + 16),
        "sparse": 8 * (3 + 16),
        "lowrank": 4 * 32 * (100 + 3 + 16),
        "shared": 4 * 100 * 16,
        "seeded": 0,
        "ternary": 4 * 100 * (3 * 5 * 5 + 16),
    }
    small = rewire.summary(convert(model, Dense("ternary", dtype=torch.int8)), x)
    assert small.feedback_bytes == 100 * (3 * 5 * 5 + 16)
    assert "dtype=torch.int8" in str(small.rows[1].note)
    text = str(rewire.summary(convert(model, "lowrank"), x))
    assert "12.8 KB of it common to layers" in text and "LowRank()" in text


def test_resnet50_under_dfa_with_one_word():
    torchvision = pytest.importorskip("torchvision")
    model = rewire.convert(torchvision.models.resnet50(), "dfa", feedback="lowrank")
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    said = rewire.summary(model, torch.randn(1, 3, 224, 224))
    assert 0 < said.feedback_bytes <= 0.05 * parameters
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert storages(model) == said.feedback_bytes  # the same at any resolution


def test_a_language_model_projects_its_error_once():
    """50k outputs: multiplications of e B are fewer than those of the gradients it takes the place of."""

    class Decoder(nn.Module):
        def __init__(self, width=16, vocabulary=50_000):
            super().__init__()
            self.embed = nn.Embedding(vocabulary, width)
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
            self.head = nn.Linear(width, vocabulary)

        def forward(self, ids):
            h = self.embed(ids)
            for layer in self.layers:
                h = h + torch.tanh(layer(h))
            return self.head(h)

    ids = torch.arange(6).reshape(2, 3)

    def count(rule, feedback="dense"):
        model = rewire.convert(Decoder(), rule, feedback=feedback, scale=0.1)
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                model(ids).square().sum().backward()
        return counter.get_total_flops()

    own = count("shallow")  # forward and weight gradients
    backprop = count("bp") - own
    assert count("dfa") - own > 6 * backprop
    rows, width = 6, 16
    squeezed = count("dfa", LowRank(8)) - own
    assert squeezed == 2 * rows * (50_000 * 8 + 7 * 8 * width)  # e P once, and Q for six layers and the head
    assert squeezed < backprop
    assert count("dfa", "sparse") - own == 0  # gathers, no matrix product


# -- the same for everybody --------------------------------------------------------------------------

DIGEST = """
import hashlib, sys, torch, rewire
from torch import nn
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for name in sys.argv[2:]:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(75, 40), nn.Tanh(), nn.Linear(40, 37))
    rewire.convert(model, "dfa", feedback=name, scale=0.3, seed=5)
    model(torch.ones(1, 2, 7, 7)).sum().backward()
    for key, B in rewire.feedback(model).items():
        digest.update(key.encode() + B.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_other_processes_have_the_same_b():
    def run(threads, names):
        out = subprocess.run(
            [sys.executable, "-c", DIGEST, str(threads), *names],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(threads)},
        )
        return out.stdout

    names = [name for name in NAMES if name != "orthogonal"]  # LAPACK's last bit may depend on threads
    assert run(1, names) == run(2, names)


@every
def test_b_depends_on_neither_the_order_of_layers_nor_the_others(structure):
    """Widths in another order of use: for shared feedback the matrix grows differently."""
    x = randn(9, 5)
    whole, alone = convert(seeded(chain, 5, 7, 9, 8), structure), convert(seeded(chain, 5, 7, 9, 8), structure)
    rewire.convert(alone, "dfa", feedback=structure, seed=SEED, scale=SCALE, layers={"4": "bp"})
    for model in (whole, alone):
        model(x).square().sum().backward()
    assert torch.equal(rewire.feedback(whole)["2"], rewire.feedback(alone)["2"])


@every
def test_dtypes_share_the_numbers(structure):
    found = []
    for dtype in (torch.float32, torch.float64):
        model = convert(seeded(cnn).to(dtype), structure)
        model(torch.ones(2, 2, 7, 7, dtype=dtype)).sum().backward()
        found.append(rewire.feedback(model))
    for name, B in found[0].items():
        assert B.dtype is torch.float32 and found[1][name].dtype is torch.float64
        close(B.double(), found[1][name], 3e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_devices_share_the_numbers(structure):
    handed = []
    for device in ("cpu", "cuda"):
        model = convert(seeded(cnn).to(device), structure)
        x = randn(5, 2, 7, 7).to(device)
        model(x).square().sum().backward()
        handed.append((rewire.feedback(model), [p.grad.cpu() for p in model.parameters()]))
    for name, B in handed[0][0].items():
        assert torch.equal(B, handed[1][0][name].cpu()) or structure.name == "lowrank"
    for a, b in zip(handed[0][1], handed[1][1], strict=True):
        close(b, a, 1e-10)


@every
def test_copies_have_the_same_bits_and_carry_nothing(structure):
    model = convert(seeded(cnn), structure, scale="auto")
    x = randn(5, 2, 7, 7)
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
    plain = len(pickle.dumps(seeded(cnn)))
    data = pickle.dumps(model)
    assert len(data) < plain + 8_000
    before = rewire.feedback(model)
    for twin in (copy.deepcopy(model), pickle.loads(data)):
        assert storages(twin) == 0
        for name, B in rewire.feedback(twin).items():  # made again, before any pass
            assert torch.equal(B, before[name])
        twin.zero_grad()
        twin(x).square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert storages(twin) == storages(model)


@every
def test_the_measured_scale_is_that_of_b(structure):
    """auto: what unit feedback gives in the measuring pass, made as large as what backprop hands back."""
    model = seeded(chain, 5, 40, 30)
    x = randn(9, 5)
    h = torch.tanh(model[0](x)).detach()
    y = model[2](h).detach()
    exact = 2 * y @ model[2].weight.detach()
    unit = 2 * y @ B_of(structure, "2", (30, 40), scale=1.0)
    convert(model, structure, scale="auto")
    model(x).square().sum().backward()
    expected = float(exact.norm() / unit.norm())
    assert abs(rewire.scales(model)["2"] / expected - 1) < 1e-6
    model(x).square().sum().backward()
    close(rewire.feedback(model)["2"], B_of(structure, "2", (30, 40), scale=expected), 1e-5)


# -- a rule object's own structure, use_rule, one's own structures ------------------------------------


def test_a_rule_object_carries_its_own_structure():
    model = seeded(chain, 5, 7, 6, 8)
    convert(model, "seeded", layers={"4": DFA(feedback=Sparse(nonzeros=2)), "2": SDFA(feedback="lowrank")})
    x = randn(9, 5)
    model(x).square().sum().backward()
    used = rewire.feedback(model)
    close(used["4"], B_of(Sparse(nonzeros=2), "4", (8, 6)))
    close(used["2"], B_of(LowRank(), "2", (8, 7)))
    assert rewire.verify(model, x, lambda y: y.square().sum()).ok
    assert repr(DFA(feedback="lowrank", layout="batch_first")) == "dfa(layout='batch_first', feedback=LowRank())"
    assert "nonzeros=2" in str(rewire.summary(model))


def test_use_rule_with_another_structure_and_back():
    model = convert(seeded(cnn), "dense")
    x = randn(5, 2, 7, 7)

    def grads():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()], rewire.feedback(model)

    before, dense = grads()
    with rewire.use_rule(model, DFA(feedback="lowrank")):
        _, other = grads()
        assert other["2"].shape == (8, 3)
        close(other["5"], B_of(NAMES["lowrank"], "5", (8, 16)))
    after, again = grads()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(again[name], B) for name, B in dense.items())


@dataclasses.dataclass(frozen=True, repr=False)
class Reversed(Structure):
    """A structure of the user's own: B with its rows in reverse order, in the plain form."""

    name = "reversed"
    per: str = "channel"
    dtype: torch.dtype | None = None

    def make(self, place):
        return Dense(per=self.per).make(place).flip(0)

    def size(self, shape, itemsize):
        return math.prod(shape) * itemsize


def test_a_structure_and_a_rule_of_ones_own():
    class Halved(rewire.DirectRule):
        feedback = "sparse"  # said by the class

        def signal(self, error, targets, axis):
            return error / 2

    model = convert(seeded(chain, 5, 7, 6, 8), Reversed(), layers={"4": Halved()})
    model(randn(9, 5)).square().sum().backward()
    used = rewire.feedback(model)
    close(used["2"], B_of(Dense(), "2", (8, 7)).flip(0))
    close(used["4"], B_of(Sparse(), "4", (8, 6)))
    assert rewire.verify(model, randn(9, 5), lambda y: y.square().sum()).ok


# -- one result per pass -----------------------------------------------------------------------------


def test_what_layers_share_belongs_to_one_pass():
    """Two forwards before one backward, and one graph twice: nothing of one e is used for another."""
    for structure in ("lowrank", "shared", "sparse"):
        model = convert(seeded(chain, 5, 7, 6, 40), structure)
        x, z = randn(9, 5), randn(9, 5, seed=3)
        model(x).square().sum().backward()
        B = rewire.feedback(model)["2"]
        h, k = (torch.tanh(model[0](t)).detach() for t in (x, z))

        def handed(e, t, a, B=B):
            return ((e @ B) * (1 - a**2)).T @ t

        model.zero_grad()
        y, w = model(x), model(z)
        (y.square().sum() + w.pow(3).sum()).backward()
        close(model[0].weight.grad, handed(2 * y.detach(), x, h) + handed(3 * w.detach() ** 2, z, k), 1e-12)
        y = model(x)
        for factor in (1.0, -3.0):
            model.zero_grad()
            y.backward(torch.full_like(y, factor), retain_graph=True)
            close(model[0].weight.grad, handed(torch.full_like(y, factor).detach(), x, h), 1e-12)


def test_e_is_let_go_after_the_pass():
    """What layers share is as large as e may be: it does not outlive the backward."""
    model = convert(seeded(chain, 5, 7, 6, 40), "sparse")
    for _ in range(2):
        loss = model(randn(9, 5)).square().sum()
        loss.backward(retain_graph=True)
    found = [call for node in _nodes(loss) if (call := node.metadata.get("rewire.call")) is not None]
    assert found
    assert all(error.shared == {} and error.error is None for call in found for error in [*call.errors, *call.own])


def _nodes(loss):
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return seen


# -- what is refused ---------------------------------------------------------------------------------

WRONG = {
    "lowrnk": "did you mean 'lowrank'",
    "Sparse": "did you mean 'sparse'",
    3: "an object from rewire.structures",
    LowRank: "pass an instance, LowRank()",
}


@pytest.mark.parametrize(("feedback", "message"), WRONG.items(), ids=map(str, WRONG))
def test_wrong_structures_are_refused_before_anything_changes(feedback, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for wrong in (lambda: rewire.convert(model, "dfa", feedback=feedback), lambda: DFA(feedback=feedback)):
        with pytest.raises(rewire.ConversionError, match=message.replace("(", r"\(").replace(")", r"\)")):
            wrong()
        assert type(model[0]) is nn.Linear and "_rewire" not in vars(model[0])


def test_a_rule_class_with_a_wrong_structure_is_refused():
    class Wrong(rewire.DirectRule):
        feedback = "spars"

        def signal(self, error, targets, axis):
            return error

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(rewire.ConversionError, match="did you mean 'sparse'"):
        rewire.convert(model, Wrong())
    assert type(model[0]) is nn.Linear
    rewire.convert(model, "dfa")
    with pytest.raises(rewire.ConversionError, match="did you mean 'sparse'"), rewire.use_rule(model, Wrong()):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(0), "rank is a positive int, not 0"),
        (lambda: LowRank(True), "rank is a positive int"),
        (lambda: LowRank(distribution="orthogonal"), "distribution is one of 'normal'"),
        (lambda: Dense("gaussian"), "distribution is one of"),
        (lambda: Dense("unifrm"), "did you mean 'uniform'"),
        (lambda: Dense(per="chanel"), "did you mean 'channel'"),
        (lambda: Shared(per=1), "per is 'element' or 'channel', not 1"),
        (lambda: Dense(dtype=torch.int8), "dtype is a floating-point type"),
        (lambda: Dense(dtype="bf16"), "dtype is a floating-point type"),
        (lambda: Sparse(density=0.1, nonzeros=3), "not both"),
        (lambda: Sparse(density=0.0), "density is a number above 0"),
        (lambda: Sparse(density=1.5), "density is a number above 0"),
        (lambda: Sparse(density=True), "density is a number above 0"),
        (lambda: Sparse(nonzeros=2.0), "nonzeros is a positive int"),
        (lambda: Seeded("orthogonal"), "distribution is one of"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(rewire.ConversionError, match=message):
        make()


def test_structures_are_values():
    assert LowRank(64) == LowRank(64) != LowRank(32) and hash(Sparse(density=0.1)) == hash(Sparse(density=0.1))
    assert pickle.loads(pickle.dumps(Shared(dtype=torch.bfloat16))) == Shared(dtype=torch.bfloat16)
    assert repr(LowRank(64, dtype=torch.bfloat16)) == "LowRank(rank=64, dtype=torch.bfloat16)"
    assert all(resolve(name) is structure for name, structure in NAMES.items())


def test_local_rules_take_no_notice():
    model = rewire.convert(seeded(chain, 5, 7, 8), "fa", feedback="lowrank")
    model(randn(9, 5)).square().sum().backward()
    assert rewire.feedback(model)["0"].shape == (7, 5)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 3, 2), nn.Conv2d(3, 5, 2), nn.Linear(5, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))).mean((2, 3)))


def many_sizes(model, sizes):
    """The gradient of the first layer by size, and the numbers that layer b keeps of B after each step."""
    gradients, held = [], []
    for size in sizes:
        model.zero_grad()
        x = torch.full((4, 2, size, size), 0.5, dtype=torch.float64)
        model(x).square().sum().backward()
        gradients.append((size, model.a.weight.grad.clone()))
        held.append(sum(B.numel() for B in state_of(model.b).made.values()))
    return gradients, held


def test_of_many_sizes_the_newest_b_are_kept():
    """Others are made again, the same, when they come back; one that somebody changed stays."""
    model = convert(seeded(Pooled), Dense(), output="head")
    with pytest.warns(rewire.RewireWarning, match=r"'b' gets inputs of more than 8 sizes.*'channel'") as said:
        gradients, held = many_sizes(model, [*range(4, 20), *range(4, 20)])
    assert len(said) == 1
    for (size, one), (again, other) in zip(gradients[:16], gradients[16:], strict=True):
        assert size == again
        assert torch.equal(one, other), size
    assert held[-1] == held[15] == sum(8 * 3 * (size - 1) ** 2 for size in range(12, 20))
    rewire.feedback(model)["b"].zero_()
    gradients, _ = many_sizes(model, [*range(4, 14), 19])
    assert not gradients[-1][1].any()


def test_many_sizes_of_one_b():
    model = convert(seeded(Pooled), Dense(per="channel"), output="head")
    _, held = many_sizes(model, range(4, 30))
    assert set(held) == {8 * 3}


def test_outputs_with_other_numbers_of_rows_leave_no_routes_behind():
    model = convert(seeded(Pooled), Dense(per="channel"), output="head")
    for rows in range(2, 300):
        model(randn(rows, 2, 4, 4)).square().sum().backward()
    assert len(state_of(model.b).routes) <= 256


@every
def test_inputs_of_several_sizes_each_have_their_own_b(structure):
    """Per element; per channel it is the same at all sizes."""
    model = convert(seeded(Pooled), structure, output="head")
    for size in (5, 6, 5):
        model.zero_grad()
        x = randn(4, 2, size, size)
        model(x).square().sum().backward()
        h = torch.tanh(model.a(x)).detach()
        e = rewire.output_error(model)
        if structure.per == "element":
            fed = (e @ B_of(structure, "b", (8, *h.shape[1:])).flatten(1)).reshape(h.shape)
        else:
            fed = (e @ B_of(structure, "b", (8, 3)))[:, :, None, None].expand(h.shape)
        close(model.a.weight.grad, nn.grad.conv2d_weight(x, model.a.weight.shape, fed * (1 - h**2)))
