"""Convolutions that hand nothing back to their input, as all under direct rules: the weight's gradient by itself.

On a CPU PyTorch leaves both gradients of a convolution to oneDNN. Where only the weight's is wanted there is a choice,
and for some shapes oneDNN's kernel is not the fastest (``python benchmarks/weight_gradients.py`` measures it):

- A kernel of one pixel is a matrix, and its gradient a product, of each sample or of all at once.
- A 3×3 kernel for each channel over a map of one or two rows: with rows of zeros behind, another of its kernels runs.
- Many channels, and a map smaller than the kernel: a product of δ with the patches of x.

The gradient is the same but for the order of its sums. Everything else runs as the layer itself would have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from rewire.edges import eager
from rewire.layers.kinds import Forward

# Not annotated in PyTorch.
_conv2d_weight: Callable[..., Tensor] = torch.nn.grad.conv2d_weight  # type: ignore[attr-defined]
_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled

Pair = tuple[int, int]
# (δ (N, O, H', W'), x (N, C, H, W), shape of W, stride, padding) -> gradient of W
WeightGradient = Callable[[Tensor, Tensor, torch.Size, Pair, Pair], Tensor]

MANY = 2**17  # pairs of an input and an output channel
FEW = 16  # places of a map


def by_sample(delta: Tensor, x: Tensor, shape: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """Of one pixel: Σ over samples of δ xᵀ. Its products together are no larger than x or δ: min(O, C) ≤ H W."""
    return torch.bmm(delta.flatten(2), x.flatten(2).mT).sum(0).view(shape)


def at_once(delta: Tensor, x: Tensor, shape: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """Of one pixel: δ xᵀ over samples and places at once."""
    return (delta.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).mT).view(shape)


def with_rows_behind(delta: Tensor, x: Tensor, shape: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """A 3×3 kernel for each channel: rows of zeros in δ, and in x where only those would meet them, add nothing."""
    more = (0, 0, 0, 3 - x.shape[2])
    made: Tensor = _conv2d_weight(F.pad(x, more), shape, F.pad(delta, more), stride, padding, 1, shape[0])
    return made


def by_patches(delta: Tensor, x: Tensor, shape: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """Σ over places and samples of δ and the patch of x under the kernel there."""
    (up, left), (high, wide) = padding, shape[2:]
    patches = F.pad(x, (left, left, up, up)).unfold(2, high, stride[0]).unfold(3, wide, stride[1])
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, shape[1:].numel())
    return (delta.transpose(0, 1).flatten(1) @ patches).view(shape)


def choose(module: nn.Conv2d, x: Tensor) -> WeightGradient | None:
    """What makes the gradient of ``module``'s weight faster than PyTorch's own kernel, for this x; None: nothing does.

    Only for what was measured: single precision on a CPU, the usual order of dimensions, outside of autocast.
    """
    high, wide = module.kernel_size
    pointwise = high == wide == 1
    if not pointwise and x.size(-1) > 2 * wide and x.size(-2) > 2:
        return None  # most convolutions, before anything else is asked
    if type(x) is not Tensor or x.dim() != 4 or x.dtype is not torch.float32 or not x.is_cpu or _autocast():
        return None
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros" or not x.is_contiguous() or x.numel() == 0:
        return None
    (_, inputs, rows, columns), outputs = x.shape, module.out_channels
    once = module.stride == (1, 1)
    if pointwise:
        if not once or padding != (0, 0) or module.groups != 1:
            return None
        places = rows * columns
        return by_sample if min(inputs, outputs) <= places else at_once if places <= FEW else None
    if module.dilation != (1, 1):
        return None
    if module.groups == 1:
        places = 1
        for size, k, p, s in zip((rows, columns), (high, wide), padding, module.stride, strict=True):
            places *= (size + 2 * p - k) // s + 1
        return by_patches if places < high * wide and inputs * outputs >= MANY else None
    each = module.groups == inputs == outputs and high == wide == 3 and once and padding == (1, 1)
    return with_rows_behind if each and rows < 3 else None


class _Convolution(Function):
    """x (no gradient), W, b -> the convolution; backward: the gradients of W and b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradient: WeightGradient, module: nn.Conv2d
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.gradient = gradient
        ctx.how = weight.shape, module.stride, module.padding
        return F.conv2d(x, weight, bias, module.stride, module.padding, 1, module.groups)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, bias, *_ = ctx.needs_input_grad
        (x,) = ctx.saved_tensors
        gradient: WeightGradient = ctx.gradient
        return (
            None,
            gradient(delta, x, *ctx.how) if weight else None,
            delta.sum((0, 2, 3)) if bias else None,
            None,
            None,
        )


_linear_forward = nn.Linear.forward


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """``nn.Linear.forward`` without its two detours by ``nn.Module.__getattr__``, which small layers feel."""
    own = module._parameters
    if nn.Linear.forward is _linear_forward and "weight" in own and "bias" in own:
        return F.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
    y: Tensor = nn.Linear.forward(module, x)  # type: ignore[arg-type]
    return y


def forward_for(base: type[nn.Module]) -> Forward | None:
    """The forward of layers of class ``base`` for inputs that need no gradient; None: their own is as good."""
    if base.forward is _linear_forward:
        return None if hasattr(base, "weight") or hasattr(base, "bias") else linear  # a parametrization's
    if not issubclass(base, nn.Conv2d):
        return None
    if base.forward is not nn.Conv2d.forward or base._conv_forward is not nn.Conv2d._conv_forward:
        return None

    def forward(module: nn.Conv2d, x: Tensor) -> Tensor:
        gradient = choose(module, x)
        if gradient is None:
            return nn.Conv2d.forward(module, x)
        weight = module.weight  # once: a parametrization may do something each time
        if type(weight) not in (Tensor, nn.Parameter):
            y: Tensor = module._conv_forward(x, weight, module.bias)
            return y
        return _convolution(x, weight, module.bias, gradient, module)

    return forward


FAST = "_rewired_fast"  # where a converted layer's class has what :func:`forward_for` gave


def fastest(module: nn.Module, forward: Forward) -> Forward:
    """What runs in place of ``forward`` for inputs that need no gradient: the same on every way through a call.

    What activation checkpointing runs again in the backward may go another way than before (a pass is over by then, or
    feedback that learns has its place), and has to save what the first run saved.
    """
    cls: Any = type(module)
    fast: Forward | None = getattr(cls, FAST, None)
    return forward if fast is None or forward is not cls._rewired_from.forward else fast


_convolution = eager(_Convolution)
