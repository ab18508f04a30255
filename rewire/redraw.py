"""R drawn anew in every pass, as part of a compiled graph.

Two things have to run whenever the graph does: the count of draws, in the forward, and the drawing, in the backward.
Each is one operation, into which no compiler looks. The count is a tensor that the graph is given and changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewire.feedback import quick_normal


@dataclass(frozen=True)
class Operations:
    """The two of them.

    Attributes:
        count: (counter,) -> number of the next draw. Both int64, (), on the CPU. Adds one to the counter.
        draw: (number, shape, dtype, device, seed, name, scale, magnitude) -> R of :func:`rewire.feedback.quick_normal`.
    """

    count: Callable[..., Tensor]
    draw: Callable[..., Tensor]


@functools.cache
def operations() -> Operations:
    """Made when first asked for: a library of operations takes milliseconds."""

    def count(counter: Tensor) -> Tensor:
        counter += 1
        return counter.clone()

    def draw(
        number: Tensor,
        shape: list[int],
        dtype: torch.dtype,
        device: torch.device,
        seed: str,
        name: str,
        scale: float,
        magnitude: bool,
    ) -> Tensor:
        drawn = quick_normal(shape, seed=int(seed), name=name, draw=int(number), scale=scale, magnitude=magnitude)
        return drawn.to(device=device, dtype=dtype)

    define: Any = torch.library.custom_op
    counted = define("rewire::count", count, mutates_args=("counter",), schema="(Tensor(a!) counter) -> Tensor")
    counted.register_fake(torch.empty_like)
    made = define(
        "rewire::draw",
        draw,
        mutates_args=(),
        schema="(Tensor number, int[] shape, ScalarType dtype, Device device, str seed, str name, float scale, "
        "bool magnitude) -> Tensor",
    )
    made.register_fake(lambda _, shape, dtype, device, *rest: torch.empty(shape, dtype=dtype, device=device))
    return Operations(counted, made)
