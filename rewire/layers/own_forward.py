"""Subclasses of known layers with a forward of their own, such as weight-standardised convolutions.

What such a forward computes around the operation stays as it is, with its own gradient. The operation
itself, recognised by a weight argument of the layer's weight shape, gets the other backward: whatever
weight the forward made for it is the W that rules see.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from rewire import operations
from rewire.errors import PassError
from rewire.exchange import exchange_within, exchangeable
from rewire.layers.convolution import same_padding
from rewire.layers.kinds import BackwardWeight, Kind


class OwnForward(Kind):
    """A layer like ``base``, run through its own forward."""

    def __init__(self, base: Kind) -> None:
        self.base = base
        self.title = f"{base.title}, forward of its own"

    def axis(self, dims: int) -> int:
        return self.base.axis(dims)

    def run(
        self,
        module: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: BackwardWeight,
    ) -> Any:
        shape = self.look(module).shape
        own = self.own(module)
        others = [p for p in module.parameters() if p is not own]
        if not exchangeable():
            with _Replace(shape, others, backward) as replaced:
                y = forward(module, *args, **kwargs)
            count = replaced.count
        else:
            y = forward(module, *args, **kwargs)
            inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.requires_grad]
            outputs = [t for t in tree_flatten(y)[0] if isinstance(t, Tensor) and t.requires_grad]
            if not inputs:
                return y
            count = exchange_within(outputs, inputs, shape, own, others, backward, self.base.transposed)
        if not count:
            raise PassError(
                f"the forward of {type(module).__name__} never used a weight of shape "
                f"{tuple(shape)} in a linear operation or convolution, so a local rule has "
                "nothing to replace: use a direct rule or 'bp' for it, layers={...}"
            )
        return y


class _Replace(TorchFunctionMode):
    """While active, linear operations and convolutions with a weight of ``shape`` get the other backward.

    One that is a parameter in its own right (an adapter's, a gate's) is not what the rule is about.
    """

    def __init__(self, shape: torch.Size, others: list[nn.Parameter], backward: BackwardWeight) -> None:
        super().__init__()
        self.shape = shape
        self.others = others
        self.backward = backward
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = OPERATIONS.get(func)
        if operation is not None:
            signature, run = operation
            bound = signature.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            weight = bound.arguments["weight"]
            if weight.shape == self.shape and not any(weight is other for other in self.others):
                self.count += 1
                self.backward.note(weight)
                return run(backward=self.backward, **bound.arguments)
        return func(*args, **(kwargs or {}))


def _numbers(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backward: BackwardWeight) -> Tensor:
    return operations.linear(input, weight, bias, backward.random(weight), backward.combine, backward.keep)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    backward: BackwardWeight,
) -> Tensor:
    rank = weight.dim() - 2
    dilation = _numbers(dilation, rank)
    x, padding = same_padding(
        input,
        padding if isinstance(padding, str) else _numbers(padding, rank),
        tuple(weight.shape[2:]),
        dilation,
    )
    return operations.convolution(
        x,
        weight,
        bias,
        backward.random(weight),
        backward.combine,
        backward.keep,
        stride=_numbers(stride, rank),
        padding=padding,
        dilation=dilation,
        transposed=False,
        output_padding=(0,) * rank,
        groups=groups,
    )


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    backward: BackwardWeight,
) -> Tensor:
    rank = weight.dim() - 2
    return operations.convolution(
        input,
        weight,
        bias,
        backward.random(weight),
        backward.combine,
        backward.keep,
        stride=_numbers(stride, rank),
        padding=_numbers(padding, rank),
        dilation=_numbers(dilation, rank),
        transposed=True,
        output_padding=_numbers(output_padding, rank),
        groups=groups,
    )


def _signature(run: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(run)
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "backward"])


# Operation -> its signature, and how to run it with another backward.
OPERATIONS: dict[Any, tuple[inspect.Signature, Callable[..., Any]]] = {
    F.linear: (_signature(_linear), _linear),
    **{f: (_signature(_convolution), _convolution) for f in (F.conv1d, F.conv2d, F.conv3d)},
    **{f: (_signature(_transposed), _transposed) for f in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)},
}
