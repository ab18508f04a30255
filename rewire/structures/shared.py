"""One matrix for the whole model: every layer's B is a slice of it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from copy import copy
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rewire.feedback import drawn, tensor
from rewire.structures.base import Cache, Feedback, Place, Shape, Structure, check_distribution, features


@dataclass(frozen=True, repr=False)
class Shared(Structure):
    """``s (e M)`` cut to the layer's first ``features`` columns; M is common to all layers.

    M has unit entries and as many columns as the widest layer needs. Its columns do not depend on how many
    there are, so B does not depend on which other layers there are. ``e M`` is computed once per pass; a
    layer costs one multiplication for each of its numbers. Layers are handed the same feedback, except
    for their scale.

    Under rules that learn M learns, and stays one matrix (:mod:`rewire.agree`). Each layer then keeps its own columns
    of it and multiplies by them, as dense feedback does.

    Args:
        distribution: normal, uniform, binary or ternary entries of M.
        per: ``"channel"`` (default) or ``"element"``.
        dtype: of M; None: the layer's input's.
    """

    name: ClassVar[str] = "shared"
    source: ClassVar[str] = "Launay et al. 2020, arXiv:2006.12878"

    distribution: str = "normal"
    _: KW_ONLY
    per: str = "channel"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_distribution(self, self.distribution)
        super().__post_init__()

    def make(self, place: Place) -> Feedback:
        n, kept = place.shape[0], self.kept(place)
        matrix = place.shared(
            (self.name, n, self.distribution, kept),
            lambda: Matrix(place.seed, f"shared{place.output}", n, self.distribution, kept, place.device),
        )
        matrix.widen(features(place.shape))
        return Slice(matrix, place.shape, place.scale)

    @property
    def fixed(self) -> str:
        return ""

    @property
    def joint(self) -> Hashable:
        return self.name, self.distribution

    def own_shape(self, shape: Shape) -> Shape:
        return features(shape), shape[0]

    def draw(self, place: Place) -> Tensor:
        """The layer's columns of M, transposed, without its scale."""
        alone = replace(place, common={})  # nothing is kept in common
        made = self.make(alone)
        assert isinstance(made, Slice)
        return made.matrix.columns

    def around(self, place: Place, own: Tensor) -> Feedback:
        return Columns(own.to(device=place.device, dtype=self.kept(place)), place.shape, place.scale)

    def size(self, shape: Shape, itemsize: int) -> int:
        return 0

    def common_size(self, shapes: Iterable[Shape], itemsize: int) -> int:
        widest: dict[int, int] = {}
        for shape in shapes:
            widest[shape[0]] = max(widest.get(shape[0], 0), features(shape))
        return sum(n * columns for n, columns in widest.items()) * self.itemsize(itemsize)

    def learned_size(self, shape: Shape, itemsize: int) -> int:
        return math.prod(shape) * self.itemsize(itemsize)


class Matrix:
    """M, kept transposed, (columns, n), so that a slice of it is contiguous and more columns can follow.

    Attributes:
        columns: the tensor; replaced by a wider one when a wider layer comes, never changed.
    """

    def __init__(
        self, seed: int, name: str, n: int, distribution: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.seed, self.name, self.n, self.distribution = seed, name, n, distribution
        self.columns = torch.empty(0, n, dtype=dtype, device=device)

    def widen(self, columns: int) -> None:
        """Have at least so many columns."""
        if columns > len(self.columns):
            unit = drawn(
                (self.n,), seed=self.seed, name=self.name, distribution=self.distribution, total=columns * self.n
            )
            self.columns = tensor(unit).reshape(columns, self.n).to(self.columns)

    def __call__(self, signal: Tensor, axis: int) -> Tensor:
        signal = signal.to(self.columns.dtype)
        if axis in (-1, signal.dim() - 1):
            return signal @ self.columns.t()
        return (signal.movedim(axis, -1) @ self.columns.t()).movedim(-1, axis)


class Slice(Feedback):
    """The first columns of M, times the layer's scale."""

    def __init__(self, matrix: Matrix, shape: Shape, scale: float) -> None:
        self.matrix = matrix
        self.shape = shape
        self.scale = scale
        self.dtype = matrix.columns.dtype
        self.width = features(shape)

    def prepare(self, signal: Tensor, axis: int, cache: Cache) -> Tensor:
        key = (id(self.matrix), id(signal))
        found = cache.get(key)
        # In the first pass M may have grown since another layer asked.
        if found is None or found[0] is not signal or found[1].shape[axis] < self.width:
            found = cache[key] = (signal, self.matrix(signal, axis))
        return found[1].narrow(axis, 0, self.width)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix.columns,)

    def of(self, *tensors: Tensor) -> Feedback:
        made, matrix = copy(self), copy(self.matrix)
        (matrix.columns,) = tensors
        made.matrix, made.dtype = matrix, matrix.columns.dtype
        return made

    def __call__(self, rows: Tensor) -> Tensor:
        return rows * self.scale

    def dense(self) -> Tensor:
        return (self.matrix.columns[: self.width].t() * self.scale).reshape(self.shape)


class Columns(Feedback):
    """The layer's own columns of an M that learns, (features, n), times the layer's scale."""

    def __init__(self, columns: Tensor, shape: Shape, scale: float) -> None:
        self.columns = columns
        self.shape = shape
        self.scale = scale
        self.dtype = columns.dtype
        self.width = shape[0]

    @property
    def own(self) -> Tensor:
        return self.columns

    def as_matrix(self, own: Tensor) -> Tensor:
        return own.t() * self.scale

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t() / self.scale

    def __call__(self, rows: Tensor) -> Tensor:
        return rows @ self.columns.t() * self.scale

    def dense(self) -> Tensor:
        return self.as_matrix(self.columns).reshape(self.shape)
