"""B that is kept nowhere: made again from its seed in every backward, a tile at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rewire.feedback import chunks, standard, tensor
from rewire.structures.base import Feedback, Place, Shape, Structure, check_distribution, features


@dataclass(frozen=True, repr=False)
class Seeded(Structure):
    """``e B`` with the very B of :class:`Dense` (same seed, distribution and ``per``), of which nothing is kept.

    In every backward B is drawn again, one tile of 2²⁰ numbers after the other, so memory is that of one tile (and
    of its copy, in another dtype than float32 or on another device). Time is that of drawing B: worth it where B
    does not fit, not otherwise.

    Args:
        distribution: normal, uniform, binary or ternary.
        per: ``"element"`` (default) or ``"channel"``.
        dtype: of a tile; None: the layer's input's.
    """

    name: ClassVar[str] = "seeded"

    distribution: str = "normal"
    _: KW_ONLY
    per: str = "element"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_distribution(self, self.distribution)
        super().__post_init__()

    def make(self, place: Place) -> Feedback:
        return Tiles(self.distribution, self.kept(place), place)

    @property
    def fixed(self) -> str:
        return "keeps nothing: its B is drawn anew in every backward, and would be as if nothing had been learned"

    def size(self, shape: Shape, itemsize: int) -> int:
        return 0


class Tiles(Feedback):
    """What a B is made from.

    Attributes:
        inside: of a compiled graph, to which drawing it is one operation.
    """

    def __init__(self, distribution: str, dtype: torch.dtype, place: Place) -> None:
        self.distribution = distribution
        self.seed, self.name, self.shape, self.scale = place.seed, place.name, place.shape, place.scale
        self.dtype, self.device = dtype, place.device
        self.width = place.shape[0]
        self.inside = False

    def _tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(start, entries) of B in C order, flattened."""
        # A graph of the backward itself (create_graph) keeps every tile; otherwise one is enough.
        for start, numbers in chunks(
            self.shape,
            seed=self.seed,
            name=self.name,
            distribution=self.distribution,
            reuse=not torch.is_grad_enabled(),
        ):
            yield start, tensor(numbers).mul_(self.scale).to(device=self.device, dtype=self.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.inside:
            drawn = operation()
            return drawn(rows, list(self.shape), str(self.seed), self.name, self.distribution, self.scale)
        columns = features(self.shape)
        out = rows.new_zeros(rows.shape[0], columns)
        batched = torch._C._are_functorch_transforms_active()  # addmm_ has no batching rule
        for start, tile in self._tiles():
            for row, column, block in blocks(start, tile, columns):
                part = out if block.shape[1] == columns else out.narrow(1, column, block.shape[1])
                heard = rows.narrow(1, row, block.shape[0])
                if batched:
                    part.add_(heard @ block)
                else:
                    part.addmm_(heard, block)
        return out

    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def of(self, *tensors: Tensor) -> Feedback:
        made = copy(self)
        made.inside = True
        return made

    def dense(self) -> Tensor:
        unit = standard(self.shape, seed=self.seed, name=self.name, distribution=self.distribution)
        return (unit * self.scale).to(device=self.device, dtype=self.dtype)


@functools.cache
def operation() -> Callable[..., Tensor]:
    """:meth:`Tiles.__call__` as an operation of PyTorch's, so that a graph can have it."""

    def drawn(rows: Tensor, shape: list[int], seed: str, name: str, distribution: str, scale: float) -> Tensor:
        """rows: (M, n) -> (M, features)."""
        place = Place(int(seed), name, "", tuple(shape), scale, rows.dtype, rows.device, {})
        return Tiles(distribution, rows.dtype, place)(rows)

    made: Any = torch.library.custom_op(
        "rewire::seeded",
        drawn,
        mutates_args=(),
        schema="(Tensor rows, int[] shape, str seed, str name, str distribution, float scale) -> Tensor",
    )
    made.register_fake(lambda rows, shape, *_: rows.new_empty(rows.shape[0], features(tuple(shape))))
    called: Callable[..., Tensor] = made
    return called


def blocks(start: int, tile: Tensor, columns: int) -> Iterator[tuple[int, int, Tensor]]:
    """Entries ``start``, ``start + 1``, ... of a matrix in C order as (row, column, block of the matrix).

    The rest of the row that ``start`` is in, all whole rows at once, and the beginning of the next row.
    """
    done = 0
    while done < len(tile):
        row, column = divmod(start + done, columns)
        left = len(tile) - done
        rows, wide = (left // columns, columns) if column == 0 and left >= columns else (1, min(left, columns - column))
        yield row, column, tile[done : done + rows * wide].view(rows, wide)
        done += rows * wide
