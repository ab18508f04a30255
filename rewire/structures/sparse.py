"""Sparse B: each feature hears a few entries of the error."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewire.errors import ConversionError
from rewire.feedback import generator, standard, tensor
from rewire.structures.base import (
    Cache,
    Feedback,
    Place,
    Shape,
    Structure,
    check_distribution,
    features,
    once,
    positive_int,
)

MOST = 32  # nonzeros per column by default: the cost does not grow with a large vocabulary


@dataclass(frozen=True, repr=False)
class Sparse(Structure):
    """``e B`` with k nonzero entries in every column of B, at rows drawn without replacement.

    The nonzero entries have standard deviation s √(n/k), so that the entries of B, zeros included, have s.
    Kept are k row numbers and values for each feature, whatever n is.

    Args:
        density: k/n; k is rounded, and at least 1.
        nonzeros: k itself, at most n. Without either, k is n/100, at least 1 and at most 32.
        distribution: of the nonzero entries: normal, uniform, binary or ternary.
        per: ``"channel"`` (default) or ``"element"``.
        dtype: of the values kept; None: the layer's input's.
    """

    name: ClassVar[str] = "sparse"
    source: ClassVar[str] = "Crafton et al. 2019, arXiv:1903.02083"

    _: KW_ONLY
    density: float | None = None
    nonzeros: int | None = None
    distribution: str = "normal"
    per: str = "channel"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.density is not None and self.nonzeros is not None:
            raise ConversionError("Sparse: give density or nonzeros, not both")
        if self.nonzeros is not None:
            positive_int(self, "nonzeros", self.nonzeros)
        density = self.density
        if density is not None and (
            isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1
        ):
            raise ConversionError(f"Sparse: density is a number above 0, and 1 at most, not {density!r}")
        check_distribution(self, self.distribution)
        super().__post_init__()

    def per_column(self, n: int) -> int:
        """k for n outputs."""
        if self.nonzeros is not None:
            return min(self.nonzeros, n)
        if self.density is not None:
            return min(max(1, round(self.density * n)), n)
        return min(max(1, round(n / 100)), MOST)

    def make(self, place: Place) -> Feedback:
        return self.around(place, self.draw(place))

    @property
    def fixed(self) -> str:
        return ""

    def own_shape(self, shape: Shape) -> Shape:
        return features(shape), self.per_column(shape[0])

    def draw(self, place: Place) -> Tensor:
        """The nonzero entries, column by column."""
        columns, k = self.own_shape(place.shape)
        unit = standard((columns, k), seed=place.seed, name=place.name, distribution=self.distribution)
        return (unit * (place.scale * math.sqrt(place.shape[0] / k))).to(device=place.device, dtype=self.kept(place))

    def around(self, place: Place, own: Tensor) -> Feedback:
        n, kept = place.shape[0], self.kept(place)
        columns, k = self.own_shape(place.shape)

        def draw_rows() -> Tensor:
            drawn = distinct(n, k, columns, generator(place.seed, place.name, place.shape, f"{k} of {n}"))
            return tensor(drawn).to(place.device)

        # Values that learn come again and again, in a copy for each dtype; the rows are drawn once.
        rows = place.shared((self.name, "rows", place.name, place.shape, k), draw_rows)
        lanes = place.shared((self.name, kept), lambda: Lanes(kept))
        return Gathered(lanes, rows, own.to(device=place.device, dtype=kept), place.shape)

    def size(self, shape: Shape, itemsize: int) -> int:
        return features(shape) * self.per_column(shape[0]) * (4 + self.itemsize(itemsize))


def distinct(
    n: int, k: int, columns: int, draw: np.random.Generator
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """(columns, k) int32: in each row k different numbers below n, all choices equally likely.

    Floyd's algorithm, for all columns at once: the j-th number is drawn below n - k + j + 1, and if it is there
    already, the largest possible number is taken, which cannot be.
    """
    chosen = np.empty((columns, k), dtype=np.int32)
    for j in range(k):
        last = n - k + j
        number = draw.integers(0, last + 1, columns, dtype=np.int32)
        taken = (chosen[:, :j] == number[:, None]).any(1)
        chosen[:, j] = np.where(taken, np.int32(last), number)
    return chosen


class Lanes:
    """e laid out in memory with each of its n features in one piece, of the same shape."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, signal: Tensor, axis: int) -> Tensor:
        return signal.to(self.dtype).movedim(axis, 0).contiguous().movedim(0, axis)


class Gathered(Feedback):
    """Row numbers and values of one layer's B, (features, k) each."""

    def __init__(self, lanes: Lanes, rows: Tensor, values: Tensor, shape: Shape) -> None:
        self.lanes = lanes
        self.rows = rows
        self.values = values
        self.shape = shape
        self.dtype = values.dtype
        self.width = shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, self.values

    def of(self, *tensors: Tensor) -> Feedback:
        made = copy(self)
        made.rows, made.values = tensors
        made.dtype = made.values.dtype
        made.lanes = Lanes(made.dtype)
        return made

    @property
    def own(self) -> Tensor:
        return self.values

    def as_matrix(self, own: Tensor) -> Tensor:
        rows = self.rows.to(own.device).t().long()
        return own.new_zeros(self.width, len(own)).scatter_(0, rows, own.t())

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.gather(0, self.rows.to(matrix.device).t().long()).t()

    def mask(self) -> Tensor:
        return self.as_matrix(torch.ones(self.rows.shape, dtype=torch.bool, device=self.rows.device))

    def prepare(self, signal: Tensor, axis: int, cache: Cache) -> Tensor:
        # A gather of whole lanes is many times faster than one of single numbers: the copy pays off, once per pass.
        return once(cache, self.lanes, signal, lambda e: self.lanes(e, axis))

    def __call__(self, rows: Tensor) -> Tensor:
        lanes = rows.t().contiguous()
        if torch._C._are_functorch_transforms_active():  # embedding_bag has no batching rule
            picked = lanes.index_select(0, self.rows.flatten()).reshape(*self.rows.shape, -1)
            return (picked * self.values.unsqueeze(-1)).sum(1).t()
        out: Tensor = F.embedding_bag(self.rows, lanes, per_sample_weights=self.values, mode="sum")
        return out.t().contiguous()

    def dense(self) -> Tensor:
        return self.as_matrix(self.values).reshape(self.shape)
