"""A few numbers that tell one random feedback from another, whatever dtype and device it is used in.

Feedback is not stored but made again from its seed. Should that give something else (another seed, a renamed layer,
another generator in a later NumPy), these numbers differ.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewire.feedback import quick_normal, standard_normal
from rewire.structures import Feedback, Place, Structure

Fingerprint = list[float]
_NUMBERS = 4
_COLUMNS, _ROWS = 64, 4096
# Of numbers of size 1. Generators and factorisations may round differently from one machine to another.
_TOLERANCE = 1e-2


def local(seed: int, name: str, shape: Sequence[int], *, redraw: bool) -> Fingerprint:
    """Of R of a local rule, or of its first redraw."""
    shape = small(shape)
    drawn = (
        quick_normal(shape, seed=seed, name=name, draw=1, scale=1.0)
        if redraw
        else standard_normal(shape, seed=seed, name=name)
    )
    return numbers(drawn)


def direct(
    structure: Structure, seed: int, stream: str, suffix: str, shape: Sequence[int], common: dict[Hashable, Any]
) -> Fingerprint:
    """Of B of a direct rule at unit scale.

    Args:
        stream: random stream of the layer input, for its output layer.
        suffix: random stream of what all layers share.
        common: what layers share, by key.
    """
    place = Place(seed, stream, suffix, small(shape), 1.0, torch.float32, torch.device("cpu"), common)
    made = structure.make(place)
    return numbers(made.dense() if isinstance(made, Feedback) else made)


def small(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` itself, or one of so few numbers that drawing them takes no time."""
    rows, *rest = (int(n) for n in shape)
    while math.prod(rest) > _COLUMNS:
        largest = max(range(len(rest)), key=rest.__getitem__)
        rest[largest] = -(-rest[largest] // 2)
    return min(rows, _ROWS), *rest


def numbers(t: Tensor) -> Fingerprint:
    """Weighted sums of all entries, each of the entries' own size."""
    flat = t.detach().double().cpu().flatten()
    place = torch.arange(1, flat.numel() + 1, dtype=torch.float64)
    weights = (torch.cos(place * (k + math.sqrt(2))) for k in range(_NUMBERS))
    return [round(float(flat @ w) * math.sqrt(2 / max(flat.numel(), 1)), 5) for w in weights]


def same(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same feedback."""
    return len(a) == len(b) and all(abs(x - y) <= _TOLERANCE for x, y in zip(a, b, strict=True))
