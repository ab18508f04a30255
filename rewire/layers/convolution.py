"""Convolutions and transposed convolutions of one to three dimensions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rewire import operations
from rewire.exchange import exchange, exchangeable
from rewire.layers.form import Form
from rewire.layers.kinds import BackwardWeight, Kind


class _Spatial(Kind):
    exchanges = True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def axis(self, dims: int) -> int:
        return 1 if dims == self.rank + 2 else 0


class Convolution(_Spatial):
    """x (N, C_in, *space), W (C_out, C_in / groups, *kernel) -> y (N, C_out, *space')."""

    title = "convolution"

    def operate(self, module: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        y: Tensor = module._conv_forward(x, weight, module.bias)
        return y

    def run(
        self,
        module: Any,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: BackwardWeight,
    ) -> Tensor:
        (x,) = (*args, *kwargs.values())
        if exchangeable():
            y: Tensor = forward(module, x)
            if not x.requires_grad or exchange(y, backward, transposed=False):
                return y
        weight = backward.stand_in(self.weight(module))
        if module.padding_mode == "zeros":
            x, padding = same_padding(x, module.padding, module.kernel_size, module.dilation)
        else:  # the padding is an operation of its own, with its own exact gradient
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * self.rank
        return operations.convolution(
            x,
            weight,
            module.bias,
            backward.random(weight),
            backward.combine,
            backward.keep,
            stride=module.stride,
            padding=padding,
            dilation=module.dilation,
            transposed=False,
            output_padding=(0,) * self.rank,
            groups=module.groups,
        )


class TransposedConvolution(_Spatial):
    """x (N, C_in, *space), W (C_in, C_out / groups, *kernel) -> y (N, C_out, *space')."""

    title = "transposed convolution"

    def form(self, module: Any) -> Form:
        return Form(tuple(self.look(module).shape), turned=True, groups=module.groups)

    def operate(self, module: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, output_size = _transposed_arguments(*args, **kwargs)
        output_padding = module._output_padding(
            x, output_size, module.stride, module.padding, module.kernel_size, self.rank, module.dilation
        )
        operation = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.rank - 1]
        y: Tensor = operation(
            x, weight, module.bias, module.stride, module.padding, output_padding, module.groups, module.dilation
        )
        return y

    def run(
        self,
        module: Any,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: BackwardWeight,
    ) -> Tensor:
        x, output_size = _transposed_arguments(*args, **kwargs)
        if exchangeable():
            y: Tensor = forward(module, x, output_size)
            if not x.requires_grad or exchange(y, backward, transposed=False):
                return y
        weight = backward.stand_in(self.weight(module))
        if module.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose")
        output_padding = module._output_padding(
            x, output_size, module.stride, module.padding, module.kernel_size, self.rank, module.dilation
        )
        return operations.convolution(
            x,
            weight,
            module.bias,
            backward.random(weight),
            backward.combine,
            backward.keep,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            transposed=True,
            output_padding=output_padding,
            groups=module.groups,
        )


def _transposed_arguments(input: Tensor, output_size: list[int] | None = None) -> tuple[Tensor, list[int] | None]:
    return input, output_size


def same_padding(
    x: Tensor, padding: str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """``"same"`` and ``"valid"`` as numbers; the odd one of an uneven ``"same"`` is padded to x, at its end."""
    if not isinstance(padding, str):
        return x, padding
    if padding == "valid":
        return x, (0,) * len(kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [side for t in reversed(total) for side in (0, t % 2)])
    return x, tuple(t // 2 for t in total)


def convolution_kinds() -> dict[type[nn.Module], Kind]:
    """PyTorch's six convolutions."""
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {
        **{cls: Convolution(rank) for rank, cls in enumerate(plain, 1)},
        **{cls: TransposedConvolution(rank) for rank, cls in enumerate(transposed, 1)},
    }
