"""How a tensor compares to the one it should be: a few numbers, for which neither has to be kept.

Passes have thousands of such pairs. Every one is looked at when both are there, in pieces, since a copy in float64
of the largest activation may be more than all the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 20  # numbers that are copied to float64 at a time


@dataclass(frozen=True)
class Match:
    """Of ``got`` and ``wanted``.

    Attributes:
        gap: largest difference; nan if the shapes differ.
        most: largest magnitude in ``got``.
        size: largest magnitude in ``wanted``.
        dtype: of ``wanted``.
        dot: their scalar product, in float64.
        squares: that of each with itself.
    """

    gap: float
    most: float
    size: float
    dtype: torch.dtype
    dot: float
    squares: tuple[float, float]

    @classmethod
    def of(cls, got: Tensor, wanted: Tensor) -> Match:
        """Compare two tensors."""
        if got.shape != wanted.shape:
            return cls(math.nan, largest(got), largest(wanted), wanted.dtype, 0.0, (0.0, 0.0))
        dot, ours, theirs = 0.0, 0.0, 0.0
        for a, b in _pieces(got, wanted):
            a, b = a.double(), b.double()
            dot, ours, theirs = dot + float(a @ b), ours + float(a @ a), theirs + float(b @ b)
        return cls(_gap(got, wanted), largest(got), largest(wanted), wanted.dtype, dot, (ours, theirs))

    @property
    def nothing(self) -> bool:
        """Whether ``got`` is all zeros."""
        return self.most == 0

    def close(self, coarsest: torch.dtype | None = None) -> bool:
        """:func:`close`, of what was compared."""
        return _near(self.gap, self.size, self.dtype, coarsest)


def all_close(matches: Sequence[Match | None], coarsest: torch.dtype | None = None) -> bool:
    """Whether all are close, and none is unknown."""
    return all(match is not None and match.close(coarsest) for match in matches)


def cosine(matches: Sequence[Match | None]) -> float | None:
    """Between two lists of tensors taken as one vector each; None if either is zero or not known."""
    known = [match for match in matches if match is not None]
    if len(known) < len(matches):
        return None
    dot = sum(match.dot for match in known)
    norms = [sum(match.squares[i] for match in known) ** 0.5 for i in (0, 1)]
    return dot / (norms[0] * norms[1]) if all(n > 0 for n in norms) else None


def matched(got: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> list[Match | None]:
    """Pair by pair; None where either is not known."""
    return [None if a is None or b is None else Match.of(a, b) for a, b in zip(got, wanted, strict=True)]


def close(got: Tensor, wanted: Tensor, least: float = 0.0) -> bool:
    """Equal to a few hundred units in the last place of the largest entry (few, in formats of two bytes).

    Args:
        least: what the largest entry is taken to be at least.
    """
    return got.shape == wanted.shape and _near(_gap(got, wanted), max(largest(wanted), least), wanted.dtype)


def alike(a: Tensor | None, b: Tensor | None, least: float = 0.0) -> bool:
    """:func:`close`, where nothing is as good as zeros."""
    if a is None and b is None:
        return True
    if a is not None and b is not None:
        return close(a, b, least)
    either = b if a is None else a
    assert either is not None
    return (
        close(torch.zeros_like(either), either, least) if a is None else close(either, torch.zeros_like(either), least)
    )


def _near(gap: float, size: float, dtype: torch.dtype, coarsest: torch.dtype | None = None) -> bool:
    dtypes = (dtype,) if coarsest is None else (dtype, coarsest)
    tolerance = max((2e3 if kind.itemsize > 2 else 8) * torch.finfo(kind).eps for kind in dtypes)
    return math.isfinite(gap) and gap <= tolerance * size


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference: nan or inf if either tensor has a number that is not finite."""
    return _most([_norm(x - y) for x, y in _pieces(a, b)])


def largest(t: Tensor) -> float:
    """The largest magnitude; nan if there is one."""
    return _most([_norm(t.detach())])


def _norm(t: Tensor) -> Tensor:
    if not t.numel():
        return torch.zeros(())
    if t.is_complex():
        return t.abs().max()
    low, high = torch.aminmax(t)  # one pass and no copy; isfinite(), abs() and the norm take several times as long
    return torch.maximum(-low, high)


def _most(norms: list[Tensor]) -> float:
    return float(torch.stack(norms).max()) if norms else 0.0  # in torch, because max() of Python loses a nan


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(torch.split(a.detach().reshape(-1), PIECE), torch.split(b.detach().reshape(-1), PIECE), strict=True)
