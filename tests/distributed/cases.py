"""What the two processes and the single one have in common: model, data, steps."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.rules.base import resolve
from tests.every_rule import SCHEDULES

WIDTHS = (5, 8, 6, 6, 4)
STEPS = 3
RULES = tuple(name for name in rewire.rules() if name not in SCHEDULES)
STRUCTURED = (
    "fitted(every=2, feedback=LowRank(rank=2))",
    "fitted(every=2, context=2, feedback=Sparse(nonzeros=2))",
    "dkp(feedback=LowRank(rank=2))",
    "dkp(feedback=Sparse(nonzeros=2))",
    "fitted(every=2, feedback=Shared())",
    "dkp(feedback=Shared())",
)
LOCAL = [name for name in RULES if isinstance(resolve(name), rewire.LocalRule)]
# They keep of e only its sign, or the target: a mean over more samples does not make their feedback smaller, so the
# gradient of two halves is not that of the whole.
NOT_LINEAR = ("sdfa", "drtp")


class Block(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.linear = nn.Linear(a, b)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def build(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [Block(a, b) for a, b in itertools.pairwise(WIDTHS[:-1])]
        return nn.Sequential(*blocks, nn.Linear(*WIDTHS[-2:])).double()


def batch(step, n=8):
    """The joint batch of one step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(n, WIDTHS[0], dtype=torch.float64, generator=generator)
    x[n // 2 :] *= 3  # the halves would measure different scales
    return x, torch.randint(WIDTHS[-1], (n,), generator=generator)


def half(step, rank, n=8):
    x, labels = batch(step, n)
    return x.chunk(2)[rank], labels.chunk(2)[rank]


def loss_of(model, x, labels):
    return F.cross_entropy(model(x), labels)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def full(t):
    """A tensor as one process has it."""
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return t.detach().clone()


def state_of(model):
    """Parameters and their gradients, gathered."""
    found = {name: full(p) for name, p in model.named_parameters()}
    return found | {f"{name}.grad": full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def train(model, batches, optimizer=None, run=None):
    """Some steps; the gradients of the last one stay."""
    run = model if run is None else run
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    for x, labels in batches:
        optimizer.zero_grad()
        loss_of(run, x, labels).backward()
        optimizer.step()
    return optimizer


def single(rule, steps=STEPS, whole=None):
    """One process on the joint batches (or, one behind the other, on both halves, averaged)."""
    model = rewire.convert(build() if whole is None else whole, rule)
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        if rule in NOT_LINEAR:
            for loss in [loss_of(model, *half(step, rank)) for rank in (0, 1)]:
                loss.backward()
            for p in model.parameters():
                p.grad /= 2
        else:
            loss_of(model, *batch(step)).backward()
        optimizer.step()
    return model
