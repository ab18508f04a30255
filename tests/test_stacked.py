"""Stacked models: each member has its own weights, its own feedback, its own data, and trains as if alone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

import rewire
from rewire.rules import DFA, FA, LearnedLocal, Schedule
from rewire.stacked import Stack

SEEDS, STEPS = 4, 6


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(18, 5)),
    )


MODELS = {"mlp": mlp, "cnn": cnn}


def members(make, rule, **options):
    """One model per seed, each with what belongs to that seed."""
    found = []
    for seed in range(SEEDS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make().double()
        found.append(model if rule == "bp" else rewire.convert(model, rule, seed=seed, **options))
    return found


def batches(steps=STEPS):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(steps, SEEDS, 7, 12, dtype=torch.float64, generator=g)
    return x, torch.randint(5, (steps, SEEDS, 7), generator=g)


def ordinary(model, x, y):
    model.zero_grad()
    with rewire.targets(y):
        F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loss_of(stack):
    def loss(params, buffers, feedback, x, y):
        with rewire.targets(y):
            return F.cross_entropy(stack(params, buffers, feedback, x), y)

    return loss


@pytest.mark.parametrize("net", MODELS)
@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "frsf", "dfa", "sdfa", "drtp", "shallow"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_trained_together_as_trained_alone(net, rule, optimizer):
    models = members(MODELS[net], rule)
    xs, ys = batches()

    def make(parameters):
        if optimizer == "adam":
            return torch.optim.Adam(parameters, 0.01, weight_decay=0.1)
        return torch.optim.SGD(parameters, 0.1, momentum=0.9)

    for i, model in enumerate(models):  # the measuring pass
        ordinary(model, xs[0, i], ys[0, i])
    alone = copy.deepcopy(models)
    for i, model in enumerate(alone):
        steps = make(model.parameters())
        for x, y in zip(xs, ys, strict=True):
            ordinary(model, x[i], y[i])
            steps.step()

    stack = Stack(models)
    steps = make(list(stack.params.values()))
    for x, y in zip(xs, ys, strict=True):
        gradients = vmap(grad(loss_of(stack)))(stack.params, stack.buffers, stack.feedback, x, y)
        for name, p in stack.params.items():
            p.grad = gradients[name]
        steps.step()

    for i, model in enumerate(alone):
        for name, p in model.named_parameters():
            torch.testing.assert_close(stack.params[name][i], p.detach(), rtol=1e-8, atol=1e-8)
    assert not torch.equal(stack.params[name][0], stack.params[name][1])


@pytest.mark.parametrize("rule", ["fa", "frsf", "usf", "dfa"])
def test_members_differ_in_their_feedback(rule):
    """With the first one's feedback for all, the others' gradients are wrong: the test above would notice."""
    models = members(mlp, rule)
    xs, ys = batches(1)
    expected = [ordinary(model, xs[0, i], ys[0, i]) for i, model in enumerate(models)]
    expected = [ordinary(model, xs[0, i], ys[0, i]) for i, model in enumerate(models)]
    stack = Stack(models)
    first = {name: B[:1].expand_as(B).contiguous() for name, B in stack.feedback.items()}
    for feedback, right in ((stack.feedback, [True] * SEEDS), (first, [True, False, False, False])):
        found = vmap(grad(loss_of(stack)))(stack.params, stack.buffers, feedback, xs[0], ys[0])
        for i, gradients in enumerate(expected):
            close = torch.allclose(found["0.weight"][i], gradients["0.weight"], rtol=1e-9, atol=1e-12)
            assert close == right[i]


def agree(models):
    """Gradients of a stack are those of its members, each by itself."""
    xs, ys = batches(1)
    for _ in range(2):
        expected = [ordinary(model, xs[0, i], ys[0, i]) for i, model in enumerate(models)]
    stack = Stack(models)
    found = vmap(grad(loss_of(stack)))(stack.params, stack.buffers, stack.feedback, xs[0], ys[0])
    for i, gradients in enumerate(expected):
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", ["auto", 0.05])
def test_several_rules_outputs_and_a_direct_structure(scale):
    options = {"layers": {"0": "fa", "2": "usf"}, "feedback": "orthogonal", "scale": scale}
    models = members(mlp, "dfa", **options)
    agree(models)


class Halved(rewire.LocalRule):
    random = False

    def backward_weight(self, weight, random, scale):
        return weight / 2


class Mixed(rewire.LocalRule):
    magnitude = True

    def backward_weight(self, weight, random, scale):
        return torch.where(weight > 0, random, -scale)


class Fixed(rewire.LocalRule):
    uses_weight = False

    def backward_weight(self, weight, random, scale):
        return random.flip(0)


class Loudest(rewire.DirectRule):
    feedback = "orthogonal"

    def signal(self, error, targets, axis):
        return error * (error.abs() >= error.abs().topk(2, axis).values.amin(axis, keepdim=True))


class Wide(rewire.DirectRule):
    """It has more features than e, and reads targets."""

    needs_targets = True

    def signal(self, error, targets, axis):
        return torch.cat([error, (targets[:, None] == torch.arange(5)).to(error)], axis)


class Mine(DFA):
    pass


class Turns(Schedule):
    def __init__(self):
        self.both = Halved(), FA()

    def parts(self):
        return self.both

    def now(self, passes):
        return self.both[passes % 2]


class Restless(Halved):
    redraw = True


class Learns(LearnedLocal):
    def start(self, form, scale, draw):
        return {"B": draw.normal("B", form.shape) * scale}

    def feedback(self, kept, form):
        return kept["B"]


@pytest.mark.parametrize("net", MODELS)
@pytest.mark.parametrize("rule", [Halved, Mixed, Fixed, Loudest, Wide, Mine])
def test_rules_of_one_s_own_that_are_fixed(rule, net):
    models = members(MODELS[net], rule())
    agree(models)


def test_two_inputs_to_one_block():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x, y):
            return self.a(x) * self.b(y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.last = nn.Linear(12, 6), Sum(), nn.Linear(5, 5)

        def forward(self, x):
            h = self.first(x)
            return self.last(self.block(h, torch.tanh(h)))

    models = members(Net, "dfa", blocks=["block"])
    xs, ys = batches(1)
    for _ in range(2):
        expected = [ordinary(model, xs[0, i], ys[0, i]) for i, model in enumerate(models)]
    stack = Stack(models)
    assert {"block#0@last", "block#1@last"} <= set(stack.feedback)
    found = vmap(grad(loss_of(stack)))(stack.params, stack.buffers, stack.feedback, xs[0], ys[0])
    for i, gradients in enumerate(expected):
        torch.testing.assert_close(found["first.weight"][i], gradients["first.weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: members(mlp, "brsf"), "draws its feedback anew, so that it changes from step to step"),
        (lambda: members(mlp, Restless()), "draws its feedback anew"),
        (lambda: members(mlp, "kp"), "learns its feedback, which changes from step to step"),
        (lambda: members(mlp, "dkp"), "learns its feedback"),
        (lambda: members(mlp, Learns()), "learns its feedback"),
        (lambda: members(mlp, "switch(first=bp, then=fa, at=9)"), "is another rule in some passes"),
        (lambda: members(mlp, "anchored(rule=dfa, every=4)"), "is another rule in some passes"),
        (lambda: members(mlp, Turns()), "is another rule in some passes"),
        (lambda: members(mlp, "dfa", skip="cut"), "skip='cut'"),
        (lambda: members(mlp, "dfa", feedback="seeded"), "no plain tensor"),
        (lambda: [*members(mlp, "dfa")[:1], *members(mlp, "fa")[:1]], "differ in their feedback"),
        (lambda: [*members(mlp, "sdfa")[:1], *members(mlp, "dfa")[:1]], "converted in different ways"),
        (lambda: [mlp(), cnn()], "differ in their parameters"),
        (list, "at least one"),
    ],
)
def test_what_cannot_be_stacked_is_said(make, says):
    models = make()
    x, y = batches(1)
    for model in models:
        ordinary(model.double(), x[0, 0], y[0, 0])
    with pytest.raises(rewire.ConversionError, match=says):
        Stack(models)


def test_a_missing_pass_is_said():
    with pytest.raises(rewire.ConversionError, match="waits for a training pass"):
        Stack(members(mlp, "dfa"))


def test_nothing_of_it_stays_behind():
    """Not in the modules, not for other threads in the middle of a call, not after an error."""
    models = members(mlp, "dfa")
    xs, ys = batches(1)
    for _ in range(2):
        expected = [ordinary(model, xs[0, i], ys[0, i]) for i, model in enumerate(models)]
    stack = Stack(models)
    seen = []

    def loss(params, buffers, feedback, x, y):
        other = threading.Thread(target=lambda: seen.append(ordinary(models[0], xs[0, 0], ys[0, 0])))
        other.start()
        other.join()
        out = stack(params, buffers, feedback, x)
        return F.cross_entropy(out, y)

    vmap(grad(loss))(stack.params, stack.buffers, stack.feedback, xs[0], ys[0])
    with pytest.raises(RuntimeError):
        stack(stack.params, stack.buffers, stack.feedback, xs[0, 0])
    for found in (seen[0], ordinary(models[0], xs[0, 0], ys[0, 0])):
        for name, gradient in expected[0].items():
            assert torch.equal(found[name], gradient)
