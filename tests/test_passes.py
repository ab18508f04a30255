"""Every way a forward and a backward can be arranged has one right answer; here each is written out.

The nets are tanh MLPs in float64; :mod:`tests.plain` has their equations. Unless a test is about
``scale="auto"``, scales are given, so that the very first pass follows the rule: most tests run once in the
first pass, when the output layer is not known yet, and once later.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import sys
import threading
import tracemalloc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rewire
from rewire.swap import states_of

from .leftovers import counts, left_by, no_gc
from .plain import (
    SCALE,
    TOL,
    add,
    check,
    converted,
    cross_entropy,
    error,
    gradients,
    mlp,
    randn,
    rule_gradients,
    same,
    seeded,
    settled,
    states,
    weights,
)

# Layers that are skipped, or heads that do not run, in the first pass are what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:layer .* did not run:rewire.RewireWarning")

RULES = pytest.mark.parametrize("rule", ["dfa", "fa", "bp"])
WHEN = pytest.mark.parametrize("later", [False, True], ids=["first", "later"])

X = randn(6, 5, seed=1)
LABELS = torch.tensor([0, 3, 1, 2, 0, 1])
LOSS = cross_entropy(LABELS)


def ready(rule, later, **options):
    """A converted 5-7-6-4 MLP, in its first pass or after two."""
    model = converted(rule, **options)
    return settled(model, X, LOSS) if later else model


def expected(model, rule, x, e, extra=None, prefix=""):
    return rule_gradients(rule, weights(model), x, e, rewire.feedback(model), extra, prefix)


def output(model, x):
    return states(weights(model), x)[-1]


# -- several forwards and backwards ----------------------------------------------------------------------


@RULES
@WHEN
def test_two_forwards_one_joint_backward(rule, later):
    model = ready(rule, later)
    x2 = randn(4, 5, seed=2)

    def joint(y1, y2):
        return F.cross_entropy(y1, LABELS) + (y1[:4] * y2).sum() + y2.square().mean()

    y1, y2 = output(model, X).requires_grad_(), output(model, x2).requires_grad_()
    e1, e2 = torch.autograd.grad(joint(y1, y2), (y1, y2))
    joint(model(X), model(x2)).backward()
    check(model, add(expected(model, rule, X, e1), expected(model, rule, x2, e2)))


@RULES
@WHEN
@pytest.mark.parametrize("order", ["AB", "BA"])
def test_two_models_interleaved(rule, later, order):
    a = ready(rule, later)
    b = rewire.convert(mlp((3, 8, 2), 5), rule, scale=0.1)
    xb, loss_b = randn(9, 3, seed=3), lambda y: y.pow(3).sum()
    if later:
        settled(b, xb, loss_b)
    losses = {"A": LOSS(a(X)), "B": loss_b(b(xb))}
    for which in order:
        losses[which].backward()
    check(a, expected(a, rule, X, error(LOSS, output(a, X))))
    check(b, expected(b, rule, xb, error(loss_b, output(b, xb))))


@RULES
@WHEN
@pytest.mark.parametrize("frozen", [False, True], ids=["D trains", "D frozen"])
def test_gan_each_model_is_fed_by_its_own_output_error(rule, later, frozen):
    g = rewire.convert(mlp((3, 6, 5), 1), rule, scale=SCALE, seed=1)
    d = rewire.convert(mlp((5, 7, 6, 1), 2), rule, scale=SCALE, seed=2)
    z = randn(8, 3, seed=4)

    def loss_of(y):
        return F.binary_cross_entropy_with_logits(y, torch.ones_like(y))

    if later:
        settled(d, X, loss_of)
        settled(g, z, lambda fake: loss_of(d(fake)))
        d.zero_grad()
    d.requires_grad_(not frozen)
    loss_of(d(g(z))).backward()
    fake = output(g, z)
    of_d = expected(d, rule, fake, error(loss_of, output(d, fake)))
    check(g, expected(g, rule, z, of_d["x"]))
    check(d, {} if frozen else of_d)
    if rule == "dfa":
        same(rewire.output_error(g), of_d["x"])


@RULES
@WHEN
def test_gradient_accumulation(rule, later):
    model = ready(rule, later)
    parts = [(X[:2], LABELS[:2]), (X[2:5], LABELS[2:5]), (X[5:], LABELS[5:])]
    for x, labels in parts:
        cross_entropy(labels)(model(x)).backward()
    check(
        model,
        add(*(expected(model, rule, x, error(cross_entropy(labels), output(model, x))) for x, labels in parts)),
    )


@RULES
@WHEN
def test_retain_graph_and_a_second_backward(rule, later):
    model = ready(rule, later)
    y = model(X)
    y.retain_grad()
    losses = [LOSS, LOSS, lambda y: y.square().sum()]
    for loss_of in losses:
        loss_of(y).backward(retain_graph=True)
    check(model, add(*(expected(model, rule, X, error(loss_of, output(model, X))) for loss_of in losses)))


@RULES
@WHEN
def test_backward_of_two_losses_on_one_output_in_turn_and_together(rule, later):
    model = ready(rule, later)
    y = model(X)
    second = y[:, :2].exp().sum()
    LOSS(y).backward(retain_graph=True)
    second.backward()
    e = error(lambda y: LOSS(y) + y[:, :2].exp().sum(), output(model, X))
    check(model, expected(model, rule, X, e))


@RULES
@WHEN
@pytest.mark.parametrize("subset", [("0.weight",), ("2.weight", "2.bias"), ("4.bias",), ("4.weight", "0.bias")])
def test_autograd_grad_for_some_parameters_then_a_full_backward(rule, later, subset):
    model = ready(rule, later)
    loss = LOSS(model(X))
    named = dict(model.named_parameters())
    some = torch.autograd.grad(loss, [named[n] for n in subset], retain_graph=True)
    e = error(LOSS, output(model, X))
    for name, g in zip(subset, some, strict=True):
        same(g, expected(model, rule, X, e)[name], name)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    check(model, expected(model, rule, X, e))


@WHEN
def test_autograd_grad_of_a_hidden_activation_is_what_was_fed_back(later):
    model = ready("dfa", later)
    h = model[:2](X)
    (g,) = torch.autograd.grad(LOSS(model[2:](h)), h)
    same(g, error(LOSS, output(model, X)) @ rewire.feedback(model)["2"])


# -- nothing left behind -----------------------------------------------------------------------------------


@WHEN
@pytest.mark.parametrize(
    ("rule", "skip"), [("dfa", "keep"), ("dfa", "cut"), ("fa", "keep"), ("brsf", "keep"), ("shallow", "keep")]
)
def test_a_thousand_forwards_without_backward_leave_nothing(rule, skip, later):
    model = ready(rule, later, skip=skip)
    for _ in range(10):
        model(X)
    sizes = []
    tracemalloc.start()
    try:
        with no_gc():
            before = counts()
            for i in range(5):
                for _ in range(250):
                    model(X)
                if i == 0:
                    assert counts() == before  # nothing waits for the next collection
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # One object left per forward would be 14 kB in each stretch; Python's own free lists fill up and stop.
    assert min(b - a for a, b in itertools.pairwise(sizes)) < 7_000, sizes


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_forwards_without_backward_leave_the_next_pass_right(rule):
    model = converted(rule)
    for n in (3, 6, 1):
        model(X[:n])
    LOSS(model(X)).backward()
    model(X[:2])
    LOSS(model(X)).backward()
    e = error(LOSS, output(model, X))
    check(model, add(expected(model, rule, X, 2 * e)))


@pytest.mark.parametrize("skip", ["keep", "cut"])
@pytest.mark.parametrize("rule", ["dfa", "fa"])
@WHEN
def test_the_graph_is_freed_at_once(rule, later, skip):
    model = ready(rule, later, skip=skip)
    alive = []

    def note(module, args, out):
        alive.append(weakref.ref(args[0]))
        alive.append(weakref.ref(out))

    for module in model:
        module.register_forward_hook(note)
    with no_gc():
        y = model(X)
        held = [ref for ref in alive if ref() is not None]
        assert len(held) >= 2  # the model's input and its output
        del y
        assert [ref() for ref in alive if ref() is not None and ref() is not X] == []
        alive.clear()
        loss = LOSS(model(X))
        loss.backward()  # the loss is kept, as in a training loop; the graph is not
        leftover = [ref() for ref in alive if ref() is not None and ref() is not X]
        assert leftover == []


def test_a_thousand_training_passes_leave_nothing():
    model = ready("dfa", later=True)
    total = 0.0
    with no_gc():
        for i in range(500):
            if i == 10:
                before = counts()
            loss = LOSS(model(X))
            loss.backward()
            total += loss.item()
            del loss
        assert counts() == before


@WHEN
@pytest.mark.parametrize("rule", ["dfa", "fa", "brsf", "shallow"])
def test_gradients_with_a_graph_leave_nothing(rule, later):
    """With ``create_graph`` e and δ have graphs, which hold what computed them: nobody may hold e in turn."""
    model = ready(rule, later)

    local = rule in ("fa", "brsf")

    def once():
        with pytest.raises(rewire.PassError, match="create_graph") if local else contextlib.nullcontext():
            torch.autograd.grad(LOSS(model(X)), list(model.parameters()), create_graph=True, allow_unused=True)

    once()
    once()
    assert not left_by(once, collect=local)  # tracebacks are for the collector


@WHEN
def test_an_output_after_a_backward_that_kept_the_graph(later):
    """What was run before feeds it too: the same gradients as with the sum of both losses."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def hidden(self, x):
            return torch.tanh(self.b(torch.tanh(self.a(x))))

        def forward(self, x):
            return self.c(self.hidden(x))

    def passes(apart):
        model = rewire.convert(seeded(Net), "dfa", scale=SCALE)
        if later:
            settled(model, X, LOSS)
        h = model.hidden(X)
        first = LOSS(model.c(h))
        if apart:
            first.backward(retain_graph=True)
        second = 3 * LOSS(-model.c(torch.cos(h)))
        (second if apart else first + second).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    check_same = passes(apart=False)
    for name, gradient in passes(apart=True).items():
        same(gradient, check_same[name], name)


def test_a_kept_loss_keeps_no_error_alive():
    model = ready("dfa", later=True)
    losses = []

    def alive():
        return sum(issubclass(type(t), torch.Tensor) and t.shape == (6, 4) for t in gc.get_objects())

    with no_gc():
        for i in range(5):
            losses.append(LOSS(model(X)))
            losses[-1].backward()
            if i == 0:
                before = alive()
        assert alive() == before


@WHEN
@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_an_exception_in_mid_forward_leaves_nothing(rule, later):
    model = ready(rule, later)
    broken = True

    def fail(module, args):
        if broken:
            raise KeyboardInterrupt

    handle = model[4].register_forward_pre_hook(fail)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(X)
    with no_gc():
        before = counts()
        for _ in range(20):
            with contextlib.suppress(KeyboardInterrupt):
                model(X)
        assert counts() == before
    broken = False
    LOSS(model(X)).backward()
    check(model, expected(model, rule, X, error(LOSS, output(model, X))))
    handle.remove()


@WHEN
def test_an_exception_in_mid_backward_leaves_nothing(later):
    model = ready("dfa", later)

    def fail(g):
        raise KeyboardInterrupt

    handle = model[2].weight.register_hook(fail)
    y = model(X)
    with pytest.raises(KeyboardInterrupt):
        LOSS(y).backward()
    handle.remove()
    model.zero_grad()
    del y
    loss_of = lambda y: y.square().sum()  # noqa: E731
    loss_of(model(X)).backward()
    check(model, expected(model, "dfa", X, error(loss_of, output(model, X))))


@RULES
@WHEN
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_evaluation_between_forward_and_backward(rule, later, mode):
    model = ready(rule, later)
    loss = LOSS(model(X))
    with mode():
        same(model(randn(3, 5, seed=9)), output(model, randn(3, 5, seed=9)))
    loss.backward()
    check(model, expected(model, rule, X, error(LOSS, output(model, X))))


def test_evaluation_before_the_first_pass_and_while_measuring():
    model = converted("dfa", scale="auto")
    with torch.inference_mode():
        model(X)
    loss = LOSS(model(X))
    with torch.inference_mode():
        model(X)
    loss.backward()
    check(model, expected(model, "bp", X, error(LOSS, output(model, X))))  # the measuring pass is exact
    with torch.inference_mode():
        model(X[:2])
    model.zero_grad()
    LOSS(model(X)).backward()
    check(model, expected(model, "dfa", X, error(LOSS, output(model, X))))


# -- parts of the model --------------------------------------------------------------------------------------


@RULES
@WHEN
def test_submodules_called_without_the_root(rule, later):
    model = ready(rule, later)
    backbone, head = model[:4], model[4]
    LOSS(head(backbone(X))).backward()
    check(model, expected(model, rule, X, error(LOSS, output(model, X))))


def backbone_alone(model):
    loss = model[:4](X).square().sum()
    with pytest.raises(rewire.PassError, match=r"layer '2' got a gradient.*'4'"):
        loss.backward()


@pytest.mark.parametrize("skip", ["keep", "cut"])
def test_backbone_alone_names_the_layer(skip):
    backbone_alone(ready("dfa", later=True, skip=skip))


def test_backbone_alone_again_and_again_names_the_layer():
    model = ready("dfa", later=True)
    model[:4](X)
    for _ in range(3):
        backbone_alone(model)
    model.zero_grad()
    LOSS(model(X)).backward()
    check(model, expected(model, "dfa", X, error(LOSS, output(model, X))))


def test_backbone_alone_names_the_layer_in_the_first_pass_when_the_output_is_given():
    model = converted("dfa", output="4")
    loss = model[:4](X).square().sum()
    with pytest.raises(rewire.PassError, match="'2'"):
        loss.backward()


class SecondOutput(nn.Linear):
    """Returns what is the second output of its graph node."""

    def forward(self, x):
        return torch.var_mean(super().forward(x)[None], 0)[1]


def test_backbone_alone_names_a_layer_whose_node_has_several_outputs():
    plain = mlp()
    plain[2].__class__ = SecondOutput
    model = settled(rewire.convert(plain, "dfa", scale=1.0), X, LOSS)
    assert model[:4](X).grad_fn.next_functions[0][0].name().startswith("VarMean")
    backbone_alone(model)


@pytest.mark.parametrize("rule", ["fa", "bp"])
@WHEN
def test_backbone_alone_under_a_local_rule_is_right(rule, later):
    model = ready(rule, later)

    def loss_of(h):
        return h.square().sum()

    loss_of(model[:4](X)).backward()
    layers = weights(model)[:2]
    a = states(layers, X)[-1]
    delta = error(lambda a: loss_of(torch.tanh(a)), a)
    feedback = rewire.feedback(model)
    check(model, rule_gradients(rule, layers, X, delta, feedback))


def test_backbone_alone_without_gradient_or_under_backprop():
    model = ready("dfa", later=True)
    with torch.no_grad():
        model[:4](X)
    with rewire.use_rule(model, "bp"):
        model[:4](X).square().sum().backward()
    layers = weights(model)[:2]
    delta = error(lambda a: torch.tanh(a).square().sum(), states(layers, X)[-1])
    check(model, rule_gradients("bp", layers, X, delta, {}))


def side(h):
    return 0.3 * h.pow(3).sum()


def side_gradient(model):
    h = states(weights(model), X)[2]
    return 0.9 * h**2


@RULES
@WHEN
def test_side_loss_on_a_hidden_activation_jointly(rule, later):
    model = ready(rule, later)
    h = model[:4](X)
    (LOSS(model[4](h)) + side(h)).backward()
    e = error(LOSS, output(model, X))
    check(model, expected(model, rule, X, e, extra={2: side_gradient(model)}))


@RULES
@pytest.mark.parametrize("first", ["loss", "side"])
def test_side_loss_on_a_hidden_activation_in_a_backward_of_its_own(rule, first):
    model = ready(rule, later=True)
    h = model[:4](X)
    losses = [LOSS(model[4](h)), side(h)]
    for loss in losses if first == "loss" else losses[::-1]:
        loss.backward(retain_graph=True)
    e = error(LOSS, output(model, X))
    check(model, expected(model, rule, X, e, extra={2: side_gradient(model)}))


def test_side_loss_alone_trains_the_layer_it_looks_at():
    model = ready("dfa", later=True)
    h = model[:4](X)
    model[4](h)
    side(h).backward()
    _, h1, h2, _ = states(weights(model), X)
    delta = 0.9 * h2**2 * (1 - h2**2)
    check(model, {"2.weight": delta.T @ h1, "2.bias": delta.sum(0)})


@pytest.mark.parametrize("first", ["loss", "side"])
@pytest.mark.parametrize("scale", [SCALE, "auto"])
def test_side_loss_before_roles_are_settled(first, scale):
    model = converted("dfa", scale=scale)
    h = model[:4](X)
    losses = [LOSS(model[4](h)), side(h)]
    for loss in losses if first == "loss" else losses[::-1]:
        loss.backward(retain_graph=True)
    if scale == "auto":  # measuring: every backward is exact
        e = error(LOSS, output(model, X))
        check(model, expected(model, "bp", X, e, extra={2: side_gradient(model)}))
    model.zero_grad()
    h = model[:4](X)
    (LOSS(model[4](h)) + side(h)).backward()
    roles = {row.name: row.role for row in rewire.summary(model).rows}
    assert roles == {"0": "hidden", "2": "hidden", "4": "output"}
    e = error(LOSS, output(model, X))
    check(model, expected(model, "dfa", X, e, extra={2: side_gradient(model)}))


# -- several outputs -----------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """x - low - trunk -+- a (4 outputs); +- inner - b (``width`` outputs)."""

    def __init__(self, width=3):
        super().__init__()
        self.low = nn.Linear(5, 7)
        self.trunk = nn.Linear(7, 6)
        self.a = nn.Linear(6, 4)
        self.inner = nn.Linear(6, 5)
        self.b = nn.Linear(5, width)

    def forward(self, x, heads="ab"):
        h = torch.tanh(self.trunk(torch.tanh(self.low(x))))
        ya = self.a(h) if "a" in heads else None
        yb = self.b(torch.tanh(self.inner(h))) if "b" in heads else None
        return ya, yb


def two_heads(x, model, ea, eb, B):
    """Gradients under dfa; an error may be None. B: (layer, output) -> feedback."""
    W = {name: (W, b) for name, W, b in weights(model)}

    def linear(name, h):
        return h @ W[name][0].T + W[name][1]

    h0 = torch.tanh(linear("low", x))
    h1 = torch.tanh(linear("trunk", h0))
    h2 = torch.tanh(linear("inner", h1))
    found = {}

    def take(name, delta, h):
        found[f"{name}.weight"], found[f"{name}.bias"] = delta.T @ h, delta.sum(0)

    at_h1, at_h0 = 0.0, 0.0
    if ea is not None:
        take("a", ea, h1)
        at_h1 = at_h1 + ea @ B("a", "a")
        at_h0 = at_h0 + ea @ B("trunk", "a")
    if eb is not None:
        take("b", eb, h2)
        take("inner", (eb @ B("b", "b")) * (1 - h2**2), h1)
        at_h1 = at_h1 + eb @ B("inner", "b")
        at_h0 = at_h0 + eb @ B("trunk", "b")
    take("trunk", at_h1 * (1 - h1**2), h0)
    take("low", at_h0 * (1 - h0**2), x)
    return found


def head_outputs(model, x):
    with torch.no_grad():
        return copy.deepcopy(model)(x)


def by_output(model):
    found = rewire.feedback(model)
    return lambda layer, output: found.get(f"{layer}@{output}", found.get(layer))


def loss_a(y):
    return F.cross_entropy(y, LABELS)


def loss_b(y):
    return y.square().sum()


@WHEN
@pytest.mark.parametrize("width", [3, 4], ids=["different sizes", "same size"])
@pytest.mark.parametrize("how", ["joint", "a then b", "b then a"])
def test_two_outputs_with_two_losses(how, width, later):
    model = rewire.convert(seeded(TwoHeads, width), "dfa", scale=SCALE)
    if later:
        settled(model, X, lambda y: loss_a(y[0]) + loss_b(y[1]))
    ya, yb = model(X)
    losses = {"a": loss_a(ya), "b": loss_b(yb)}
    if how == "joint":
        (losses["a"] + losses["b"]).backward()
    else:
        for name in (how[0], how[-1]):
            losses[name].backward(retain_graph=True)
    ya, yb = head_outputs(model, X)
    ea, eb = error(loss_a, ya), error(loss_b, yb)
    B = by_output(model)
    check(model, two_heads(X, model, ea, eb, B))
    if width == 4:
        assert not torch.equal(B("trunk", "a"), B("trunk", "b")), "each output has a feedback of its own"
    found = rewire.output_error(model)
    assert found.keys() == {"a", "b"}
    same(found["a"], ea)
    same(found["b"], eb)


@pytest.mark.parametrize("which", ["a", "b"])
def test_only_one_of_two_outputs_has_a_loss(which):
    model = rewire.convert(seeded(TwoHeads), "dfa", scale=SCALE)
    settled(model, X, lambda y: loss_a(y[0]) + loss_b(y[1]))
    ya, yb = model(X)
    (loss_a(ya) if which == "a" else loss_b(yb)).backward()
    ya, yb = head_outputs(model, X)
    ea = error(loss_a, ya) if which == "a" else None
    eb = error(loss_b, yb) if which == "b" else None
    check(model, two_heads(X, model, ea, eb, by_output(model)))


@pytest.mark.parametrize("which", ["a", "b"])
def test_an_error_from_an_earlier_backward_feeds_no_later_one(which):
    """The first backward stops at a head, so that nothing below has used its error yet."""
    model = rewire.convert(seeded(TwoHeads), "dfa", scale=SCALE)
    settled(model, X, lambda y: loss_a(y[0]) + loss_b(y[1]))
    ya, yb = model(X)
    losses = {"a": loss_a(ya), "b": loss_b(yb)}
    head = model.get_submodule(which)
    torch.autograd.grad(losses.pop(which), head.bias, retain_graph=True)
    next(iter(losses.values())).backward()
    ya, yb = head_outputs(model, X)
    ea, eb = (error(loss_a, ya), None) if which == "b" else (None, error(loss_b, yb))
    check(model, two_heads(X, model, ea, eb, by_output(model)))


@pytest.mark.parametrize("output", [None, ("a", "b")])
def test_heads_that_alternate_from_batch_to_batch(output):
    model = rewire.convert(seeded(TwoHeads), "dfa", scale=SCALE, output=output)
    for heads in "abbaab":
        x = randn(6, 5, seed=ord(heads))
        model.zero_grad()
        ya, yb = model(x, heads)
        (loss_a(ya) if heads == "a" else loss_b(yb)).backward()
        ya, yb = head_outputs(model, x)
        ea = error(loss_a, ya) if heads == "a" else None
        eb = error(loss_b, yb) if heads == "b" else None
        check(model, two_heads(x, model, ea, eb, by_output(model)))
        assert set(rewire.feedback(model)) & {"trunk", f"trunk@{heads}"}


class DeepSupervision(nn.Module):
    """One head looks at two depths."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h1 = torch.tanh(self.one(x))
        h2 = torch.tanh(self.two(h1))
        return self.head(h1), self.head(h2)


@WHEN
def test_a_head_shared_by_two_places(later):
    model = rewire.convert(seeded(DeepSupervision), "dfa", scale=SCALE)

    def loss_of(ys):
        return F.cross_entropy(ys[0], LABELS) + ys[1].pow(3).sum()

    if later:
        settled(model, X, loss_of)
    loss_of(model(X)).backward()
    (W1, b1), (W2, b2), (W3, b3) = [(W, b) for _, W, b in weights(model)]
    h1 = torch.tanh(X @ W1.T + b1)
    h2 = torch.tanh(h1 @ W2.T + b2)
    e1 = error(lambda y: F.cross_entropy(y, LABELS), h1 @ W3.T + b3)
    e2 = error(lambda y: y.pow(3).sum(), h2 @ W3.T + b3)
    B = rewire.feedback(model)
    assert B.keys() == {"two", "head"}
    d2 = (e2 @ B["head"]) * (1 - h2**2)
    d1 = (e1 @ B["head"] + e2 @ B["two"]) * (1 - h1**2)
    check(
        model,
        {
            "head.weight": e1.T @ h1 + e2.T @ h2,
            "head.bias": (e1 + e2).sum(0),
            "two.weight": d2.T @ h1,
            "two.bias": d2.sum(0),
            "one.weight": d1.T @ X,
            "one.bias": d1.sum(0),
        },
    )


class Recurrent(nn.Module):
    """h_t = tanh(U x_t + V h_{t-1}), y_t = W h_t, one layer each, used at every step."""

    def __init__(self):
        super().__init__()
        self.u, self.v, self.w = nn.Linear(5, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

    def forward(self, xs, every):
        h = torch.zeros(xs.shape[1], 6, dtype=xs.dtype)
        ys = []
        for x in xs:
            h = torch.tanh(self.u(x) + self.v(h))
            ys.append(self.w(h))
        return ys if every else ys[-1:]


@WHEN
@pytest.mark.parametrize("every", [True, False], ids=["all steps", "last step"])
def test_a_layer_used_several_times(every, later):
    model = rewire.convert(seeded(Recurrent), "dfa", scale=SCALE)
    xs = randn(3, 6, 5, seed=8)

    def loss_of(ys):
        return sum((k + 1) * F.cross_entropy(y, LABELS) for k, y in enumerate(ys))

    if later:
        for _ in range(2):
            loss_of(model(xs, every)).backward()
        model.zero_grad()
    loss_of(model(xs, every)).backward()
    (U, bu), (W, bw) = [(W.weight.detach(), W.bias.detach()) for W in (model.u, model.w)]
    V = model.v.weight.detach()
    B = rewire.feedback(model)
    h = [torch.zeros(6, 6, dtype=torch.float64)]
    for x in xs:
        h.append(torch.tanh(x @ U.T + bu + h[-1] @ V.T))
    ys = [h_t @ W.T + bw for h_t in h[1:]]
    if every:
        e = [(k + 1) * error(lambda y: F.cross_entropy(y, LABELS), y) for k, y in enumerate(ys)]
    else:
        e = [torch.zeros_like(ys[0])] * 2 + [error(lambda y: F.cross_entropy(y, LABELS), ys[-1])]
    total = dict.fromkeys(("u.weight", "u.bias", "v.weight", "w.weight", "w.bias"), 0.0)
    for t in range(3):
        total["w.weight"] += e[t].T @ h[t + 1]
        total["w.bias"] += e[t].sum(0)
        # h_t goes into w at once and into v at the next step; from there all later errors come straight.
        back = e[t] @ B["w"] + sum(e[t + 1 :], torch.zeros_like(e[0])) @ B["v"]
        delta = back * (1 - h[t + 1] ** 2)
        total["u.weight"] += delta.T @ xs[t]
        total["u.bias"] += delta.sum(0)
        total["v.weight"] += delta.T @ h[t]
    check(model, total)


# -- activation checkpointing ----------------------------------------------------------------------------------


def run_checkpointed(model, x, *, reentrant=False, span="middle"):
    if span == "all":
        return checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
    h = model[:2](x)
    if span == "head":
        return checkpoint(model[2:], h, use_reentrant=reentrant)
    h = checkpoint(model[2:4], h, use_reentrant=reentrant)
    return model[4](h)


@pytest.mark.parametrize("rule", ["dfa", "fa", "brsf", "bp"])  # brsf: no new draw when recomputed
@WHEN
@pytest.mark.parametrize("scale", [SCALE, "auto"])
@pytest.mark.parametrize("span", ["middle", "all", "head"])
def test_checkpointing_changes_nothing(rule, later, scale, span):
    def run(m):
        if span == "middle":
            return run_checkpointed(m, X)
        if span == "all":
            return checkpoint(m, X, use_reentrant=False)
        return checkpoint(m[2:], m[:2](X), use_reentrant=False)

    plain, ours = (ready(rule, later, scale=scale) for _ in range(2))
    for _ in range(3):
        LOSS(plain(X)).backward()
        LOSS(run(ours)).backward()
        check(ours, gradients(plain))
    if rule == "dfa":
        assert rewire.scales(ours) == pytest.approx(rewire.scales(plain), rel=1e-12)
        same(rewire.output_error(ours), rewire.output_error(plain))


@WHEN
def test_checkpointing_against_the_formula(later):
    model = ready("dfa", later)
    LOSS(run_checkpointed(model, X)).backward()
    check(model, expected(model, "dfa", X, error(LOSS, output(model, X))))


def test_checkpointing_of_a_recurrent_backward_twice():
    model = ready("dfa", later=True)
    y = run_checkpointed(model, X)
    LOSS(y).backward(retain_graph=True)
    LOSS(y).backward()
    check(model, expected(model, "dfa", X, 2 * error(LOSS, output(model, X))))


@WHEN
@pytest.mark.parametrize("skip", ["keep", "cut"])
@pytest.mark.parametrize("span", ["middle", "head"])
def test_reentrant_checkpointing_is_refused(later, span, skip):
    model = ready("dfa", later, skip=skip)
    if span == "middle":
        y = run_checkpointed(model, X, reentrant=True)
    else:
        y = checkpoint(model[2:], model[:2](X), use_reentrant=True)
    with pytest.raises(rewire.PassError, match=r"use_reentrant=False.*rewire.restore\(model\)"):
        LOSS(y).backward()
    model.zero_grad()
    LOSS(model(X)).backward()
    check(model, expected(model, "dfa", X, error(LOSS, output(model, X))))


SPANS = pytest.mark.parametrize("span", ["middle", "all", "head"])


@pytest.mark.parametrize("rule", ["fa", "usf", "brsf", "bp"])
@WHEN
@SPANS
def test_reentrant_checkpointing_where_nobody_waits_for_the_error(rule, later, span):
    plain, ours = (ready(rule, later) for _ in range(2))
    for _ in range(3):
        LOSS(plain(X)).backward()
        LOSS(run_checkpointed(ours, X, reentrant=True, span=span)).backward()
        check(ours, gradients(plain))
        same(rewire.output_error(ours), rewire.output_error(plain))
    # What was run again was not taken for an output layer.
    for model in (plain, ours):
        model.zero_grad()
        LOSS(model(X)).backward()
        model.zero_grad()
        with rewire.use_rule(model, "dfa"):
            LOSS(model(X)).backward()
            model.zero_grad()
            LOSS(model(X)).backward()
    check(ours, gradients(plain))
    assert states_of(ours[0])[0].wiring.outputs == states_of(plain[0])[0].wiring.outputs == ["4"]
    assert [states_of(layer)[0].role.name for layer in ours[::2]] == ["HIDDEN", "HIDDEN", "OUTPUT"]


@pytest.mark.parametrize("rule", ["dfa", "fa", "kp"])
@WHEN
@SPANS
def test_reentrant_checkpointing_under_backprop_for_a_while(rule, later, span):
    model = ready(rule, later)
    plain = copy.deepcopy(rewire.restore(copy.deepcopy(model)))
    LOSS(plain(X)).backward()
    model.zero_grad()
    with rewire.use_rule(model, "bp"):
        LOSS(run_checkpointed(model, X, reentrant=True, span=span)).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=0, atol=TOL)


def test_reentrant_checkpointing_below_direct_layers():
    """What is run again is under a local rule; a layer above it, which is not, under a direct one."""
    plain, ours = (converted("fa", layers={"4": "dfa"}) for _ in range(2))
    for _ in range(3):
        LOSS(plain(X)).backward()
        LOSS(run_checkpointed(ours, X, reentrant=True)).backward()
        check(ours, gradients(plain))
    ours = converted("dfa", layers={"0": "fa"})
    with pytest.raises(rewire.PassError, match="layer '2' was run again"):
        LOSS(run_checkpointed(ours, X, reentrant=True)).backward()


@pytest.mark.parametrize("rule", ["kp", "switch(first=bp, then=fa, at=2)"])
@WHEN
def test_reentrant_checkpointing_of_the_output_layer_where_passes_count(rule, later):
    model = ready(rule, later)
    with pytest.raises(rewire.PassError, match=r"hides from rules that count passes .* use_reentrant=False"):
        LOSS(run_checkpointed(model, X, reentrant=True, span="all")).backward()


@WHEN
def test_a_library_that_runs_layers_inside_of_a_backward(later):
    """As attributions do: gradients are those of the model without it."""
    model = ready("fa", later)
    again = []

    def hook(layer, inputs, output):
        def run(delta):
            with torch.enable_grad():
                x = inputs[0].detach().requires_grad_()
                again.append(torch.autograd.grad(layer(x), x, delta)[0])

        if not torch._C._current_graph_task_id() >= 0:
            output.register_hook(run)

    handles = [layer.register_forward_hook(hook) for layer in model[::2]]
    plain = copy.deepcopy(model)
    for layer in plain[::2]:
        layer._forward_hooks.clear()
    for m in (plain, model):
        m.zero_grad()
        LOSS(m(X)).backward()
    check(model, gradients(plain))
    assert len(again) == len(handles) == 3


# -- threads -----------------------------------------------------------------------------------------------------


def in_threads(*jobs):
    failures = []

    def guarded(job):
        try:
            job()
        except BaseException as problem:
            failures.append(problem)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def train(model, x, labels, steps=40):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        with rewire.targets(labels):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("rules", [("dfa", "dfa"), ("dfa", "fa"), ("drtp", "sdfa")])
@pytest.mark.parametrize("scale", [0.1, "auto"])
def test_two_threads_train_two_models(rules, scale):
    data = [(randn(8, 5, seed=i), torch.arange(8).add(i) % 4) for i in (1, 2)]

    def models():
        return [rewire.convert(mlp(seed=i), rule, scale=scale, seed=i) for i, rule in enumerate(rules)]

    one_by_one, together = models(), models()
    for model, (x, labels) in zip(one_by_one, data, strict=True):
        train(model, x, labels)
    in_threads(*[lambda m=m, d=d: train(m, *d) for m, d in zip(together, data, strict=True)])
    for a, b in zip(one_by_one, together, strict=True):
        assert rewire.scales(a) == rewire.scales(b)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            same(p, q)
        assert any((p != q).any() for p, q in zip(a.parameters(), mlp().parameters(), strict=True))


@RULES
def test_two_threads_of_backward_through_one_model(rule):
    model = ready(rule, later=True)
    for _ in range(10):
        model.zero_grad()
        xs = [randn(6, 5, seed=i) for i in range(4)]
        losses = [LOSS(model(x)) for x in xs]
        in_threads(*[loss.backward for loss in losses])
        check(model, add(*(expected(model, rule, x, error(LOSS, output(model, x))) for x in xs)))


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_two_threads_of_backward_with_different_batches(rule):
    """Nothing that one pass looks up may leak into another, wherever Python switches threads."""
    model = ready(rule, later=True)
    sizes = [(2 + i % 3, i) for i in range(12)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(8):
            model.zero_grad()
            batches = [(randn(n, 5, seed=i), cross_entropy(torch.arange(n) % 4)) for n, i in sizes]
            jobs = [loss_of(model(x)).backward for x, loss_of in batches]
            in_threads(*[lambda part=jobs[k::4]: [job() for job in part] for k in range(4)])
            wanted = [expected(model, rule, x, error(loss_of, output(model, x))) for x, loss_of in batches]
            check(model, add(*wanted))
    finally:
        sys.setswitchinterval(interval)


@RULES
@WHEN
def test_forward_here_backward_in_another_thread(rule, later):
    model = ready(rule, later)
    loss = LOSS(model(X))
    in_threads(loss.backward)
    check(model, expected(model, rule, X, error(LOSS, output(model, X))))


# -- what takes part ---------------------------------------------------------------------------------------------


@RULES
@WHEN
def test_a_detach_separates_what_it_separates_for_backprop(rule, later):
    model = ready(rule, later)
    h = model[:2](X).detach()
    LOSS(model[2:](h)).backward()
    e = error(LOSS, output(model, X))
    wanted = rule_gradients(rule, weights(model)[1:], h, e, rewire.feedback(model))
    check(model, {k: v for k, v in wanted.items() if not k.startswith("0.")})


class Skipping(nn.Module):
    """Layers 1 and 2 may be skipped."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 6), nn.Linear(6, 4)
        self.l1, self.l2 = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, keep):
        h = torch.tanh(self.inp(x))
        for name in keep:
            h = torch.tanh(getattr(self, name)(h))
        return self.out(h)


def skipping_layers(model, keep):
    named = {name: (name, W, b) for name, W, b in weights(model)}
    return [named[n] for n in ("inp", *keep, "out")]


@RULES
def test_layers_that_do_not_run_in_every_pass(rule):
    model = rewire.convert(seeded(Skipping), rule, scale=SCALE)
    for keep in (("l2",), ("l1", "l2"), (), ("l1",), ("l2",), ("l2", "l1"), ("l1", "l2", "l1")):
        model.zero_grad()
        LOSS(model(X, keep)).backward()
        layers = skipping_layers(model, keep)
        e = error(LOSS, states(layers, X)[-1])
        if len(set(keep)) == len(keep):
            check(model, rule_gradients(rule, layers, X, e, rewire.feedback(model)))


def test_a_layer_skipped_in_the_first_pass_is_measured_when_it_first_runs():
    model = rewire.convert(seeded(Skipping), "dfa")
    LOSS(model(X, ("l2",))).backward()
    model.zero_grad()
    LOSS(model(X, ("l1", "l2"))).backward()
    assert rewire.scales(model).keys() >= {"l2", "out"}
    # l1 is measured: it hands back its exact gradient; the others use their feedback.
    layers = skipping_layers(model, ("l1", "l2"))
    e = error(LOSS, states(layers, X)[-1])
    B = rewire.feedback(model)
    W1 = model.l1.weight.detach()
    found = rule_gradients("dfa", layers, X, e, {**B, "l1": torch.zeros(4, 6, dtype=torch.float64)})
    h1, h2 = states(layers, X)[1:3]
    found_inp = ((e @ B["l2"]) * (1 - h2**2) @ W1) * (1 - h1**2)
    found["inp.weight"], found["inp.bias"] = found_inp.T @ X, found_inp.sum(0)
    check(model, found)
    model.zero_grad()
    LOSS(model(X, ("l1", "l2"))).backward()
    assert rewire.scales(model).keys() >= {"l1", "l2", "out"}
    check(model, rule_gradients("dfa", layers, X, e, rewire.feedback(model)))


@RULES
@WHEN
@pytest.mark.parametrize("frozen", [("4",), ("2",), ("0",), ("2", "4"), ("0", "2")], ids=str)
def test_frozen_layers(rule, later, frozen):
    model = ready(rule, later)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    LOSS(model(X)).backward()
    wanted = expected(model, rule, X, error(LOSS, output(model, X)))
    check(model, {k: v for k, v in wanted.items() if k[0] not in frozen})


@RULES
@WHEN
def test_only_biases_train(rule, later):
    model = ready(rule, later)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    LOSS(model(X)).backward()
    wanted = expected(model, rule, X, error(LOSS, output(model, X)))
    check(model, {k: v for k, v in wanted.items() if k.endswith("bias")})


@RULES
@WHEN
def test_everything_frozen_but_the_input(rule, later):
    model = ready(rule, later).requires_grad_(False)
    x = X.clone().requires_grad_()
    LOSS(model(x)).backward()
    same(x.grad, expected(model, rule, X, error(LOSS, output(model, X)))["x"])


@RULES
@WHEN
def test_an_input_that_requires_grad(rule, later):
    model = ready(rule, later)
    x = X.clone().requires_grad_()
    LOSS(model(x)).backward()
    wanted = expected(model, rule, X, error(LOSS, output(model, X)))
    check(model, wanted)
    same(x.grad, wanted["x"])


def test_nothing_requires_grad():
    model = ready("dfa", later=True).requires_grad_(False)
    assert not model(X).requires_grad


@RULES
@WHEN
@pytest.mark.parametrize("lead", [(6,), (6, 3), (6, 3, 2)], ids=["rows", "tokens", "grid"])
def test_an_in_place_activation_on_a_layers_output(rule, later, lead):
    """For more than two dimensions PyTorch's linear returns a view; what the layer left on its graph must survive."""

    def make():
        return nn.Sequential(
            nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)
        )

    x = randn(*lead, 5, seed=7)
    model = rewire.convert(seeded(make), rule, scale=SCALE)

    def loss_of(y):
        return y.exp().sum()

    if later:
        settled(model, x, loss_of)
    loss_of(model(x)).backward()
    (W1, b1), (W2, b2), (W3, b3) = [(W, b) for _, W, b in weights(model)]
    B = rewire.feedback(model)
    rows = x.reshape(-1, 5)
    h1 = torch.relu(rows @ W1.T + b1)
    h2 = torch.relu(h1 @ W2.T + b2)
    e = (h2 @ W3.T + b3).exp()
    d2 = (e @ (W3 if rule == "bp" else B["4"])) * (h2 > 0)
    d1 = {"bp": lambda: d2 @ W2, "fa": lambda: d2 @ B["2"], "dfa": lambda: e @ B["2"]}[rule]() * (h1 > 0)
    deltas = {"4": (e, h2), "2": (d2, h1), "0": (d1, rows)}
    check(
        model,
        {f"{n}.weight": d.T @ h for n, (d, h) in deltas.items()}
        | {f"{n}.bias": d.sum(0) for n, (d, _) in deltas.items()},
    )


# -- use_rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dfa", "fa", "shallow", "drtp"])
@pytest.mark.parametrize("where", ["inside", "outside"])
@WHEN
def test_use_rule_bp_is_backprop(rule, where, later):
    plain, model = mlp(), converted(rule)
    if later:
        settled(model, X, LOSS)
    with rewire.use_rule(model, "bp") as same_model:
        assert same_model is model
        loss = LOSS(model(X))
        if where == "inside":
            loss.backward()
    if where == "outside":
        loss.backward()
    LOSS(plain(X)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("other", ["fa", "dfa", "bp"])
@RULES
def test_the_rule_of_the_forward_counts(rule, other):
    model = ready(rule, later=True)
    with rewire.use_rule(model, other):
        inside = LOSS(model(X))
        feedback_inside = rewire.feedback(model)
    outside = LOSS(model(X))
    with rewire.use_rule(model, "bp"):
        outside.backward()
    e = error(LOSS, output(model, X))
    check(model, expected(model, rule, X, e))
    model.zero_grad()
    inside.backward()
    if other == "dfa":
        with rewire.use_rule(model, "dfa"):
            feedback_inside = rewire.feedback(model)
    check(model, rule_gradients(other, weights(model), X, e, feedback_inside))


def test_use_rule_nests_and_survives_exceptions():
    model = ready("dfa", later=True)
    with contextlib.suppress(ZeroDivisionError), rewire.use_rule(model, "fa"):
        with rewire.use_rule(model, "bp"):
            pass
        assert {row.rule for row in rewire.summary(model).rows} == {"fa"}
        raise ZeroDivisionError
    assert {row.rule for row in rewire.summary(model).rows} == {"dfa"}
    with pytest.raises(rewire.ConversionError, match="did you mean 'dfa'"), rewire.use_rule(model, "dfaa"):
        raise AssertionError("not reached")


def test_use_rule_bp_does_not_end_the_measuring():
    model = converted("dfa", scale="auto")
    with rewire.use_rule(model, "bp"):
        LOSS(model(X)).backward()
    model.zero_grad()
    LOSS(model(X)).backward()
    check(model, expected(model, "bp", X, error(LOSS, output(model, X))))
    model.zero_grad()
    LOSS(model(X)).backward()
    assert rewire.scales(model).keys() == {"2", "4"}
    check(model, expected(model, "dfa", X, error(LOSS, output(model, X))))


def test_use_rule_shallow():
    model = ready("dfa", later=True)
    with rewire.use_rule(model, "shallow"):
        loss = LOSS(model(X))
    loss.backward()
    e = error(LOSS, output(model, X))
    check(model, {"4.weight": e.T @ states(weights(model), X)[2], "4.bias": e.sum(0)})


# -- the output error ---------------------------------------------------------------------------------------------


@RULES
def test_output_error_is_the_gradient_at_the_output(rule):
    plain, model = mlp(), converted(rule)
    assert rewire.output_error(model) is None
    for i in range(3):
        x = randn(3 + i, 5, seed=i)

        def loss_of(y, i=i):
            return F.cross_entropy(y, torch.arange(3 + i) % 4) + y.pow(3).mean()

        loss = loss_of(model(x))
        assert rewire.output_error(model) is None, "the newest pass has no backward yet"
        loss.backward()
        y = plain(x)
        (e,) = torch.autograd.grad(loss_of(y), y)
        found = rewire.output_error(model)
        same(found, e)
        assert found.dtype == torch.float64 and not found.requires_grad
    with torch.no_grad():
        model(X)
    same(rewire.output_error(model), e, "evaluation is no pass")


def test_output_error_of_an_unconverted_model():
    with pytest.raises(rewire.ConversionError, match="not converted"):
        rewire.output_error(mlp())


def test_output_error_of_the_newest_backward():
    model = ready("dfa", later=True)
    first, second = LOSS(model(X)), (10 * model(X)).sum()
    second.backward()
    same(rewire.output_error(model), torch.full((6, 4), 10.0, dtype=torch.float64))
    first.backward()
    same(rewire.output_error(model), error(LOSS, output(model, X)))


# -- skip connections and blocks ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """h <- h + tanh(W h), twice."""

    def __init__(self):
        super().__init__()
        self.inp, self.r1, self.r2, self.out = (nn.Linear(a, b) for a, b in ((5, 6), (6, 6), (6, 6), (6, 4)))

    def forward(self, x):
        h = torch.tanh(self.inp(x))
        h = h + torch.tanh(self.r1(h))
        h = h + torch.tanh(self.r2(h))
        return self.out(h)


def residual_gradients(model, rule, skip, B):
    W = {name: (W, b) for name, W, b in weights(model)}
    h = [torch.tanh(X @ W["inp"][0].T + W["inp"][1])]
    t = {}
    for name in ("r1", "r2"):
        t[name] = torch.tanh(h[-1] @ W[name][0].T + W[name][1])
        h.append(h[-1] + t[name])
    e = error(LOSS, h[-1] @ W["out"][0].T + W["out"][1])
    found = {"out.weight": e.T @ h[-1], "out.bias": e.sum(0)}
    g = e @ B["out"]
    for i, name in ((1, "r2"), (0, "r1")):
        delta = g * (1 - t[name] ** 2)
        found[f"{name}.weight"], found[f"{name}.bias"] = delta.T @ h[i], delta.sum(0)
        fed = e @ B[name] if rule == "dfa" else delta @ B[name]
        g = fed if skip == "cut" else fed + g
    delta = g * (1 - h[0] ** 2)
    found["inp.weight"], found["inp.bias"] = delta.T @ X, delta.sum(0)
    return found


@WHEN
@pytest.mark.parametrize(("rule", "skip"), [("dfa", "keep"), ("dfa", "cut"), ("fa", "keep")])
def test_skip_connections(rule, skip, later):
    model = rewire.convert(seeded(Residual), rule, skip=skip, scale=SCALE)
    if later:
        settled(model, X, LOSS)
    LOSS(model(X)).backward()
    check(model, residual_gradients(model, rule, skip, rewire.feedback(model)))


@pytest.mark.parametrize("skip", ["keep", "cut"])
def test_skip_connections_after_measuring(skip):
    model = rewire.convert(seeded(Residual), "dfa", skip=skip)
    LOSS(model(X)).backward()
    check(model, residual_gradients(model, "fa", "keep", {n: W for n, W, _ in weights(model)}))
    model.zero_grad()
    LOSS(model(X)).backward()
    check(model, residual_gradients(model, "dfa", skip, rewire.feedback(model)))


@pytest.mark.parametrize("skip", ["keep", "cut"])
def test_skip_connections_in_a_second_backward(skip):
    model = rewire.convert(seeded(Residual), "dfa", skip=skip, scale=SCALE)
    loss = LOSS(model(X))
    loss.backward(retain_graph=True)
    loss.backward()
    check(model, {n: 2 * g for n, g in residual_gradients(model, "dfa", skip, rewire.feedback(model)).items()})


def test_cut_with_two_layers_on_one_tensor():
    """q and k share their input: the wall lets the sum of both feedbacks through, and nothing else."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.q, self.k, self.out = (nn.Linear(a, b) for a, b in ((5, 6), (6, 6), (6, 6), (6, 4)))

        def forward(self, x):
            h = torch.tanh(self.inp(x))
            return self.out(h * torch.tanh(self.q(h)) + torch.tanh(self.k(h)))

    model = rewire.convert(seeded(Pair), "dfa", skip="cut", scale=SCALE)
    for _ in range(2):
        model.zero_grad()
        LOSS(model(X)).backward()
        W = {name: (W, b) for name, W, b in weights(model)}
        B = rewire.feedback(model)
        h = torch.tanh(X @ W["inp"][0].T + W["inp"][1])
        q, k = (torch.tanh(h @ W[n][0].T + W[n][1]) for n in "qk")
        m = h * q + k
        e = error(LOSS, m @ W["out"][0].T + W["out"][1])
        g = e @ B["out"]
        dq, dk = g * h * (1 - q**2), g * (1 - k**2)
        d = (e @ B["q"] + e @ B["k"]) * (1 - h**2)
        wanted = {"out": (e, m), "q": (dq, h), "k": (dk, h), "inp": (d, X)}
        check(
            model,
            {f"{n}.weight": d.T @ x for n, (d, x) in wanted.items()}
            | {f"{n}.bias": d.sum(0) for n, (d, _) in wanted.items()},
        )


class Unit(nn.Module):
    """x + W2 tanh(W1 x)"""

    def __init__(self, width):
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, 7), nn.Linear(7, width)

    def forward(self, x):
        return x + self.w2(torch.tanh(self.w1(x)))


class Units(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.u1, self.u2, self.out = nn.Linear(5, 6), Unit(6), Unit(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.u2(self.u1(torch.tanh(self.inp(x)))))


@WHEN
@pytest.mark.parametrize("blocks", [Unit, "u?", ["u1", "u2"], [Unit, "u1"]], ids=str)
@pytest.mark.parametrize("skip", ["keep", "cut"])
def test_blocks_are_exact_inside_and_fed_back_at_their_input(blocks, later, skip):
    model = rewire.convert(seeded(Units), "dfa", blocks=blocks, scale=SCALE, skip=skip)
    if later:
        settled(model, X, LOSS)
    LOSS(model(X)).backward()
    B = rewire.feedback(model)
    assert B.keys() == {"u1", "u2", "out"}
    W = {name: (W, b) for name, W, b in weights(model)}
    h = [torch.tanh(X @ W["inp"][0].T + W["inp"][1])]
    t = {}
    for u in ("u1", "u2"):
        t[u] = torch.tanh(h[-1] @ W[f"{u}.w1"][0].T + W[f"{u}.w1"][1])
        h.append(h[-1] + t[u] @ W[f"{u}.w2"][0].T + W[f"{u}.w2"][1])
    e = error(LOSS, h[-1] @ W["out"][0].T + W["out"][1])
    deltas = {"out": (e, h[2])}
    for i, u, above in ((1, "u2", "out"), (0, "u1", "u2")):
        g = e @ B[above]
        deltas[f"{u}.w2"] = (g, t[u])
        deltas[f"{u}.w1"] = ((g @ W[f"{u}.w2"][0]) * (1 - t[u] ** 2), h[i])
    deltas["inp"] = ((e @ B["u1"]) * (1 - h[0] ** 2), X)
    check(
        model,
        {f"{n}.weight": d.T @ x for n, (d, x) in deltas.items()}
        | {f"{n}.bias": d.sum(0) for n, (d, _) in deltas.items()},
    )


class Gate(nn.Module):
    """Several inputs, one by keyword, one that is no tensor; several outputs in a structure."""

    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, ab, *, gate, factor, index):
        a, b = ab
        u = torch.tanh(self.p(a)) * gate
        return {"u": u, "v": (factor * self.q(b), index + 1)}


class GatedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 6)
        self.gate, self.out = Gate(), nn.Linear(6, 4)

    def forward(self, x):
        a, b, c = (torch.tanh(layer(x)) for layer in (self.a, self.b, self.c))
        found = self.gate((a, b), gate=c, factor=1.5, index=torch.tensor(3))
        assert found["v"][1] == 4
        return self.out(found["u"] + found["v"][0] ** 2)


@WHEN
def test_a_block_with_structured_inputs_and_outputs(later):
    model = rewire.convert(seeded(GatedNet), "dfa", blocks=["gate"], scale=SCALE)
    if later:
        settled(model, X, LOSS)
    LOSS(model(X)).backward()
    W = {name: (W, b) for name, W, b in weights(model)}
    B = rewire.feedback(model)
    assert B.keys() == {"gate", "gate#1", "gate#2", "out"}
    assert not any(torch.isclose(B["gate"], B[f"gate#{i}"]).any() for i in (1, 2)), "each input has its own"
    a, b, c = (torch.tanh(X @ W[n][0].T + W[n][1]) for n in "abc")
    p = torch.tanh(a @ W["gate.p"][0].T + W["gate.p"][1])
    v = 1.5 * (b @ W["gate.q"][0].T + W["gate.q"][1])
    m = p * c + v**2
    e = error(LOSS, m @ W["out"][0].T + W["out"][1])
    g = e @ B["out"]
    deltas = {
        "out": (e, m),
        "gate.p": (g * c * (1 - p**2), a),
        "gate.q": (g * 2 * v * 1.5, b),
        "a": ((e @ B["gate"]) * (1 - a**2), X),
        "b": ((e @ B["gate#1"]) * (1 - b**2), X),
        "c": ((e @ B["gate#2"]) * (1 - c**2), X),
    }
    check(
        model,
        {f"{n}.weight": d.T @ x for n, (d, x) in deltas.items()}
        | {f"{n}.bias": d.sum(0) for n, (d, _) in deltas.items()},
    )


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Linear(6, 4)

    def forward(self, given):
        return {"y": self.p(given["a"] * given["b"][0])}


class ProductNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(5, 6), Product()

    def forward(self, x):
        a = torch.tanh(self.a(torch.tanh(self.low(x))))
        return self.head({"a": a, "b": (torch.tanh(self.b(x)), None)})["y"]


@WHEN
@pytest.mark.parametrize("head", ["dfa", "bp"])
@pytest.mark.parametrize("first", ["dfa", "bp"], ids=["", "first passes under bp"])
def test_an_output_block_with_structured_inputs(head, first, later):
    model = rewire.convert(seeded(ProductNet), "dfa", blocks=["head"], layers={"head": head}, scale=SCALE)
    if later:
        with rewire.use_rule(model, "bp") if first == "bp" else contextlib.nullcontext():
            settled(model, X, LOSS)
    LOSS(model(X)).backward()
    W = {name: (W, b) for name, W, b in weights(model)}
    B = rewire.feedback(model)
    low = torch.tanh(X @ W["low"][0].T + W["low"][1])
    a = torch.tanh(low @ W["a"][0].T + W["a"][1])
    b = torch.tanh(X @ W["b"][0].T + W["b"][1])
    e = error(LOSS, (a * b) @ W["head.p"][0].T + W["head.p"][1])
    exact = e @ W["head.p"][0]
    at_a, at_b = (exact * b, exact * a) if head == "bp" else (e @ B["head"], e @ B["head#1"])
    deltas = {
        "head.p": (e, a * b),
        "a": (at_a * (1 - a**2), low),
        "b": (at_b * (1 - b**2), X),
        "low": ((e @ B["a"]) * (1 - low**2), X),
    }
    check(
        model,
        {f"{n}.weight": d.T @ h for n, (d, h) in deltas.items()}
        | {f"{n}.bias": d.sum(0) for n, (d, _) in deltas.items()},
    )


# -- surrogate derivatives --------------------------------------------------------------------------------------------


def bump(a):
    return 1 / (1 + a.abs()) ** 2


@WHEN
@RULES
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.Hardtanh(), nn.Sigmoid()], ids=str)
def test_surrogate_derivative(activation, rule, later):
    def make():
        return nn.Sequential(nn.Linear(5, 7), activation, nn.Linear(7, 6), copy.deepcopy(activation), nn.Linear(6, 4))

    plain = seeded(make)
    model = rewire.convert(copy.deepcopy(plain), rule, scale=SCALE, derivative={type(activation): bump})
    if later:
        settled(model, X, LOSS)
    y = model(X)
    assert torch.equal(y, plain(X))
    LOSS(y).backward()
    f = {nn.ReLU: torch.relu, nn.Hardtanh: F.hardtanh, nn.Sigmoid: torch.sigmoid}[type(activation)]
    (W1, b1), (W2, b2), (W3, b3) = [(W, b) for _, W, b in weights(model)]
    B = rewire.feedback(model)
    a1 = X @ W1.T + b1
    h1 = f(a1)
    a2 = h1 @ W2.T + b2
    h2 = f(a2)
    e = error(LOSS, h2 @ W3.T + b3)
    back3 = {"dfa": lambda: e @ B["4"], "fa": lambda: e @ B["4"], "bp": lambda: e @ W3}[rule]()
    d2 = back3 * bump(a2)
    back2 = {"dfa": lambda: e @ B["2"], "fa": lambda: d2 @ B["2"], "bp": lambda: d2 @ W2}[rule]()
    d1 = back2 * bump(a1)
    deltas = {"4": (e, h2), "2": (d2, h1), "0": (d1, X)}
    check(
        model,
        {f"{n}.weight": d.T @ x for n, (d, x) in deltas.items()}
        | {f"{n}.bias": d.sum(0) for n, (d, _) in deltas.items()},
    )


def test_surrogate_derivative_only_where_asked_and_gone_after_restore():
    def make():
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))

    plain, model = seeded(make), seeded(make)
    rewire.convert(model, "bp", derivative={nn.ReLU: torch.ones_like})
    LOSS(model(X)).backward()
    (W1, b1), (W2, b2), (W3, b3) = [(W, b) for _, W, b in weights(model)]
    h1 = torch.relu(X @ W1.T + b1)
    h2 = torch.tanh(h1 @ W2.T + b2)
    e = error(LOSS, h2 @ W3.T + b3)
    d2 = (e @ W3) * (1 - h2**2)
    same(model[0].weight.grad, (d2 @ W2).T @ X)
    rewire.restore(model)
    model.zero_grad()
    LOSS(model(X)).backward()
    LOSS(plain(X)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Above(nn.Module):
    def forward(self, a, threshold=0.0):
        return (a > threshold).to(a.dtype)


class Thresholds(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.first, self.above, self.last = nn.Linear(5, 7), Above(), nn.Linear(7, 4)
        self.args, self.kwargs = args, kwargs

    def forward(self, x):
        a = self.first(x)
        return self.last(self.above(*(a if isinstance(b, str) else b for b in self.args), **self.kwargs))


@pytest.mark.parametrize(("args", "kwargs"), [(("a", 0.1), {}), (("a",), {"threshold": 0.1}), ((), {}), ((0.1,), {})])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_surrogate_derivative_is_of_one_tensor(args, kwargs, gradients):
    module = Thresholds(*args, **kwargs).double()
    rewire.convert(module, "dfa", scale=SCALE, derivative={Above: torch.ones_like})
    says = rf"derivative= is for activations of one tensor.*'above' \(Above\).* {len(args) + len(kwargs)} arguments"
    with torch.set_grad_enabled(gradients), pytest.raises(rewire.PassError, match=says):
        module(X)


def test_a_surrogate_derivative_of_an_input_given_by_name():
    class Named(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](input=self[0](x)))

    found = []
    for kind in (nn.Sequential, Named):
        torch.manual_seed(0)
        model = kind(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
        rewire.convert(model, "fa", scale=SCALE, derivative={nn.Tanh: torch.ones_like})
        LOSS(model(X)).backward()
        found.append(model[0].weight.grad)
    assert torch.equal(*found)


def test_the_tolerance_of_these_tests_is_tight():
    assert TOL <= 1e-10
    model = ready("dfa", later=True)
    LOSS(model(X)).backward()
    wanted = expected(model, "dfa", X, error(LOSS, output(model, X)))
    for name in wanted:
        if name != "x":
            with pytest.raises(AssertionError, match="off by"):
                check(model, {**wanted, name: wanted[name] * (1 + 1e-6)})


def test_an_output_that_goes_in_once_more():
    """A cycle loss: e is the gradient at the first call's output, under a local rule too."""
    model = converted("fa", widths=(6, 7, 6))
    x = randn(4, 6)
    for _ in range(3):
        a = model(x)
        a.retain_grad()
        b = model(a).detach()
        (a - b).pow(2).sum().backward()
        same(rewire.output_error(model), a.grad)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_compiled_autograd(rule):
    """Its backward runs no graph nodes, of which hooks could ask where they are."""
    from torch._dynamo import compiled_autograd

    model = ready(rule, later=True)
    LOSS(model(X)).backward()
    wanted, e = gradients(model), rewire.output_error(model)
    model.zero_grad()
    loss = LOSS(model(X))
    saying = (
        pytest.warns(rewire.RewireWarning, match="compiled autograd") if rule == "dfa" else contextlib.nullcontext()
    )
    with compiled_autograd._enable(lambda graph: graph), saying:
        loss.backward()
    check(model, wanted)
    same(rewire.output_error(model), e)


def test_a_nested_tensor_is_refused():
    model = rewire.convert(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), "dfa", scale=SCALE)
    ragged = torch.nested.nested_tensor([torch.randn(k, 6) for k in (2, 3)], layout=torch.jagged)
    with pytest.raises(rewire.PassError, match="layer '0': its input is a nested tensor"):
        model(ragged)


@pytest.mark.parametrize("where", ["layer_feedback.B_of", "handback.find"])
def test_a_scale_taken_in_while_another_thread_makes_feedback(monkeypatch, where):
    """What was made of the scale before does not outlive it."""
    from rewire import handback, layer_feedback, scale

    module, name = where.split(".")
    there = {"handback": handback, "layer_feedback": layer_feedback}[module]
    plain = getattr(there, name)
    old = SCALE
    model = ready("dfa", later=True)
    before = rewire.feedback(model)["2"]
    state = states_of(model[2])[0]
    state.forget_routes()

    def meanwhile(state, *key):
        made = plain(state, *key)
        if state.scale == old:
            scale.set_scale(state, old / 8, "measured")
        return made

    monkeypatch.setattr(there, name, meanwhile)
    LOSS(model(X)).backward()
    model.zero_grad()
    LOSS(model(X)).backward()
    assert torch.allclose(rewire.feedback(model)["2"], before / 8)
    check(model, expected(model, "dfa", X, error(LOSS, output(model, X))))
