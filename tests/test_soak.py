"""Long training leaves nothing behind: memory and the number of live tensors stay what they were after a warm-up."""

import gc
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewire

RULES = ("fa", "dfa", "brsf")
STATM = Path("/proc/self/statm")


def resident():
    """Bytes of this process in memory; 0 where the system does not tell in this way."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def of_ours():
    """Objects of the library that are alive."""
    gc.collect()
    return [thing for thing in gc.get_objects() if str(type(thing).__module__).startswith("rewire.")]


def live():
    """Tensors alive, and objects of ours."""
    ours = len(of_ours())
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()), ours


@pytest.fixture(autouse=True)
def others():
    """What tests before have left stays until the end: none of it goes between two counts."""
    return of_ours()


class Net(nn.Module):
    """A convolution, a shared layer, a weight used by its parent, batch norm, dropout, two heads."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.1)
        self.twice, self.used = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.side = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        h = F.avg_pool2d(torch.tanh(self.norm(self.conv(x))), 2).flatten(1)
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        h = self.drop(torch.tanh(F.linear(h, self.used.weight)))
        return self.head(h), self.side(h)


def soak(rule, steps, warm, look_every):
    """(tensors, objects of ours, bytes) after ``warm`` steps and after ``steps``."""
    torch.manual_seed(0)
    model = rewire.convert(Net(), rule)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    numbers = torch.Generator().manual_seed(1)

    def loss_of(outputs, y):
        return F.cross_entropy(outputs[0], y) + F.cross_entropy(outputs[1], y)

    measured = []
    for i in range(steps):
        n = 6 if i % 5 else 4  # a shorter batch now and then
        x, y = torch.randn(n, 1, 6, 6, generator=numbers), torch.randint(4, (n,), generator=numbers)
        optimizer.zero_grad()
        outputs = model(x)
        if i % 7:  # some forwards never get a backward
            loss_of(outputs, y).backward()
            optimizer.step()
        if i % look_every == 0:
            with torch.no_grad():
                model(x)
            with rewire.use_rule(model, "bp"):
                loss_of(model(x), y).backward()
            assert rewire.verify(model, x, lambda outputs, y=y: loss_of(outputs, y)).ok
            if hasattr(rewire, "alignment"):
                rewire.alignment(model, x, lambda outputs, y=y: loss_of(outputs, y))
            rewire.feedback(model), rewire.summary(model), rewire.config(model)
        del outputs
        if i + 1 in (warm, steps):  # each time after the same kind of step
            loss_of(model(x), y).backward()
            optimizer.zero_grad()
            measured.append((*live(), resident()))
    return measured


def check(rule, steps, warm, look_every, growth):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rewire.RewireWarning)
        (tensors, ours, before), (tensors_then, ours_then, after) = soak(rule, steps, warm, look_every)
    assert abs(tensors - tensors_then) < 50  # a leak is one in each step; tests before this one may leave some
    assert ours_then == ours
    assert after - before < growth, f"{(after - before) / 2**20:.1f} MiB more after {steps - warm} steps"
    return after - before


@pytest.mark.parametrize("rule", RULES)
def test_some_hundred_steps_leave_nothing_behind(rule):
    check(rule, 400, 150, 100, growth=8 * 2**20)


def test_streamed_passes_leave_no_memory_behind():
    """Small things left between large ones would keep the memory of those from being used again."""
    torch.manual_seed(0)
    layers = [module for _ in range(6) for module in (nn.Linear(64, 64), nn.ReLU())]
    model = rewire.convert(nn.Sequential(*layers, nn.Linear(64, 4)), "dfa", skip="cut")
    x, y = torch.randn(4096, 64), torch.randint(4, (4096,))
    measured = []
    for i in range(90):
        model.zero_grad()
        rewire.backward_streamed(model, x, lambda out: F.cross_entropy(out, y))
        if i + 1 in (30, 90):
            measured.append((*live(), resident()))
    (_, ours, before), (_, ours_then, after) = measured
    assert ours_then == ours
    assert after - before < 48 * 2**20, f"{(after - before) / 2**20:.1f} MiB more"  # activations take 12


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_twenty_thousand_steps_leave_nothing_behind(rule):
    """``make test-slow PYTEST_ARGS=tests/test_soak.py``"""
    # A leak of one small tensor (its object alone takes some hundred bytes) in each step would show.
    check(rule, 20_000, 4_000, 1_000, growth=3 * 2**20)
