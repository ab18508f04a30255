"""How much a training step computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

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
    forward, backward = (FlopCounterMode(display=False, custom_mapping=_COUNTS) for _ in range(2))
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


def _convolution_backward(
    delta: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Each of both gradients takes what the forward took; torch's own count forgets groups in the weight's."""
    return conv_flop_count(list(x), list(weight), list(delta), transposed) * (wanted[0] + wanted[1])


_COUNTS = {torch.ops.aten.convolution_backward: _convolution_backward}
