"""Learned direct feedback of several output layers: one seen later than others, and errors of different kinds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewire

from ..plain import randn, seeded

RULES = ["fitted(every=2)", "fitted(every=2, context=3)", "dkp", "grape(every=1)", "fitted(by='jvp', every=1)"]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.one(h), self.two(h)


def loss(outputs: tuple[Tensor, ...], *which: int) -> Tensor:
    total = outputs[0].new_zeros(())
    for i in which:
        labels = torch.arange(len(outputs[i])) % outputs[i].shape[1]
        total = total + F.cross_entropy(outputs[i], labels)
    return total


def seen_by_plain_autograd(model: nn.Module, x: Tensor, *which: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of both heads side by side, zero where the loss does not see one, and the gradient of b's input."""
    model = copy.deepcopy(model)
    kept: list[Tensor] = []
    model.b.register_forward_pre_hook(lambda module, args: (args[0].retain_grad(), kept.append(args[0]))[0])
    outputs = model(x)
    for y in outputs:
        y.retain_grad()
    loss(outputs, *which).backward()
    e = [torch.zeros_like(y) if y.grad is None else y.grad for y in outputs]
    assert kept[0].grad is not None
    return torch.cat(e, 1).numpy(), kept[0].grad.numpy()


def test_an_output_seen_later_joins_the_fit() -> None:
    """Its error was zero in the passes before, and that is what they count for."""
    model, x = seeded(Heads), randn(6, 3, seed=1)
    plain = copy.deepcopy(model)
    rewire.convert(model, "fitted(every=1, decay=0.5, ridge=0.1, cap=0)", scale=0.3)
    S, R = np.zeros((5, 5)), np.zeros((5, 4))
    order = [(0,), (0,), (0, 1), (1,), (0, 1)]
    for which in order:
        loss(model(x), *which).backward()
        e, G = seen_by_plain_autograd(plain, x, *which)
        S, R = 0.5 * S + e.T @ e, 0.5 * R + e.T @ G
    d = np.diag(S)
    fit = np.linalg.solve(S + np.diag(0.1 * d + 1e-3 * d.mean()), R)
    used = rewire.feedback(model)
    np.testing.assert_allclose(np.concatenate([used["b@one"], used["b@two"]]), fit, atol=1e-8, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_passes_of_one_output_and_then_of_two(rule: str) -> None:
    model, x = seeded(Heads), randn(6, 3, seed=1)
    rewire.convert(model, rule)
    for which in [(0,), (0,), (0,), (0, 1), (1,), (0, 1), (1,), (0, 1)]:
        loss(model(x), *which).backward()
    result = rewire.verify(model, (x,), lambda outputs: loss(outputs, 0, 1))
    assert result.ok, result


class Dense(nn.Module):
    """A class for the image, and one for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.image, self.pixels = nn.Linear(5, 3), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.image(h.mean((2, 3))), self.pixels(h)


def of_both(outputs: tuple[Tensor, Tensor]) -> Tensor:
    pixels = torch.zeros(len(outputs[1]), *outputs[1].shape[2:], dtype=torch.long)
    return loss(outputs, 0) + F.cross_entropy(outputs[1], pixels)


@pytest.mark.parametrize("rule", RULES)
def test_feedback_of_elements_and_of_channels_does_not_mix(rule: str) -> None:
    model, x = seeded(Dense), randn(4, 2, 5, 5, seed=1)
    rewire.convert(model, rule)
    with pytest.raises(rewire.RewireError, match=r"'b'.*'pixels'.*'image'.*feedback='channel'"):
        for _ in range(2):
            of_both(model(x)).backward()
    model = seeded(Dense)
    rewire.convert(model, rule, feedback="channel")
    for _ in range(4):
        of_both(model(x)).backward()
    result = rewire.verify(model, (x,), of_both)
    assert result.ok, result


class Pairs(nn.Module):
    """Both images of each pair through one trunk; a head for pairs, and one for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 2), nn.Conv2d(3, 5, 2)
        self.pair, self.each = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.b(torch.tanh(self.a(x.flatten(0, 1)))).tanh().mean((2, 3))
        one, other = h.chunk(2)
        return self.pair(one * other), self.each(h)


@pytest.mark.parametrize("feedback", ["dense", "channel"])
def test_errors_of_pairs_and_of_each_image(feedback: str) -> None:
    model, x = seeded(Pairs), randn(2, 3, 2, 5, 4, seed=1)
    plain = copy.deepcopy(model)
    rewire.convert(model, "fitted(every=1, decay=0, ridge=0.1, cap=0)", feedback=feedback, scale=0.3)
    for _ in range(3):
        loss(model(x), 0, 1).backward()
    kept: list[Tensor] = []
    plain.b.register_forward_pre_hook(lambda module, args: (args[0].retain_grad(), kept.append(args[0]))[0])
    outputs = plain(x)
    for y in outputs:
        y.retain_grad()
    loss(outputs, 0, 1).backward()
    pair, each = (y.grad.numpy() for y in outputs)
    S, R = np.zeros((5, 5)), 0.0
    for k, G in enumerate(kept[0].grad.numpy()):
        e = np.concatenate([pair[k % 3], each[k]])
        for g in [G.flatten()] if feedback == "dense" else G.reshape(3, -1).T:
            S, R = S + np.outer(e, e), R + np.outer(e, g)
    d = np.diag(S)
    fit = np.linalg.solve(S + np.diag(0.1 * d + 1e-3 * d.mean()), R)
    used = rewire.feedback(model)
    ours = np.concatenate([used["b@pair"].flatten(1), used["b@each"].flatten(1)])
    np.testing.assert_allclose(ours, fit, atol=1e-8, rtol=0)
