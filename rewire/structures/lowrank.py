"""B of low rank: the error is squeezed to r numbers once per pass, and only they go to the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewire.feedback import standard
from rewire.structures.base import Cache, Feedback, Place, Shape, Structure, check_distribution, once, positive_int


@dataclass(frozen=True, repr=False)
class LowRank(Structure):
    """``(e P) Q``: P of shape (n, r) is common to all layers, Q of shape (r, features) is each layer's own.

    ``e P`` is computed once per pass, so a layer costs r multiplications for each of its numbers instead of n.
    P has unit entries and Q entries of standard deviation s/√r, drawn for their own shapes, which gives the entries
    of P Q the standard deviation s. They are uncorrelated but not independent.

    Where n ≤ r there is nothing to squeeze: B is then :class:`Dense` with the same distribution.

    Args:
        rank: r.
        distribution: of the entries of P and of Q: normal, uniform, binary or ternary.
        per: ``"channel"`` (default) or ``"element"``.
        dtype: of the tensors kept; None: the layer's input's.
    """

    name: ClassVar[str] = "lowrank"

    rank: int = 32
    _: KW_ONLY
    distribution: str = "normal"
    per: str = "channel"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        positive_int(self, "rank", self.rank)
        check_distribution(self, self.distribution)
        super().__post_init__()

    def make(self, place: Place) -> Tensor | Feedback:
        return self.around(place, self.draw(place))

    @property
    def fixed(self) -> str:
        return ""

    def heard(self, shape: Shape) -> int:
        return min(shape[0], self.rank)

    def own_shape(self, shape: Shape) -> Shape:
        return self.heard(shape), *shape[1:]

    def draw(self, place: Place) -> Tensor:
        """Q; where there is nothing to squeeze, B."""
        shape = self.own_shape(place.shape)
        squeezed = place.scale / math.sqrt(self.rank) if place.shape[0] > self.rank else place.scale
        unit = standard(shape, seed=place.seed, name=place.name, distribution=self.distribution)
        return (unit * squeezed).to(device=place.device, dtype=self.kept(place))

    def around(self, place: Place, own: Tensor) -> Tensor | Feedback:
        n, rank, kept = place.shape[0], self.rank, self.kept(place)
        own = own.to(device=place.device, dtype=kept)
        if n <= rank:
            return own

        def make_p() -> Squeeze:
            unit = standard((n, rank), seed=place.seed, name=f"lowrank{place.output}", distribution=self.distribution)
            return Squeeze(unit.to(device=place.device, dtype=kept))

        return Product(place.shared((self.name, n, rank, self.distribution, kept), make_p), own)

    def size(self, shape: Shape, itemsize: int) -> int:
        return math.prod(self.own_shape(shape)) * self.itemsize(itemsize)

    def common_size(self, shapes: Iterable[Shape], itemsize: int) -> int:
        wide = {shape[0] for shape in shapes if shape[0] > self.rank}
        return sum(wide) * self.rank * self.itemsize(itemsize)


class Squeeze:
    """``e P``."""

    def __init__(self, p: Tensor) -> None:
        self.p = p

    def __call__(self, signal: Tensor, axis: int) -> Tensor:
        signal = signal.to(self.p.dtype)
        if axis in (-1, signal.dim() - 1):
            return signal @ self.p
        return (signal.movedim(axis, -1) @ self.p).movedim(-1, axis)


class Product(Feedback):
    """One layer's Q, behind the common P."""

    def __init__(self, squeeze: Squeeze, q: Tensor) -> None:
        self.squeeze = squeeze
        self.q = q
        self.dtype = q.dtype
        self.width = q.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.squeeze.p, self.q

    def of(self, *tensors: Tensor) -> Feedback:
        made = copy(self)
        p, made.q = tensors
        made.squeeze, made.dtype = Squeeze(p), p.dtype
        return made

    @property
    def own(self) -> Tensor:
        return self.q

    def prepare(self, signal: Tensor, axis: int, cache: Cache) -> Tensor:
        return once(cache, self.squeeze, signal, lambda e: self.squeeze(e, axis))

    shown = prepare  # Q learns from e P

    def __call__(self, rows: Tensor) -> Tensor:
        return rows @ self.q.flatten(1)

    def dense(self) -> Tensor:
        product = self.squeeze.p.double() @ self.q.flatten(1).double()
        return product.to(self.dtype).reshape(-1, *self.q.shape[1:])
