"""Pure functions: linear and convolution with a weight forward and another backward, for ``torch.func`` users.

Each is ``torch.nn.functional``'s operation of the same name with one more argument B, of the weight's shape.
The gradients of W and b are exact; the gradient of x uses B in place of W; B itself has none. ``torch.func.grad``,
``vjp``, ``vmap`` and their compositions apply, over any of the tensors, B included; forward-mode ``jvp`` does not.

The functions of an FA network are these with a fixed random B; Lillicrap et al. 2016, arXiv:1411.0247.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rewire import operations
from rewire.errors import RewireError
from rewire.layers.convolution import same_padding

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
]

Numbers = int | Sequence[int]


def _given(weight: Tensor | None, random: Tensor | None) -> Tensor:
    assert random is not None
    return random


def _check(x: Tensor, W: Tensor, B: Tensor) -> None:
    for name, given in (("x", x), ("W", W), ("B", B)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(given).__name__}")
    if W.shape != B.shape:
        raise RewireError(f"B must have the weight's shape {tuple(W.shape)}, not {tuple(B.shape)}")


def _numbers(value: Numbers, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def linear(x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``; the gradient of x is ``delta B``.

    Args:
        x: (*, in). W, B: (out, in). bias: (out,) or None.

    Returns:
        (*, out).
    """
    _check(x, W, B)
    return operations.linear(x, W, bias, B.detach(), _given, keep=False)


def _convolve(
    rank: int,
    x: Tensor,
    W: Tensor,
    B: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
) -> Tensor:
    _check(x, W, B)
    dilation = _numbers(dilation, rank)
    padding = padding if isinstance(padding, str) else _numbers(padding, rank)
    x, padding = same_padding(x, padding, tuple(W.shape[2:]), dilation)
    return operations.convolution(
        x,
        W,
        bias,
        B.detach(),
        _given,
        keep=False,
        stride=_numbers(stride, rank),
        padding=padding,
        dilation=dilation,
        transposed=False,
        output_padding=(0,) * rank,
        groups=groups,
    )


def conv1d(
    x: Tensor,
    W: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv1d``. x: (N, C_in, L) or (C_in, L). W, B: (C_out, C_in / groups, k)."""
    return _convolve(1, x, W, B, bias, stride, padding, dilation, groups)


def conv2d(
    x: Tensor,
    W: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d``. x: (N, C_in, H, W) or (C_in, H, W). W, B: (C_out, C_in / groups, kh, kw)."""
    return _convolve(2, x, W, B, bias, stride, padding, dilation, groups)


def conv3d(
    x: Tensor,
    W: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv3d``. x: (N, C_in, D, H, W) or without N. W, B: (C_out, C_in / groups, kd, kh, kw)."""
    return _convolve(3, x, W, B, bias, stride, padding, dilation, groups)


def _convolve_transposed(
    rank: int,
    x: Tensor,
    W: Tensor,
    B: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers,
    output_padding: Numbers,
    groups: int,
    dilation: Numbers,
) -> Tensor:
    _check(x, W, B)
    return operations.convolution(
        x,
        W,
        bias,
        B.detach(),
        _given,
        keep=False,
        stride=_numbers(stride, rank),
        padding=_numbers(padding, rank),
        dilation=_numbers(dilation, rank),
        transposed=True,
        output_padding=_numbers(output_padding, rank),
        groups=groups,
    )


def conv_transpose1d(
    x: Tensor,
    W: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """``F.conv_transpose1d``. x: (N, C_in, L) or (C_in, L). W, B: (C_in, C_out / groups, k)."""
    return _convolve_transposed(1, x, W, B, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    x: Tensor,
    W: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """``F.conv_transpose2d``. x: (N, C_in, H, W) or (C_in, H, W). W, B: (C_in, C_out / groups, kh, kw)."""
    return _convolve_transposed(2, x, W, B, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(
    x: Tensor,
    W: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """``F.conv_transpose3d``. x: (N, C_in, D, H, W) or without N. W, B: (C_in, C_out / groups, kd, kh, kw)."""
    return _convolve_transposed(3, x, W, B, bias, stride, padding, output_padding, groups, dilation)
