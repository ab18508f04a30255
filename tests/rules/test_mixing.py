"""Several rules in one model: what crosses the seams, against plain autograd and against NumPy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewire

TOL = {"atol": 1e-8, "rtol": 0}


class Handed(torch.autograd.Function):
    """Identity whose backward hands on what it is told."""

    @staticmethod
    def forward(ctx, x, fed):
        ctx.fed = fed
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.fed(gradient), None


class Local(torch.autograd.Function):
    """A convolution or product whose input gets its gradient by other weights."""

    @staticmethod
    def forward(ctx, x, W, b, B, operation):
        ctx.save_for_backward(x, W, b, B)
        ctx.operation = operation
        return operation(x, W, b)

    @staticmethod
    def backward(ctx, delta):
        x, W, b, B = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, W, b)]
            gW, gb = torch.autograd.grad(ctx.operation(*leaves), leaves[1:], delta)
            gx = torch.autograd.grad(ctx.operation(leaves[0], B, leaves[2]), leaves[0], delta)[0]
        return gx, gW, gb, None, None


def gradients(loss, model):
    return dict(
        zip((n for n, _ in model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )


def converted(model, x, y, rule, **options):
    rewire.convert(model, rule, scale=0.2, **options)
    F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    B = {name: t.clone() for name, t in rewire.feedback(model).items()}
    e = rewire.output_error(model).clone()
    rewire.restore(model)
    return found, B, e


def check(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **TOL, msg=lambda m, name=name: f"{name}: {m}")


def lenet():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 9),
        nn.Tanh(),
        nn.Linear(9, 5),
    ).double()
    return model, torch.randn(6, 1, 8, 8).double(), torch.randint(5, (6,))


def test_fa_in_convolutions_and_dfa_in_the_head():
    model, x, y = lenet()
    found, B, e = converted(model, x, y, "dfa", layers={nn.Conv2d: "fa"})
    assert set(B) == {"0", "2", "5", "7"} and B["2"].shape == (4, 3, 3, 3) and B["5"].shape == (5, 64)

    h = torch.tanh(model[0](x))
    h = torch.tanh(Local.apply(h, model[2].weight, model[2].bias, B["2"], F.conv2d)).flatten(1)
    h = Handed.apply(h, lambda g: e @ B["5"])
    h = torch.tanh(model[5](h))
    h = Handed.apply(h, lambda g: e @ B["7"])
    check(found, gradients(F.cross_entropy(model[7](h), y), model))


def test_dfa_in_convolutions_and_fa_in_the_head():
    model, x, y = lenet()
    found, B, e = converted(model, x, y, "fa", layers={nn.Conv2d: "dfa"})
    h = torch.tanh(model[0](x))
    h = Handed.apply(h, lambda g: (e @ B["2"].flatten(1)).reshape(g.shape))
    h = torch.tanh(model[2](h)).flatten(1)
    h = torch.tanh(Local.apply(h, model[5].weight, model[5].bias, B["5"], F.linear))
    h = Local.apply(h, model[7].weight, model[7].bias, B["7"], F.linear)
    check(found, gradients(F.cross_entropy(h, y), model))


def test_bp_in_between():
    model, x, y = lenet()
    found, B, e = converted(model, x, y, "dfa", layers={"5": "bp", "7": "bp"})
    assert set(B) == {"2"}
    h = torch.tanh(model[0](x))
    h = Handed.apply(h, lambda g: (e @ B["2"].flatten(1)).reshape(g.shape))
    h = torch.tanh(model[2](h)).flatten(1)
    check(found, gradients(F.cross_entropy(model[7](torch.tanh(model[5](h))), y), model))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.out(torch.tanh(self.inner(self.norm(x))))


class Stage(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Deep(nn.Module):
    """Blocks within stages, and a head over the mean of the tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.stages = nn.ModuleList([Stage(6, 2), Stage(6, 2)])
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean(1))


def deep():
    torch.manual_seed(0)
    return Deep().double(), torch.randn(6, 3, 4).double(), torch.randint(5, (6,))


def over_tokens(e, B):
    return lambda g: (e @ B)[:, None].expand_as(g)


def test_bp_in_the_last_stage_with_dfa_below():
    model, x, y = deep()
    found, B, e = converted(model, x, y, "dfa", layers={"stages.1.*": "bp", "head": "bp"})
    assert set(B) == {f"stages.0.blocks.{i}.{name}" for i in (0, 1) for name in ("inner", "out")}
    h = model.embed(x)
    for i, block in enumerate(model.stages[0].blocks):
        fed = {name: over_tokens(e, B[f"stages.0.blocks.{i}.{name}"]) for name in ("inner", "out")}
        inner = block.inner(Handed.apply(block.norm(h), fed["inner"]))
        h = h + block.out(Handed.apply(torch.tanh(inner), fed["out"]))
    h = model.stages[1](h)
    check(found, gradients(F.cross_entropy(model.head(h.mean(1)), y), model))


@pytest.mark.parametrize("depth", ["stages", "blocks"])
def test_blocks_at_two_depths(depth):
    model, x, y = deep()
    pattern = "stages.?" if depth == "stages" else "stages.*.blocks.?"
    found, B, e = converted(model, x, y, "dfa", blocks=[pattern], layers={"head": "bp"})
    h = model.embed(x)
    for i, stage in enumerate(model.stages):
        if depth == "stages":
            h = stage(Handed.apply(h, over_tokens(e, B[f"stages.{i}"])))
        else:
            for j, block in enumerate(stage.blocks):
                h = block(Handed.apply(h, over_tokens(e, B[f"stages.{i}.blocks.{j}"])))
    assert len(B) == (2 if depth == "stages" else 4)
    check(found, gradients(F.cross_entropy(model.head(h.mean(1)), y), model))


def test_blocks_of_two_depths_at_once():
    model, x, y = deep()
    found, B, e = converted(model, x, y, "dfa", blocks=["stages.0", "stages.1.blocks.?"], layers={"head": "bp"})
    assert set(B) == {"stages.0", "stages.1.blocks.0", "stages.1.blocks.1"}
    h = model.stages[0](Handed.apply(model.embed(x), over_tokens(e, B["stages.0"])))
    for j, block in enumerate(model.stages[1].blocks):
        h = block(Handed.apply(h, over_tokens(e, B[f"stages.1.blocks.{j}"])))
    check(found, gradients(F.cross_entropy(model.head(h.mean(1)), y), model))


@pytest.mark.parametrize("learned", ["dkp", "grape(anchor=0)"])
def test_learned_rules_next_to_fixed_ones(learned):
    model, x, y = lenet()
    rewire.convert(model, "fa", scale=0.2, layers={"5": learned, "7": "dfa"})
    before = None
    for step in range(4):
        model.zero_grad()
        if step == 3:  # what the passes so far have shown is taken in now, as the next forward would
            B = {name: t.clone() for name, t in rewire.feedback(model).items()}
        F.cross_entropy(model(x), y).backward()
        if step == 0:
            before = rewire.feedback(model)["5"].clone()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    e = rewire.output_error(model).clone()
    assert (B["5"] - before).abs().max() > 1e-4
    rewire.restore(model)
    h = torch.tanh(model[0](x))
    h = torch.tanh(Local.apply(h, model[2].weight, model[2].bias, B["2"], F.conv2d)).flatten(1)
    h = torch.tanh(model[5](Handed.apply(h, lambda g: e @ B["5"])))
    h = Handed.apply(h, lambda g: e @ B["7"])
    check(found, gradients(F.cross_entropy(model[7](h), y), model))


def test_broken_on_purpose():
    """The reference with one seam wrong is seen."""
    model, x, y = lenet()
    found, B, e = converted(model, x, y, "dfa", layers={nn.Conv2d: "fa"})
    h = torch.tanh(model[0](x))
    h = torch.tanh(model[2](h)).flatten(1)  # bp where fa belongs
    h = torch.tanh(model[5](Handed.apply(h, lambda g: e @ B["5"])))
    expected = gradients(F.cross_entropy(model[7](Handed.apply(h, lambda g: e @ B["7"])), y), model)
    with pytest.raises(AssertionError, match=r"0\.weight"):
        check(found, expected)
