"""Linear and convolution with one weight forward and another backward: the autograd nodes of local rules.

Forward is PyTorch's own operation. Backward, given delta at the output:

- the weight and bias gradients are exact, ``delta x^T`` and ``sum delta``;
- the input's gradient is the operation's transpose with B in place of W.

For convolutions ``aten.convolution_backward`` gives all three in one call, with every stride, padding,
dilation, group and transposed case: the weight handed to it matters for the input's gradient alone.

Each Function exists twice: written once in the form that ``torch.func`` transforms need
(``setup_context``), and derived from it in the form whose call costs a third in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rewire.edges import eager

# (W as kept for backward or None, R or None) -> B
Combine = Callable[[Tensor | None, Tensor | None], Tensor]

# (W or None, R or None) -> (x -> f(x, B))
Mirrored = Callable[[Tensor | None, Tensor | None], Callable[[Tensor], Tensor]]

_aten = torch.ops.aten


class _Linear(Function):
    """x (*, in), W (out, in), b (out) or None, R (out, in) or None -> y (*, out)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, random: Tensor | None, combine: Combine, keep: bool
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        # For inputs of three and more dimensions PyTorch returns a view, which in-place operations reject.
        return y.detach() if x.dim() > 2 else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, random, ctx.combine, keep = inputs
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x and keep else None, random)

    @staticmethod
    def backward(ctx: Any, delta: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = dw = db = None
        if delta is not None:
            x, weight, random = ctx.saved_tensors
            rows = delta if delta.dim() == 2 else delta.reshape(-1, delta.shape[-1])
            if needs_x:
                dx = rows @ ctx.combine(weight, random)
                if delta.dim() != 2:
                    dx = dx.reshape(*delta.shape[:-1], dx.shape[-1])
            if needs_weight:
                dw = rows.t() @ (x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
            if needs_bias:
                db = rows.sum(0)
        return dx, dw, db, None, None, None


class _Convolution(Function):
    """x (N, C_in, *space), W, b, R -> y, with the arguments of ``aten.convolution``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        random: Tensor | None,
        combine: Combine,
        keep: bool,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        y: Tensor = _aten.convolution(x, weight, bias, *geometry)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, random, ctx.combine, keep, ctx.geometry = inputs
        needs_x = ctx.needs_input_grad[0]
        ctx.set_materialize_grads(False)
        # The kernel wants a weight for its shape even where only the bias has a gradient.
        kept = weight if keep or random is None or not needs_x else None
        ctx.save_for_backward(x, kept, random)
        ctx.keep = keep
        ctx.bias_size = None if bias is None else list(bias.shape)

    @staticmethod
    def backward(ctx: Any, delta: Tensor | None) -> tuple[Tensor | None, ...]:
        if delta is None:
            return (None,) * 7
        needs = list(ctx.needs_input_grad[:3])
        x, weight, random = ctx.saved_tensors
        backward_weight = ctx.combine(weight, random) if needs[0] else weight
        dx, dw, db = _aten.convolution_backward(delta, x, backward_weight, ctx.bias_size, *ctx.geometry, needs)
        return dx, dw, db, None, None, None, None


class _Mirror(Function):
    """y = f(x.detach(), W), x -> y; backward: delta goes on to y, and to x by f with another weight.

    For any f that is linear in x. ``make(W or None, R or None)`` gives x -> f(x, B).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, weight: Tensor, random: Tensor | None, make: Mirrored, keep: bool) -> Tensor:
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, weight, random, ctx.make, keep = inputs
        ctx.like = (x.shape, x.dtype, x.device)
        ctx.save_for_backward(weight if keep else None, random)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.like
        dx = None
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():  # f is linear in x: any x has the same derivative
                x = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
                y = ctx.make(*ctx.saved_tensors)(x)
                (dx,) = torch.autograd.grad(y, x, delta.to(y.dtype))
        return delta, dx, None, None, None, None


mirror: Callable[..., Tensor] = _Mirror.apply


def _joined(function: type[Function]) -> type[Function]:
    """The same Function with forward and setup_context in one: cheaper to call, deaf to transforms."""
    split: Any = function

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = split.forward(*inputs)
        split.setup_context(ctx, inputs, output)
        return output

    body = {
        "forward": staticmethod(forward),
        "setup_context": Function.setup_context,
        "generate_vmap_rule": False,
    }
    return type(function.__name__.lstrip("_"), (function,), body)


_linear: Callable[..., Tensor] = _Linear.apply
_eager_linear = eager(_joined(_Linear))
_convolution: Callable[..., Tensor] = _Convolution.apply
_eager_convolution = eager(_joined(_Convolution))


def transforming() -> bool:
    """Whether a ``torch.func`` transform is active."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, random: Tensor | None, combine: Combine, keep: bool = True
) -> Tensor:
    """``F.linear(x, weight, bias)`` whose input gradient is ``delta @ combine(weight, random)``.

    Args:
        random: handed to ``combine`` in the backward.
        combine: (W, R) -> B, called once per backward and only if x needs a gradient.
        keep: whether ``combine`` reads W; otherwise W is not kept and arrives as None.
    """
    x, weight, bias = _as_autocast(x, weight, bias)
    function = _linear if transforming() else _eager_linear
    return function(x, weight, bias, _like(random, weight), combine, keep)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    random: Tensor | None,
    combine: Combine,
    keep: bool = True,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """``aten.convolution`` whose input gradient uses ``combine(weight, random)`` in place of the weight.

    x may lack the batch dimension, as for ``F.conv2d``. Other arguments as for :func:`linear`.
    """
    x, weight, bias = _as_autocast(x, weight, bias)
    batched = x.dim() == weight.dim()
    geometry = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
    function = _convolution if transforming() else _eager_convolution
    y = function(x if batched else x.unsqueeze(0), weight, bias, _like(random, weight), combine, keep, geometry)
    return y if batched else y.squeeze(0)


def _like(random: Tensor | None, weight: Tensor) -> Tensor | None:
    return random if random is None or random.dtype == weight.dtype else random.to(weight.dtype)


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The casts autocast makes for a matrix product or convolution, made where autograd can see them."""
    if not torch._C._is_any_autocast_enabled():
        return x, weight, bias
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
