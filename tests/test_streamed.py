"""``backward_streamed``: the gradients of an ordinary ``skip="cut"`` backward, without its memory."""

from __future__ import annotations

import copy
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import rewire
from rewire.streaming import streaming
from tests.leftovers import left_by
from tests.plain import SCALE, chain, cross_entropy, error, mlp, randn, rule_gradients, same, seeded, settled, weights

N, CLASSES = 6, 4
LABELS = torch.tensor([0, 3, 1, 2, 2, 1])
TOL = 1e-10
loss_of = cross_entropy(LABELS)
images = randn(N, 3, 16, 16, seed=3)
tokens = randn(N, 5, 8, seed=4)


# -- models --------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


def resnet():
    stem = (nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    blocks = (BasicBlock(6, 6, 1), BasicBlock(6, 8, 2), BasicBlock(8, 8, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = (layer(x).view(n, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.dropout((q @ k.transpose(-1, -2) / 2).softmax(-1), 0.2, self.training) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))


class TransformerBlock(nn.Module):
    def __init__(self, width, pre_norm):
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))
        self.pre_norm = pre_norm

    def forward(self, h):
        if self.pre_norm:
            h = h + self.attention(self.norm1(h))
            return h + self.mlp(self.norm2(h))
        h = self.norm1(h + self.attention(h))
        return self.norm2(h + self.mlp(h))


class Transformer(nn.Module):
    def __init__(self, pre_norm, depth=3, width=8):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, pre_norm) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        h = self.embed(x) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class UsedBefore(nn.Module):
    """Something uses a tensor before a layer is fed with it, and again afterwards."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.layer = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        before = self.norm(h).square()  # saves h
        mixed = self.layer(h) * before + h
        return self.head(torch.tanh(self.second(torch.tanh(mixed)) + h))


class Views(nn.Module):
    """Layers fed with views, which cannot be detached in place; one of them goes on past its layer."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.up = nn.Linear(8, 8), nn.Linear(4, 4), nn.Linear(4, 4)
        self.down, self.head = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        a, b = torch.tanh(self.first(x)).chunk(2, -1)
        h = F.silu(self.gate(a)) * self.up(b) + a + b
        return self.head(torch.tanh(self.down(h)).view(len(x), 2, 4).transpose(1, 2).reshape(len(x), 8))


class TwoInputs(nn.Module):
    """A unit fed with two tensors, one of them twice."""

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, *, other, again):
            return torch.tanh(self.a(x)) * torch.sigmoid(self.b(other)) + again, x

    def __init__(self):
        super().__init__()
        self.left, self.right, self.mix = nn.Linear(8, 8), nn.Linear(8, 8), self.Mix()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        a, b = torch.tanh(self.left(x)), torch.tanh(self.right(x))
        y, same_x = self.mix(a, other=b, again=a)
        return self.head(torch.tanh(y + same_x) + a)


class Heads(nn.Module):
    """Two outputs in the middle of and behind one trunk."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.side, self.head = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        side = F.log_softmax(self.side(h), -1)
        return {"side": side, "main": self.head(torch.tanh(self.c(h)))}


class Row(nn.Module):
    """An output that another one is made of."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, x):
        side = self.b(torch.tanh(self.a(x)))
        return {"side": F.log_softmax(side, -1), "main": self.head(torch.tanh(side))}


class FedOn(Row):
    """An output that another layer is fed with; on tokens, where linear layers return views."""

    def forward(self, x):
        side = self.b(torch.tanh(self.a(x)))
        return {"main": self.head(side).mean(1), "side": F.log_softmax(side, -1).mean(1)}


class Tied(nn.Module):
    """One layer that runs three times, and an output weight that is also an embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(CLASSES, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        for _ in range(3):
            h = torch.tanh(self.layer(h))
        return self.head(h)


class Sometimes(nn.Module):
    """Layers that are skipped at random, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.never, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            draws = torch.rand(()).item(), random.random(), np.random.rand()
            if i == 0 or not self.training or sum(draws) < 1.5:
                x = torch.tanh(layer(x))
        return self.head(x)


class LossInside(nn.Module):
    """As transformers models do: the loss is part of the outputs, and parameters come after the output layer."""

    def __init__(self):
        super().__init__()
        self.body, self.temperature = seeded(chain, 8, 8, 8, CLASSES), nn.Parameter(torch.ones(()))

    def forward(self, x, labels):
        logits = F.dropout(self.body(x) * self.temperature, 0.2, self.training)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def dropped():
    layers = (nn.Linear(8, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU())
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(9, 9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES))


def frozen():
    model = dropped()
    model[3].requires_grad_(False)
    return model


def frozen_head():
    model = dropped()
    model[-1].requires_grad_(False)
    return model


x8 = randn(N, 8, seed=5)
both = lambda out: F.nll_loss(out["side"], LABELS) + 2 * loss_of(out["main"])  # noqa: E731

# name: (model, inputs, loss, conversion)
CASES = {
    "chain": (lambda: chain(8, 9, 9, 9, CLASSES), x8, loss_of, {}),
    "dropout and batch norm": (dropped, x8, loss_of, {}),
    "frozen layer": (frozen, x8, loss_of, {}),
    "frozen head": (frozen_head, x8, loss_of, {}),
    "input requires grad": (dropped, x8.clone().requires_grad_(), loss_of, {}),
    "resnet": (resnet, images, loss_of, {}),
    "resnet, channel": (resnet, images, loss_of, {"feedback": "channel"}),
    "resnet, blocks": (resnet, images, loss_of, {"blocks": [BasicBlock]}),
    "pre-norm": (lambda: Transformer(True), tokens, loss_of, {}),
    "pre-norm, blocks": (lambda: Transformer(True), tokens, loss_of, {"blocks": ["blocks.*"]}),
    "post-norm": (lambda: Transformer(False), tokens, loss_of, {}),
    "post-norm, blocks": (lambda: Transformer(False), tokens, loss_of, {"blocks": ["blocks.*"]}),
    "bp in between": (lambda: Transformer(False), tokens, loss_of, {"layers": {"blocks.1.*": "bp"}}),
    "fa in between": (lambda: Transformer(False), tokens, loss_of, {"layers": {"*.mlp.*": "fa"}}),
    "brsf in between": (dropped, x8, loss_of, {"layers": {"3": "brsf"}}),
    "bp head": (dropped, x8, loss_of, {"layers": {"9": "bp"}}),
    "fa head": (dropped, x8, loss_of, {"layers": {"9": "fa"}}),
    "sdfa": (dropped, x8, loss_of, {"rule": "sdfa"}),
    "drtp": (dropped, x8, loss_of, {"rule": "drtp"}),
    "shallow": (dropped, x8, loss_of, {"rule": "shallow"}),
    "used before": (UsedBefore, x8, loss_of, {}),
    "views": (Views, x8, loss_of, {}),
    "two inputs": (TwoInputs, x8, loss_of, {"blocks": ["mix"]}),
    "heads": (Heads, x8, both, {}),
    "one head": (Heads, x8, lambda out: loss_of(out["main"]), {}),
    "outputs in a row": (Row, x8, both, {"output": ["b", "head"], "scale": SCALE}),
    "lower output alone": (Row, x8, lambda out: both(out | {"main": out["main"].detach()}), {"output": ["b", "head"]}),
    "output fed on": (FedOn, tokens, both, {"output": ["b", "head"], "scale": SCALE}),
    "tied": (Tied, LABELS, loss_of, {}),
    "sometimes": (Sometimes, x8, loss_of, {}),
    "loss inside": (LossInside, {"x": x8, "labels": LABELS}, lambda out: out["loss"], {}),
    "regularised": (dropped, x8, None, {}),
}


def call(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def two(name, scale="auto"):
    """A converted, settled model twice, its inputs and its loss as a function of (model) -> (outputs -> loss)."""
    make, inputs, loss_fn, options = CASES[name]
    model = rewire.convert(seeded(make), **{"rule": "dfa", "skip": "cut", "scale": scale, **options})

    def of(model):
        if loss_fn is not None:
            return loss_fn
        return lambda out: loss_of(out) + sum(p.square().sum() for p in model.parameters())

    reseed(7)
    model.eval()  # in "sometimes" every layer runs
    for _ in range(3):
        of(model)(call(model, inputs)).backward()
    model.train().zero_grad()
    if isinstance(inputs, torch.Tensor):
        inputs.grad = None
    return model, copy.deepcopy(model), inputs, of


def reseed(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]


def agree(ours, theirs, tol=TOL):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if p.grad is None or q.grad is None:
            assert all(g is None or not g.any() for g in (p.grad, q.grad)), name
        else:
            same(p.grad, q.grad, name, tol)


def side_by_side(ordinary, passes=3):
    """Passes of ``ordinary`` and streamed ones of a copy lead to the same."""
    streamed = copy.deepcopy(ordinary)
    for _ in range(passes):
        loss_of(ordinary(x8)).backward()
        rewire.backward_streamed(streamed, x8, loss_of)
    agree(streamed, ordinary)


@pytest.fixture
def plans(monkeypatch):
    """The plan of every second forward, so that nothing passes by falling back to an ordinary backward."""
    found = []
    second = rewire.stream._second
    monkeypatch.setattr(
        rewire.stream, "_second", lambda wiring, plan, *rest: (found.append(plan), second(wiring, plan, *rest))[1]
    )
    return found


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_an_ordinary_backward(name, plans):
    ordinary, streamed, inputs, of = two(name)
    for turn in range(3):  # gradients accumulate
        reseed(turn)
        loss = of(ordinary)(call(ordinary, inputs))
        loss.backward()
        after = random_states()
        if isinstance(inputs, torch.Tensor) and inputs.requires_grad:
            at_input, inputs.grad = inputs.grad, None
        reseed(turn)
        found, _ = rewire.backward_streamed(streamed, inputs, of(streamed))
        assert not found.requires_grad
        same(found, loss)
        assert random_states() == after
        agree(streamed, ordinary)
        if isinstance(inputs, torch.Tensor) and inputs.requires_grad:
            same(inputs.grad, at_input)
            inputs.grad = None
    for (key, a), b in zip(streamed.named_buffers(), ordinary.buffers(), strict=True):
        assert torch.equal(a, b), key
    assert len(plans) == 3
    mine, other = rewire.output_error(streamed), rewire.output_error(ordinary)
    for e, f in zip(*([v.values() if isinstance(v, dict) else [v] for v in (mine, other)]), strict=True):
        same(e, f)


def test_chain_against_equations(plans):
    """Against the equations of a tanh MLP, written out, without any autograd."""
    model = rewire.convert(mlp(), "dfa", skip="cut", scale=SCALE)
    x = randn(N, 5)
    rewire.backward_streamed(model, x, loss_of)  # finds the output layer
    model.zero_grad()
    _, y = rewire.backward_streamed(model, x, loss_of)
    assert len(plans) == 1
    e = error(loss_of, y)
    expected = rule_gradients("dfa", weights(model), x, e, rewire.feedback(model))
    for name, p in model.named_parameters():
        same(p.grad, expected[name], name)
    same(rewire.output_error(model), e)


def test_the_first_passes_are_ordinary(plans):
    ordinary = rewire.convert(mlp(), "dfa", skip="cut")
    streamed = copy.deepcopy(ordinary)
    for turn in range(3):
        x = randn(N, 5, seed=turn)
        loss_of(ordinary(x)).backward()
        rewire.backward_streamed(streamed, x, loss_of)
        agree(streamed, ordinary)
        assert rewire.scales(streamed) == rewire.scales(ordinary)
    assert len(plans) == 2


def test_a_layer_not_seen_before_makes_the_pass_ordinary(plans):
    ordinary, streamed, x, of = two("sometimes")
    for model in (ordinary, streamed):
        state = model.layers[2]._rewire
        state.scale, state.settled = None, False
    reseed(1)
    of(ordinary)(ordinary.eval()(x)).backward()
    reseed(1)
    rewire.backward_streamed(streamed.eval(), x, of(streamed))
    agree(streamed, ordinary)
    assert not plans
    rewire.backward_streamed(streamed, x, of(streamed))
    assert len(plans) == 1


def test_torchvision_resnet(plans):
    torchvision = pytest.importorskip("torchvision")
    check_model(lambda: torchvision.models.resnet18(num_classes=CLASSES), randn(N, 3, 32, 32), plans)


@pytest.mark.parametrize("blocks", [None, ["encoder.layers.*"]])
def test_torchvision_vit(plans, blocks):
    torchvision = pytest.importorskip("torchvision")

    def make():
        model = torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, dropout=0.1, num_classes=CLASSES)
        nn.init.normal_(model.heads.head.weight)  # zero otherwise, and nothing to be measured
        return model

    check_model(make, images, plans, blocks=blocks)


def check_model(make, x, plans, **options):
    ordinary = settled(rewire.convert(seeded(make), "dfa", skip="cut", **options), x, loss_of)
    streamed = copy.deepcopy(ordinary)
    reseed(0)
    loss_of(ordinary(x)).backward()
    reseed(0)
    rewire.backward_streamed(streamed, x, loss_of)
    agree(streamed, ordinary)
    for a, b in zip(streamed.buffers(), ordinary.buffers(), strict=True):
        assert torch.equal(a, b)
    assert len(plans) == 1


@pytest.mark.parametrize("name", ["resnet", "pre-norm", "post-norm, blocks", "dropout and batch norm"])
def test_autocast(name, plans):
    ordinary, streamed, inputs, of = two(name)
    ordinary, streamed, inputs = ordinary.float(), streamed.float(), inputs.float()
    reseed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = of(ordinary)(call(ordinary, inputs))
    loss.backward()
    reseed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = rewire.backward_streamed(streamed, inputs, of(streamed))
    same(found, loss)
    agree(streamed, ordinary, 1e-6)
    assert len(plans) == 1


def test_autocast_with_one_layer_in_many_places(plans):
    """Autocast casts its weight once for all of them; that must not tie the pieces together."""
    ordinary, streamed, inputs, of = two("tied")
    ordinary.float(), streamed.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = of(ordinary)(ordinary(inputs))
        rewire.backward_streamed(streamed, inputs, of(streamed))
    loss.backward()
    # Here the ordinary backward adds up the places in bfloat16, at the one cast; pieces are added in float32.
    agree(streamed, ordinary, 0.01)
    assert [len(step.closes) for step in plans[0].steps] == [1, 1, 1, 1]


def test_functional_use_of_a_weight(plans):
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.child, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.head(torch.tanh(F.linear(h, self.child.weight, self.child.bias)))

    check_model(Direct, x8, plans)
    assert len(plans[0].steps) == 3


# -- memory --------------------------------------------------------------------------------------------


class Saved:
    """Bytes that graphs keep: at the most, and now."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        outer = self

        class Held:
            def __init__(self, t):
                self.t, self.bytes = t, t.untyped_storage().nbytes()
                outer.now += self.bytes
                outer.peak = max(outer.peak, outer.now)

            def __del__(self):
                outer.now -= self.bytes

        self.hooks = saved_tensors_hooks(Held, lambda held: held.t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc):
        self.hooks.__exit__(*exc)


def saved_by(make, x, streamed, **options):
    model = settled(rewire.convert(seeded(make), "dfa", skip="cut", **options), x, loss_of)
    with Saved() as saved:
        if streamed:
            rewire.backward_streamed(model, x, loss_of)
        else:
            loss_of(model(x)).backward()
    assert saved.now == 0
    return saved.peak


@pytest.mark.parametrize(
    ("make", "x", "options"),
    [
        (lambda depth: chain(8, *[8] * depth, CLASSES), x8, {}),
        (
            lambda depth: nn.Sequential(
                nn.Conv2d(3, 6, 1), *(BasicBlock(6, 6, 1) for _ in range(depth)), nn.Flatten(), nn.Linear(1536, CLASSES)
            ),
            images,
            {},
        ),
        (lambda depth: Transformer(False, depth), tokens, {}),
        (lambda depth: Transformer(True, depth), tokens, {"blocks": ["blocks.*"]}),
    ],
    ids=["chain", "resnet", "post-norm", "pre-norm, blocks"],
)
def test_what_is_kept_does_not_grow_with_depth(make, x, options):
    shallow, deep = (saved_by(lambda d=d: make(d), x, True, **options) for d in (3, 9))
    assert deep == shallow
    ordinary = saved_by(lambda: make(9), x, False, **options)
    assert ordinary > 3 * deep


def test_pre_norm_without_blocks_keeps_less():
    ordinary, streamed = (saved_by(lambda: Transformer(True, 8), tokens, s) for s in (False, True))
    assert streamed < 0.6 * ordinary


# -- optimizer= ----------------------------------------------------------------------------------------


def optimizers(model):
    some = list(model.parameters())
    groups = [{"params": some[::2], "lr": 0.01}, {"params": some[1::2], "lr": 0.02}]
    return {
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1),
        "adamw": lambda: torch.optim.AdamW(groups),
    }


@pytest.mark.parametrize("which", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["dropout and batch norm", "resnet", "pre-norm", "tied", "used before", "regularised"])
def test_optimizer_steps_as_after_the_backward(name, which, plans):
    ordinary, streamed, inputs, of = two(name)
    theirs, ours = optimizers(ordinary)[which](), optimizers(streamed)[which]()
    for turn in range(3):
        reseed(turn)
        of(ordinary)(call(ordinary, inputs)).backward()
        theirs.step()
        theirs.zero_grad()
        reseed(turn)
        rewire.backward_streamed(streamed, inputs, of(streamed), optimizer=ours)
        for (key, p), q in zip(streamed.named_parameters(), ordinary.parameters(), strict=True):
            same(p, q, key)
            assert p.grad is None
    assert len(plans) == 3
    assert [len(g["params"]) for g in ours.param_groups] == [len(g["params"]) for g in theirs.param_groups]
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


def test_optimizer_takes_what_was_accumulated_and_leaves_others_alone():
    ordinary, streamed, x, of = two("chain")
    for model in (ordinary, streamed):
        model[0].weight.grad = torch.ones_like(model[0].weight)
    theirs, ours = (torch.optim.SGD(m[:4].parameters(), 0.1) for m in (ordinary, streamed))
    of(ordinary)(ordinary(x)).backward()
    theirs.step()
    rewire.backward_streamed(streamed, x, of(streamed), optimizer=ours)
    for i in (0, 2):
        same(streamed[i].weight, ordinary[i].weight)
        assert streamed[i].weight.grad is None
    same(streamed[6].weight.grad, ordinary[6].weight.grad)


def test_optimizer_keeps_few_gradients():
    model = settled(rewire.convert(seeded(chain, 8, *[8] * 9, CLASSES), "dfa", skip="cut"), x8, loss_of)
    most = 0

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            nonlocal most
            most = max(most, sum(p.grad is not None for p in model.parameters()))
            return super().step(closure)

    model.zero_grad()
    rewire.backward_streamed(model, x8, loss_of, optimizer=Watched(model.parameters(), 0.1))
    assert most == 2  # a weight and a bias
    assert all(p.grad is None for p in model.parameters())


def test_optimizer_in_the_first_pass():
    ordinary = rewire.convert(mlp(), "dfa", skip="cut")
    streamed = copy.deepcopy(ordinary)
    theirs, ours = (torch.optim.SGD(m.parameters(), 0.1) for m in (ordinary, streamed))
    x = randn(N, 5)
    loss_of(ordinary(x)).backward()
    theirs.step()
    rewire.backward_streamed(streamed, x, loss_of, optimizer=ours)
    for p, q in zip(streamed.parameters(), ordinary.parameters(), strict=True):
        same(p, q)
        assert p.grad is None


# -- order and tidiness --------------------------------------------------------------------------------


def test_forward_loss_and_hooks_run_twice():
    _, model, x, of = two("chain")
    counts = {"hook": 0, "loss": 0}
    model[2].register_forward_hook(lambda *_: counts.__setitem__("hook", counts["hook"] + 1))

    def loss_fn(out):
        counts["loss"] += 1
        return of(model)(out)

    rewire.backward_streamed(model, x, loss_fn)
    assert counts == {"hook": 2, "loss": 2}


def test_hooks_on_parameters_run_once():
    _, model, x, of = two("chain")
    seen = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    rewire.backward_streamed(model, x, of(model))
    # From the input to the output: pieces are done in the order of the forward.
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())
    assert [name.split(".")[0] for name in seen][::2] == ["0", "2", "4", "6"]


def test_ordinary_passes_before_and_after():
    ordinary, streamed, x, of = two("dropout and batch norm")
    for model in (ordinary, streamed):
        reseed(0)
        waiting = of(model)(model(x))  # its backward comes after the streamed pass
        reseed(1)
        if model is ordinary:
            of(model)(model(x)).backward()
        else:
            rewire.backward_streamed(model, x, of(model))
        waiting.backward()
        of(model)(model(x)).backward()
    agree(streamed, ordinary)


class Fails(nn.Module):
    at = None

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise KeyError("on purpose")
        return x


@pytest.mark.parametrize("at", [1, 2])
def test_an_error_leaves_nothing_behind(at):
    def make():
        return nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), Fails(), nn.Linear(8, CLASSES)
        )

    model = settled(rewire.convert(seeded(make), "dfa", skip="cut"), x8, loss_of)
    other = copy.deepcopy(model)
    buffers = [b.clone() for b in model.buffers()]
    model[4].calls, model[4].at = 0, at
    with pytest.raises(KeyError):
        rewire.backward_streamed(model, x8, loss_of)
    model[4].at = None
    assert streaming.get() is None
    for a, b in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(a, b)
    model.zero_grad()
    rewire.backward_streamed(model, x8, loss_of)
    loss_of(other(x8)).backward()
    agree(model, other)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model[4])


@pytest.mark.parametrize("with_optimizer", [False, True], ids=["", "optimizer"])
@pytest.mark.parametrize("name", CASES)
def test_passes_leave_nothing_behind(name, with_optimizer):
    """Not even what the garbage collector would find: it cannot look into graph nodes."""
    twin, model, x, of = two(name)
    del twin
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3) if with_optimizer else None

    def once():
        model.zero_grad()
        rewire.backward_streamed(model, x, of(model), optimizer=optimizer)

    assert not left_by(once)


def test_an_error_in_a_pass_leaves_no_graph_behind():
    model = settled(rewire.convert(chain(8, 8, 8, CLASSES).to(x8), "dfa", skip="cut"), x8, loss_of)

    def broken(out):
        loss_of(out)
        raise KeyError("on purpose")

    def once():
        with pytest.raises(KeyError):
            rewire.backward_streamed(model, x8, broken)

    assert not left_by(once, collect=True)  # tracebacks are for the collector


def test_threads_do_not_mix():
    pairs = [two("dropout and batch norm") for _ in range(4)]
    for ordinary, streamed, *_ in pairs:
        ordinary.eval(), streamed.eval()
    for ordinary, _, x, of in pairs:
        for _ in range(5):
            of(ordinary)(ordinary(x)).backward()

    def work(model, x, of):
        for _ in range(5):
            rewire.backward_streamed(model, x, of(model))

    threads = [threading.Thread(target=work, args=(s, x, of)) for _, s, x, of in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ordinary, streamed, *_ in pairs:
        agree(streamed, ordinary)


def test_another_model_inside():
    """A second converted model that takes part in the forward has its own, ordinary, pass."""
    teacher = settled(rewire.convert(mlp((8, 8, 8)), "dfa", skip="cut", scale=SCALE), x8, lambda y: y.square().sum())
    ordinary, streamed, x, of = two("chain")
    found = []
    given = x.clone().requires_grad_()
    for model in (ordinary, streamed):
        teacher.zero_grad()
        if model is ordinary:
            (of(model)(model(x)) + teacher(given).square().sum()).backward()
        else:
            rewire.backward_streamed(model, x, lambda out: of(streamed)(out) + teacher(given).square().sum())
        found.append([p.grad.clone() for p in teacher.parameters()])
    agree(streamed, ordinary)
    for a, b in zip(*found, strict=True):
        same(a, b)


# -- what is refused -----------------------------------------------------------------------------------


def refused(match, model, x=x8, loss_fn=loss_of, kind=rewire.ConversionError, **options):
    with pytest.raises(kind, match=match):
        rewire.backward_streamed(model, x, loss_fn, **options)


def test_models_that_cannot_be_streamed():
    refused("not converted", chain(8, CLASSES))
    refused("Module", lambda x: x)
    refused("skip='cut'", rewire.convert(chain(8, 8, CLASSES), "dfa"))
    refused("no layer is under a direct rule", rewire.convert(chain(8, 8, CLASSES), "fa", skip="cut"))
    parts = [rewire.convert(chain(8, 8), "dfa", skip="cut") for _ in range(2)]
    refused("separately", nn.Sequential(*parts))


def test_optimizers_that_cannot_be_used():
    model = rewire.convert(chain(8, 8, CLASSES), "dfa", skip="cut")
    refused("Optimizer", model, optimizer="sgd")
    refused("LBFGS", model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_forwards_that_cannot_be_run_twice():
    class Alternates(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
            self.turn = 0

        def forward(self, x):
            self.turn += 1
            return self.head(torch.tanh(self.a(x) if self.turn % 2 else self.b(x)))

    model = rewire.convert(seeded(Alternates), "dfa", skip="cut", scale=SCALE)
    settled(model, x8, loss_of, passes=4)
    refused("'b' where the first one called 'a'", model, kind=rewire.PassError)

    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain(8, 8, CLASSES)

        def forward(self, x):
            return self.body(x.mul_(2))

    model = settled(rewire.convert(seeded(Changes), "dfa", skip="cut"), x8.clone(), loss_of)
    refused("changes its input in place", model, x8.clone(), kind=rewire.PassError)

    class Differentiates(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            h = self.a(x)
            (g,) = torch.autograd.grad(h.square().sum(), h, retain_graph=True)
            return self.head(torch.tanh(h) + g.detach())

    model = settled(rewire.convert(seeded(Differentiates), "dfa", skip="cut"), x8, loss_of)
    refused("keeps no activations", model, kind=rewire.PassError)


def test_checkpointing_is_refused():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), chain(8, 8, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(torch.tanh(checkpoint(self.b, torch.tanh(self.a(x)), use_reentrant=False)))

    model = settled(rewire.convert(seeded(Checkpointed), "dfa", skip="cut"), x8, loss_of)
    refused("activation checkpointing", model, kind=rewire.PassError)


def test_a_hidden_layer_the_loss_sees_directly():
    """As in an ordinary pass: no error reaches it, and that is said."""

    class Leaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = (nn.Linear(8, 8) for _ in range(4))
            self.leak = False

        def forward(self, x):
            h = torch.tanh(self.a(x))
            if self.leak:
                return self.b(h)
            return self.head(torch.tanh(self.c(torch.tanh(self.b(h)))))

    model = settled(rewire.convert(seeded(Leaks), "dfa", skip="cut"), x8, loss_of)
    model.leak = True
    with pytest.raises(rewire.PassError, match="'b' got a gradient"):
        loss_of(model(x8)).backward()
    refused("'b' got a gradient", model, kind=rewire.PassError)


LEARN = [
    "dkp",
    "grape(every=2, anchor=3)",
    "fitted(every=2)",
    "fitted(by='jvp', every=1)",
    "switch(first='sdfa', then='dfa', at=3)",
    "anchored(rule='dfa', every=2)",  # passes under bp, too, are ordinary ones
]
LEARN_LOCALLY = ["kp", "wm", "wm(every=2)", "ldfa", "pfa", "switch(first='usf', then='fa', at=3)"]


@pytest.mark.parametrize(
    ("rule", "layers"), [*((rule, None) for rule in LEARN), *(("dfa", {"2": rule}) for rule in LEARN_LOCALLY)]
)
def test_two_forwards_are_one_pass(rule, layers):
    """For what learns from passes, and for what counts them."""
    models = [
        rewire.convert(seeded(chain, 5, 7, 6, 4), rule, skip="cut", scale=0.3, output="4", layers=layers)
        for _ in range(2)
    ]
    for step in range(6):
        x, labels = randn(8, 5, seed=step), torch.arange(8) % 4
        for model in models:
            model.zero_grad()
        F.cross_entropy(models[0](x), labels).backward()
        rewire.backward_streamed(models[1], x, lambda out, labels=labels: F.cross_entropy(out, labels))
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, atol=1e-10, rtol=0)
            with torch.no_grad():
                p -= 0.1 * p.grad
                q -= 0.1 * q.grad
        states = [{k: v for k, v in model.state_dict().items() if "rewire_" in k} for model in models]
        assert states[0].keys() == states[1].keys() and (states[0] or "switch" in str(layers))
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, atol=1e-10, rtol=0)


class Scaled(nn.Module):
    """A chain behind a buffer that is one number for many places."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.full((1, 1), 2.0).expand(3, 8)[0])
        self.body = chain(8, 8, 8, CLASSES)

    def forward(self, x):
        return self.body(x * self.factor)


class Mixed(nn.Module):
    """Nodes of a graph, mixed by a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.eye(N).roll(1, 0).to_sparse())
        self.body = chain(8, 8, 8, CLASSES)

    def forward(self, x):
        return self.body(self.edges @ x)


class Lazy(nn.Module):
    """Statistics that are not there before the first forward."""

    def __init__(self, registered):
        super().__init__()
        if registered:
            self.register_buffer("mean", None)
        self.body = chain(8, 8, 8, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            if getattr(self, "mean", None) is None:
                self.register_buffer("mean", x.mean(0))
            else:
                self.mean = 0.9 * self.mean + 0.1 * x.square().mean(0)
        return self.body(x - self.mean)


@pytest.mark.parametrize(
    "make",
    [Scaled, Mixed, lambda: Lazy(False), lambda: Lazy(True)],
    ids=["expanded", "sparse", "new", "none"],
)
def test_buffers_are_put_back_whatever_they_are(make):
    ordinary = settled(rewire.convert(seeded(make), "dfa", skip="cut"), x8, loss_of)
    if isinstance(ordinary, Lazy):
        del ordinary.mean
    side_by_side(ordinary)


def test_an_input_from_elsewhere_stays_as_it_is():
    """It is the caller's: cut off in place, it would silently lose its gradient for everything else."""
    encoders = [seeded(nn.Linear, 8, 8).to(x8) for _ in range(2)]
    body = rewire.convert(seeded(chain, 8, 8, 8, CLASSES).to(x8), "dfa", skip="cut")
    ordinary = settled(body, x8.clone().requires_grad_(), loss_of)
    streamed = copy.deepcopy(ordinary)
    penalties = []
    for encoder, model in zip(encoders, (ordinary, streamed), strict=True):
        z = torch.tanh(encoder(x8))
        z.retain_grad()
        if model is ordinary:
            loss_of(model(z)).backward(retain_graph=True)
        else:
            rewire.backward_streamed(model, z, loss_of)
        assert z.requires_grad and z.grad_fn is not None
        penalties.append(z.grad)
    agree(streamed, ordinary)
    same(encoders[1].weight.grad, encoders[0].weight.grad, TOL)
    same(penalties[1], penalties[0], TOL)


@pytest.mark.parametrize("frozen", [("2", "4"), ("0", "2", "4"), ("4", "6"), ("2", "4", "6")])
def test_layers_frozen_one_after_another(frozen):
    model = seeded(chain, 8, 8, 8, 8, CLASSES).to(x8)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    ordinary = settled(rewire.convert(model, "dfa", skip="cut"), x8, loss_of)
    side_by_side(ordinary)


class SideBySide(nn.Module):
    """Three layers are fed with one tensor; what one of them makes of the input itself is added."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        once = torch.tanh(self.k(x))  # nothing to hand back to
        h = self.norm(x)
        return self.head(torch.tanh(self.q(h)) * torch.tanh(self.k(h)) * torch.tanh(self.v(h)) + once)


@pytest.mark.parametrize("frozen", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_frozen_layers_beside_others(frozen, plans):
    model = seeded(SideBySide).to(x8)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    side_by_side(settled(rewire.convert(model, "dfa", skip="cut"), x8, loss_of))
    assert plans


@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "frsf", "brsf"])
def test_a_settled_layer_under_another_rule(rule):
    """On its shortest way: e is looked for where gradients are on."""
    model = rewire.convert(seeded(chain, 8, 8, 8, 8, CLASSES).to(x8), "dfa", skip="cut", layers={"4": rule})
    ordinary = settled(model, x8, loss_of, passes=4)
    side_by_side(ordinary)


def test_hooks_on_what_a_layer_is_fed_with():
    """Those put there before count, as under ``skip="keep"``: they are given what was fed back."""

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
            self.factors = ()

        def forward(self, x):
            h = torch.tanh(self.a(x))
            for factor in self.factors:
                h.register_hook(lambda g, factor=factor: g * factor)
            return self.head(torch.tanh(self.b(h)))

    found = {}
    for factors in ((), (3.0, 2.0)):
        ordinary = settled(rewire.convert(seeded(Hooked), "dfa", skip="cut"), x8, loss_of)
        ordinary.factors = factors
        streamed = copy.deepcopy(ordinary)
        loss_of(ordinary(x8)).backward()
        rewire.backward_streamed(streamed, x8, loss_of)
        agree(streamed, ordinary)
        found[factors] = ordinary.a.weight.grad
    same(found[3.0, 2.0], 6 * found[()], TOL)


def test_outputs_are_detached_whatever_they_are_in():
    @dataclass
    class Output:
        logits: torch.Tensor
        more: dict[str, torch.Tensor]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain(8, 8, 8, CLASSES)

        def forward(self, x):
            y = self.body(x)
            return Output(y, {"twice": 2 * y})

    def loss(out):
        return loss_of(out.logits)

    model = settled(rewire.convert(seeded(Model), "dfa", skip="cut"), x8, loss)
    _, out = rewire.backward_streamed(model, x8, loss)
    assert type(out) is Output
    assert not out.logits.requires_grad and not out.more["twice"].requires_grad
