"""How much a training step computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rewire.preview import call


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of one training step, as :mod:`torch.utils.flop_counter` counts them.

    Matrix products, convolutions and attention count, a multiply-add as two; elementwise operations do not.
    """

    forward: int
    backward: int

    @property
    def step(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def arithmetic(model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor]) -> Arithmetic:
    """Count one forward and backward of ``model`` as it is now. Random state and ``.grad`` are as before.

    A model converted to a direct rule measures in its first passes; run those before.
    """
    kept = [(p, p.grad) for p in model.parameters()]
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    try:
        model.zero_grad()
        with torch.random.fork_rng(), torch.enable_grad():
            with forward:
                loss = loss_fn(call(model, inputs))
            run: Callable[[], None] = loss.backward
            with backward:
                run()
    finally:
        for p, grad in kept:
            p.grad = grad
    return Arithmetic(forward.get_total_flops(), backward.get_total_flops())
