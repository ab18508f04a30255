"""Feedback is a pure function of (seed, layer name, shape, distribution); measured scales belong to the conversion."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .plain import (
    SCALE,
    chain,
    check,
    cross_entropy,
    error,
    mlp,
    randn,
    rule_gradients,
    same,
    seeded,
    settled,
    states,
    weights,
)
from .ranks import PATIENCE, environment, run_ranks

ROOT = str(Path(rewire.__file__).parents[1])
LABELS = torch.tensor([0, 3, 1, 2, 0, 1])
LOSS = cross_entropy(LABELS)
X = randn(6, 5, seed=1)
WITH_RANDOM = ("fa", "frsf", "brsf", "dfa", "sdfa")


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)
    )


def used(model, x, passes=2):
    for _ in range(passes):
        with rewire.targets(LABELS):
            F.cross_entropy(model(x), LABELS).backward()
    return {name: B.clone() for name, B in rewire.feedback(model).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- the same whatever happens -------------------------------------------------------------------------------

PROGRAM = """
import hashlib, json, sys
import torch
import rewire
from torch import nn

names = sys.argv[1:]
torch.manual_seed(0)
model = nn.ModuleDict({n: nn.Linear(6, 6) for n in ("in", "b", "c", "out")}).double()
x = torch.randn(5, 6, dtype=torch.float64)
found = {}
for rule in ("fa", "frsf", "brsf", "dfa"):
    rewire.convert(model, rule, scale=0.3, seed=12)
    h = model["in"](x)
    for n in names:
        h = torch.tanh(model[n](torch.tanh(h)))
    model["out"](h).square().sum().backward()
    for name, B in sorted(rewire.feedback(model).items()):
        found[rule + " " + name] = hashlib.sha256(B.numpy().tobytes()).hexdigest()
print(json.dumps([hash("a string"), found]))
"""


def run_python(program, *arguments, cwd=None, **more):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_same_in_two_processes_whatever_the_string_hash_and_the_order_of_layers():
    hash1, one = json.loads(run_python(PROGRAM, "b", "c", PYTHONHASHSEED="1"))
    hash2, two = json.loads(run_python(PROGRAM, "c", "b", PYTHONHASHSEED="2"))
    assert hash1 != hash2
    assert one == two
    assert len(one) == 3 * 4 + 3
    for rule in ("fa", "frsf", "brsf", "dfa"):
        assert len({digest for name, digest in one.items() if name.startswith(rule)}) == (3 if rule == "dfa" else 4)


def test_feedback_is_what_it_was():
    """Saved runs and published numbers depend on these bits; written from the definition, without the library."""
    model = rewire.convert(mlp().float(), "dfa", scale=0.5, seed=7)
    B = used(model, X.float())["2"]
    text = "7|2|(4, 7)|normal|0|0"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    numbers = np.random.Generator(np.random.Philox(key=key)).standard_normal(28, dtype=np.float32)
    assert torch.equal(B, torch.from_numpy(numbers).reshape(4, 7) * 0.5)


@pytest.mark.parametrize("rule", WITH_RANDOM)
def test_whatever_order_layers_first_run_in(rule):
    forwards, backwards = (rewire.convert(mlp((5, 5, 5, 5, 5)), rule, scale=SCALE) for _ in range(2))
    LABELS_ = torch.tensor([0, 3, 1, 2, 0, 1])
    h = g = X
    for a, b in zip(range(0, 8, 2), range(6, -1, -2), strict=True):
        h, g = torch.tanh(forwards[a](h)), torch.tanh(backwards[b](g))
    with rewire.targets(LABELS_):
        h.square().sum().backward()
        g.square().sum().backward()
    one, two = rewire.feedback(forwards), rewire.feedback(backwards)
    both = one.keys() & two.keys()
    assert len(both) >= 2
    for name in both:
        if rule == "brsf":
            assert torch.equal(one[name].abs(), two[name].abs())
        else:
            assert torch.equal(one[name], two[name])


@pytest.mark.parametrize("rule", WITH_RANDOM)
@pytest.mark.parametrize("make", [mlp, lambda: seeded(cnn)], ids=["mlp", "cnn"])
def test_the_same_after_save_and_load(rule, make):
    x = X if make is mlp else randn(6, 2, 8, 8)
    model = rewire.convert(make(), rule, seed=5)
    if make is not mlp:
        model(x)
    before = used(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    torch.save({"model": model.state_dict(), "scales": rewire.scales(model)}, plain := io.BytesIO())
    buffer.seek(0)
    plain.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert equal(rewire.feedback(again), rewire.feedback(model))
    # or from a plain checkpoint, converted anew with the scales kept beside it
    checkpoint = torch.load(plain)
    fresh = make()
    fresh.load_state_dict(checkpoint["model"], strict=True)
    rewire.convert(fresh, rule, seed=5, scale=checkpoint["scales"])
    if rule != "brsf":
        assert equal(used(fresh, x, 1), before)


@pytest.mark.parametrize("rule", ["fa", "dfa", "sdfa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_same_numbers_in_every_dtype(rule, dtype):
    full = used(rewire.convert(mlp().float(), rule, scale=SCALE), X.float())
    other = used(rewire.convert(mlp().to(dtype), rule, scale=SCALE), X.to(dtype))
    assert full.keys() == other.keys() and full
    for name, B in full.items():
        assert other[name].dtype == dtype
        assert torch.equal(other[name], B.to(dtype))


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_changing_the_dtype_later_changes_no_number(rule):
    model = rewire.convert(mlp().float(), rule, scale=SCALE)
    full = used(model, X.float())
    double = used(model.double(), X)
    assert all(torch.equal(double[n], B.double()) for n, B in full.items())


@pytest.mark.parametrize("rule", WITH_RANDOM)
def test_other_seeds_names_and_shapes_give_other_numbers(rule):
    def numbers(seed, widths=(5, 6, 6, 6, 4)):
        model = rewire.convert(mlp(widths), rule, scale=SCALE, seed=seed)
        return {n: B.abs().flatten() for n, B in used(model, X, 1).items()}

    zero, again, one, wider = numbers(0), numbers(0), numbers(1), numbers(0, (5, 6, 7, 6, 4))
    assert equal(zero, again)
    seen = [*zero.values(), *one.values(), wider["4"]]
    for i, a in enumerate(seen):
        for b in seen[i + 1 :]:
            n = min(len(a), len(b))
            assert not torch.isclose(a[:n], b[:n]).any()


def test_redraws_differ_and_repeat_from_the_start():
    def draws(n):
        model = rewire.convert(mlp(), "brsf", scale=SCALE)
        found = []
        for _ in range(n):
            LOSS(model(X)).backward()
            found.append(rewire.feedback(model)["2"].abs())
        return found

    one, two = draws(4), draws(4)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(not torch.isclose(a, b).any() for i, a in enumerate(one) for b in one[i + 1 :])


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_distribution(rule):
    model = rewire.convert(seeded(chain, 40, 200, 150, 50), rule, scale=SCALE, seed=3)
    labels = torch.tensor([1, 2])
    cross_entropy(labels)(model(randn(2, 40))).backward()
    for name in ("2", "4"):
        B = rewire.feedback(model)[name] / SCALE
        n = B.numel()
        assert abs(B.mean()) < 5 / math.sqrt(n)
        assert abs(B.var() - 1) < 5 * math.sqrt(2 / n)
        assert abs((B**4).mean() - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("rule", ["bp", *WITH_RANDOM, "usf", "drtp", "shallow"])
def test_global_random_states_are_left_alone(rule):
    def state():
        return torch.get_rng_state(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], random.getstate()

    model = seeded(cnn)
    x = randn(6, 2, 8, 8)
    before = state()
    rewire.convert(model, rule)
    used(model, x, 3)
    str(rewire.summary(model))
    copy.deepcopy(model)
    rewire.restore(model)
    after = state()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_the_global_seed_does_not_matter(rule):
    found = []
    for s in (1, 2):
        model = mlp()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s)
            np.random.seed(s)
            found.append(used(rewire.convert(model, rule, scale=SCALE), X))
    assert equal(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", WITH_RANDOM)
@pytest.mark.parametrize("scale", [SCALE, "auto"])
def test_the_same_on_a_gpu(rule, scale):
    cpu = rewire.convert(mlp(), rule, scale=scale)
    gpu = rewire.convert(mlp().cuda(), rule, scale=scale)
    moved = rewire.convert(mlp(), rule, scale=scale)
    LOSS(moved(X)).backward()
    moved.cuda()
    for _ in range(2):
        LOSS(cpu(X)).backward()
        F.cross_entropy(gpu(X.cuda()), LABELS.cuda()).backward()
    F.cross_entropy(moved(X.cuda()), LABELS.cuda()).backward()
    a, b, c = (rewire.feedback(m) for m in (cpu, gpu, moved))
    assert a.keys() == b.keys() == c.keys() and a
    for name, B in a.items():
        assert b[name].is_cuda and c[name].is_cuda
        if scale == SCALE:
            assert torch.equal(b[name].cpu(), B) and torch.equal(c[name].cpu(), B)
        same(b[name].cpu(), B)
        same(c[name].cpu(), B)
    for p, q in zip(cpu.parameters(), gpu.parameters(), strict=True):
        same(q.grad.cpu(), p.grad)


# -- measured scales --------------------------------------------------------------------------------------------


def unit(seed, name, shape):
    key = int.from_bytes(
        hashlib.blake2b(f"{seed}|{name}|{tuple(shape)}|normal|0|0".encode(), digest_size=16).digest(), "little"
    )
    numbers = np.random.Generator(np.random.Philox(key=key)).standard_normal(math.prod(shape), dtype=np.float32)
    return torch.from_numpy(numbers).reshape(shape).double()


def backprop_inputs(layers, x, e):
    """The exact gradient at each layer's input, by name."""
    h = states(layers, x)
    found, delta = {}, e
    for (name, W, _), h_i in zip(reversed(layers), reversed(h[:-1]), strict=True):
        found[name] = delta @ W
        delta = found[name] * (1 - h_i**2)
    return found


def test_auto_matches_what_each_layer_handed_back():
    """s such that the RMS of s e R is the RMS of backprop's gradient at the layer's input, on the first batch."""
    model = rewire.convert(mlp(), "dfa", seed=6)
    layers = weights(model)
    e = error(LOSS, states(layers, X)[-1])
    LOSS(model(X)).backward()
    check(model, rule_gradients("bp", layers, X, e, {}))  # this pass is exact
    model.zero_grad()
    LOSS(model(X)).backward()
    exact = backprop_inputs(layers, X, e)
    wanted = {}
    for name, width in (("2", 7), ("4", 6)):
        fed = e @ unit(6, name, (4, width))
        wanted[name] = float(exact[name].square().mean().sqrt() / fed.square().mean().sqrt())
    assert rewire.scales(model) == pytest.approx(wanted, rel=1e-12)
    B = rewire.feedback(model)
    for name, width in (("2", 7), ("4", 6)):
        same(B[name], unit(6, name, (4, width)).float().mul(wanted[name]).double(), name, tol=1e-6)
    check(model, rule_gradients("dfa", layers, X, e, B))
    rows = {r.name: r for r in rewire.summary(model).rows}
    assert rows["2"].scale == rewire.scales(model)["2"]


def test_auto_sums_over_all_backwards_before_the_first_forward_that_needs_it():
    """Gradient accumulation in the first step: later parts follow the rule; the scale is of the first part."""
    model = rewire.convert(mlp(), "dfa", seed=6)
    layers = weights(model)
    LOSS(model(X)).backward()
    first = rewire.scales(model)
    cross_entropy(LABELS[:2])(model(3 * X[:2])).backward()
    model(X)
    assert rewire.scales(model) == first
    e = error(LOSS, states(layers, X)[-1])
    e2 = error(cross_entropy(LABELS[:2]), states(layers, 3 * X[:2])[-1])
    one = rule_gradients("bp", layers, X, e, {})
    two = rule_gradients("dfa", layers, 3 * X[:2], e2, rewire.feedback(model))
    check(model, {n: one[n] + two[n] for n in one if n != "x"})


def test_auto_measures_a_layers_own_share_not_the_sum_with_a_skip_connection():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.r, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = torch.tanh(self.inp(x))
            return self.out(h + self.r(h))

    model = rewire.convert(seeded(Residual), "dfa", seed=2)
    LOSS(model(X)).backward()
    model(X)
    W = {name: (W, b) for name, W, b in weights(model)}
    h = torch.tanh(X @ W["inp"][0].T + W["inp"][1])
    m = h + h @ W["r"][0].T + W["r"][1]
    e = error(LOSS, m @ W["out"][0].T + W["out"][1])
    exact = {"out": e @ W["out"][0], "r": e @ W["out"][0] @ W["r"][0]}
    wanted = {n: float(g.norm() / (e @ unit(2, n, (4, 6))).norm()) for n, g in exact.items()}
    assert rewire.scales(model) == pytest.approx(wanted, rel=1e-12)


def test_auto_of_a_layer_used_several_times_is_over_all_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.r, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = torch.tanh(self.inp(x))
            return self.out(torch.tanh(self.r(torch.tanh(self.r(h)))))

    model = rewire.convert(seeded(Twice), "dfa", seed=2)
    LOSS(model(X)).backward()
    named = {layer[0]: layer for layer in weights(model)}
    # As a chain of four layers, of which two are the same.
    unrolled = [named["inp"], ("r1", *named["r"][1:]), ("r2", *named["r"][1:]), named["out"]]
    e = error(LOSS, states(unrolled, X)[-1])
    exact = backprop_inputs(unrolled, X, e)
    fed = (e @ unit(2, "r", (4, 6))).square().sum()
    wanted = {
        "r": float(((exact["r1"].square().sum() + exact["r2"].square().sum()) / (2 * fed)).sqrt()),
        "out": float(exact["out"].norm() / (e @ unit(2, "out", (4, 6))).norm()),
    }
    assert rewire.scales(model) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("shrunk", [1e-4, 1e-8])
def test_auto_says_so_where_backprop_hands_back_next_to_nothing(shrunk):
    """Feedback of that size would stay so, where backprop's gradient may grow."""
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(shrunk)
    rewire.convert(model, "dfa")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            LOSS(model(X)).backward()
    said = [str(w.message) for w in caught if "hardly learn" in str(w.message)]
    assert len(said) == (shrunk < 1e-6)
    if said:
        scales = rewire.scales(model)
        assert said[0].startswith("1 of 2 layers")
        assert f"of layer '2' {scales['2']:.1e}, of layer '4' {scales['4']:.1e}" in said[0]


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
def test_auto_of_local_rules_is_the_weights_standard_deviation_at_conversion(rule):
    model = mlp()
    wanted = {name: float(W.std()) for name, W, _ in weights(model)}
    rewire.convert(model, rule)
    assert rewire.scales(model) == pytest.approx(wanted, rel=1e-12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    used(model, X)
    assert rewire.scales(model) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("scale", [0.05, 2])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_number_means_exactly_that_from_the_first_step(rule, scale):
    model = rewire.convert(mlp(), rule, scale=scale, seed=6)
    assert set(rewire.scales(model).values()) == {scale}
    LOSS(model(X)).backward()
    B = rewire.feedback(model)
    for name, n, width in (("2", 6, 7), ("4", 4, 6)):
        shape = (4, width) if rule == "dfa" else (n, width)
        assert torch.equal(B[name], (unit(6, name, shape).float() * scale).double())
    layers = weights(model)
    check(model, rule_gradients(rule, layers, X, error(LOSS, states(layers, X)[-1]), B))


@pytest.mark.parametrize("rule", ["fa", "dfa", "sdfa"])
def test_resuming_with_measured_scales(rule):
    old = rewire.convert(mlp(), rule, seed=3)
    settled(old, X, LOSS)
    with torch.no_grad():
        for p in old.parameters():
            p.mul_(1.5)
    scales = json.loads(json.dumps(rewire.scales(old)))  # plain numbers, as for a checkpoint
    resumed = mlp()
    resumed.load_state_dict(old.state_dict())
    rewire.convert(resumed, rule, seed=3, scale=scales)
    for model in (old, resumed):
        model.zero_grad()
        LOSS(model(X)).backward()
    assert equal(rewire.feedback(old), rewire.feedback(resumed))
    for p, q in zip(old.parameters(), resumed.parameters(), strict=True):
        same(q.grad, p.grad)
    if rule != "sdfa":
        layers = weights(old)
        e = error(LOSS, states(layers, X)[-1])
        check(resumed, rule_gradients(rule, layers, X, e, rewire.feedback(old)))  # no measuring pass
    assert {n: s for n, s in rewire.scales(resumed).items() if n in scales} == scales


def test_copies_of_a_measured_model_keep_its_scales():
    model = rewire.convert(mlp(), "dfa")
    LOSS(model(X)).backward()
    twin = copy.deepcopy(model)  # between the measuring pass and the next forward
    for m in (model, twin):
        m.zero_grad()
        LOSS(m(X)).backward()
    assert rewire.scales(model) == rewire.scales(twin) and rewire.scales(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_first_pass_that_is_all_zeros_or_not_finite_measures_nothing():
    model = rewire.convert(mlp(), "dfa")
    layers = weights(model)
    with pytest.warns(rewire.RewireWarning):
        (0 * model(X)).sum().backward()
        (float("inf") * model(X)).sum().backward()
        model(X)
    assert rewire.scales(model) == {}
    model.zero_grad()
    LOSS(model(X)).backward()
    e = error(LOSS, states(layers, X)[-1])
    check(model, rule_gradients("bp", layers, X, e, {}))
    model.zero_grad()
    LOSS(model(X)).backward()
    check(model, rule_gradients("dfa", layers, X, e, rewire.feedback(model)))


# -- several processes ----------------------------------------------------------------------------------------------

RANK = """
import sys, torch
import torch.distributed as dist
import rewire
from torch import nn
from torch.nn.parallel import DistributedDataParallel

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
x, labels = data["x"].chunk(2)[rank], data["labels"].chunk(2)[rank]
found = {}
for rule in ("fa", "dfa"):
    for scale in (0.3, "auto"):
        for order in ("convert, wrap", "wrap, convert"):
            model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()
            model.load_state_dict(data["model"])
            if order == "convert, wrap":
                rewire.convert(model, rule, scale=scale)
                ddp = DistributedDataParallel(model)
            else:
                ddp = DistributedDataParallel(model)
                rewire.convert(model, rule, scale=scale)
            passes = []
            for _ in range(3):
                model.zero_grad()
                nn.functional.cross_entropy(ddp(x), labels).backward()
                passes.append([p.grad.clone() for p in model.parameters()])
            ddp(x)
            feedback = {n: B.clone() for n, B in rewire.feedback(model).items()}
            found[rule, scale, order] = passes, rewire.scales(model), feedback
torch.save(found, f"{folder}/rank{rank}.pt")
del model, ddp
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found that train one model on half a batch each."""
    folder = tmp_path_factory.mktemp("ranks")
    x = randn(8, 5, seed=5)
    x[4:] *= 3  # the halves measure different scales
    labels = torch.arange(8) % 4
    torch.save({"x": x, "labels": labels, "model": mlp().state_dict()}, folder / "data.pt")
    return x, labels, run_ranks(folder, "-c", RANK)


ORDERS = pytest.mark.parametrize("order", ["convert, wrap", "wrap, convert"])


@ORDERS
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_ddp_equals_one_process_on_the_joined_batch(ranks, rule, order):
    x, labels, found = ranks
    model = rewire.convert(mlp(), rule, scale=0.3)
    layers = weights(model)
    loss_of = cross_entropy(labels)
    e = error(loss_of, states(layers, x)[-1])
    loss_of(model(x)).backward()
    wanted = rule_gradients(rule, layers, x, e, rewire.feedback(model))
    check(model, wanted)
    for rank in found:
        passes, scales, _ = rank[rule, 0.3, order]
        assert set(scales.values()) == {0.3}
        for grads in passes:
            for (name, _), g in zip(model.named_parameters(), grads, strict=True):
                same(g, wanted[name], name)


@ORDERS
def test_ddp_measures_the_same_scales_on_every_rank(ranks, order):
    x, labels, found = ranks
    (passes, scales, feedback), (passes2, scales2, feedback2) = (rank["dfa", "auto", order] for rank in found)
    assert scales == scales2 and scales.keys() == {"2", "4"}
    assert equal(feedback, feedback2)
    assert all(
        torch.equal(a, b) for one, two in zip(passes, passes2, strict=True) for a, b in zip(one, two, strict=True)
    )
    # sums of squares over both halves, each rank's loss being the mean over its own half
    layers = weights(mlp())
    exact, fed = dict.fromkeys(scales, 0.0), dict.fromkeys(scales, 0.0)
    for half, labels_half in zip(x.chunk(2), labels.chunk(2), strict=True):
        e = error(cross_entropy(labels_half), states(layers, half)[-1])
        for name, g in backprop_inputs(layers, half, e).items():
            if name in scales:
                exact[name] += float(g.square().sum())
                fed[name] += float((e @ unit(0, name, (4, g.shape[1]))).square().sum())
    assert scales == pytest.approx({n: math.sqrt(exact[n] / fed[n]) for n in scales}, rel=1e-12)
    # the first pass is backprop, those after it are the rule
    names = [n for n, _ in mlp().named_parameters()]
    e = error(cross_entropy(labels), states(layers, x)[-1])
    for i, wanted in enumerate(
        [rule_gradients("bp", layers, x, e, {}), *[rule_gradients("dfa", layers, x, e, feedback)] * 2]
    ):
        for name, g in zip(names, passes[i], strict=True):
            same(g, wanted[name], f"pass {i}: {name}")
