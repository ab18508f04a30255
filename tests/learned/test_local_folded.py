"""kp, ldfa and pfa where a layer's rows are more than samples, or a layer is called twice.

The reference is plain autograd on an unconverted copy, whose layer is run twice: with W on an input that gets no
gradient, and with B on one that does. What feedback learns is written out, row by row, over several steps of SGD with
momentum and weight decay.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewire

from ..plain import randn, seeded
from .test_folded import CASES, CLASSES, Case, N, positions

LR, MOMENTUM, DECAY = 0.2, 0.9, 0.03
RULES = ["kp", "ldfa(rank=3, rate=0.3)", "ldfa(rank=2, align=False)", "pfa(expand=2)", "pfa(expand=1, orthogonal=True)"]


class Reference:
    """The plain copy, and what its layer keeps."""

    def __init__(self, model: nn.Module, case: Case, rule: str) -> None:
        self.plain = copy.deepcopy(model)
        self.layer = self.plain.get_submodule(case.name)
        self.rate = 0.3 if "rate=0.3" in rule else 0.1
        self.trained = "" if "align=False" in rule else {"kp": "B", "ldf": "Q", "pfa": "R"}[rule[:3].rstrip("(")]
        self.kept: dict[str, np.ndarray] = {}
        self.velocity: dict[str, np.ndarray] = {}
        self.deltas: list[np.ndarray] = []
        self.layer.forward = self.run

    @property
    def B(self) -> Tensor:
        k = self.kept
        M = k["B"] if "B" in k else (k["Q"] @ k["P"]).T if "P" in k else k["A"] @ k["R"]
        return torch.from_numpy(M.reshape(self.layer.weight.shape))

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias) if isinstance(self.layer, nn.Conv2d) else F.linear(x, weight, bias)

    def run(self, x: Tensor) -> Tensor:
        fed = self.operation(x, self.B, None)
        y = self.operation(x.detach(), self.layer.weight, self.layer.bias) + (fed - fed.detach())
        y.register_hook(lambda delta: self.deltas.append(delta.numpy().copy()))
        return y

    def step(self, x: Tensor, y: Tensor) -> None:
        self.plain.zero_grad()
        self.deltas = []
        F.cross_entropy(self.plain(x), y).backward()
        k, dW = self.kept, self.layer.weight.grad.flatten(1).numpy()
        gradient = {"B": lambda: dW.reshape(k["B"].shape), "Q": lambda: (k["P"] @ dW).T, "R": lambda: k["A"].T @ dW}
        if self.trained:
            k[self.trained] = self.updated(self.trained, k[self.trained], gradient[self.trained]())
        for name, p in self.plain.named_parameters():
            with torch.no_grad():
                p.copy_(torch.from_numpy(self.updated(name, p.detach().numpy().copy(), p.grad.numpy())))
        if "P" in k:
            P, PC, power = k["P"], np.zeros(k["P"].shape), 0.0
            for delta in self.deltas:
                for image in delta if delta.ndim == 4 else delta.reshape(-1, delta.shape[-1]):
                    for row in positions(image):
                        PC += np.outer(P @ row, row)
                        power += row @ row
            PC /= power
            k["P"] = P + self.rate * (PC - PC @ P.T @ P)

    def updated(self, name: str, value: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self.velocity[name] = MOMENTUM * self.velocity.get(name, 0.0) + gradient + DECAY * value
        return value - LR * self.velocity[name]


@pytest.mark.parametrize("name", [name for name in CASES if name != "picked"])
@pytest.mark.parametrize("rule", RULES)
def test_training(rule: str, name: str) -> None:
    case = CASES[name]
    model = seeded(case.make)
    ours = Reference(model, case, rule)
    rewire.convert(model, "bp", layers={case.name: rule})
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    tag = f"{case.name}.rewire_"
    ours.kept = {k.removeprefix(tag): t.numpy().copy() for k, t in model.state_dict().items() if k.startswith(tag)}
    start = copy.deepcopy(ours.kept)
    for step in range(4):
        x = randn(*case.shape, seed=step)
        y = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        ours.step(x, y)
        assert len(ours.deltas) == (2 if name == "twice" else 1)
        state = model.state_dict()
        for parameter, value in ours.plain.named_parameters():
            torch.testing.assert_close(state[parameter], value.detach(), atol=1e-8, rtol=0)
        for what, expected in ours.kept.items():
            np.testing.assert_allclose(state[tag + what], expected, atol=1e-8, rtol=0)
        torch.testing.assert_close(rewire.feedback(model)[case.name], ours.B, atol=1e-8, rtol=0)
    learned = {what for what, value in ours.kept.items() if not np.allclose(value, start[what])}
    assert learned == {"kp": {"B"}, "pfa": {"R"}}.get(rule[:3].rstrip("("), {"P", "Q"} if ours.trained else {"P"})
    x, y = randn(*case.shape, seed=9), torch.arange(N)
    result = rewire.verify(model, x, lambda out: F.cross_entropy(out, y))
    assert result.ok, result
