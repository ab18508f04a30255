"""What a structure of feedback has to say: how B is made, what it multiplies with, what it keeps.

A direct rule hands back ``signal B`` with B of shape (n, *input without batch) or (n, features). A
:class:`Structure` is the choice a user makes (immutable, comparable, picklable; no tensors). For each layer
input it makes a B: a plain tensor, or a :class:`Feedback` that keeps less than that and multiplies all the same.

Whatever the structure, the entries of the equivalent dense B have the standard deviation ``scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from rewire.errors import ConversionError, nearest
from rewire.feedback import DISTRIBUTIONS

Shape = tuple[int, ...]
# What layers make of one signal in one pass, to be shared: (who, which signal) -> (the signal, the result).
Cache = dict[Hashable, tuple[Tensor, Tensor]]
PER = ("element", "channel")
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a B is needed.

    Attributes:
        seed: the conversion's.
        name: random stream of this layer input (and output layer, where there are several).
        output: random stream of what all layers share: "" for the first output layer.
        shape: of B, (n, ...).
        scale: standard deviation of B's entries.
        dtype: of the layer's input.
        device: of the layer's input.
        common: what layers share, by key; empty at first.
    """

    seed: int
    name: str
    output: str
    shape: Shape
    scale: float
    dtype: torch.dtype
    device: torch.device
    common: dict[Hashable, Any]

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once for all layers of the conversion with the same ``key``."""
        full = (key, self.output, self.dtype, self.device)
        if full not in self.common:
            self.common[full] = make()
        found: T = self.common[full]
        return found


class Feedback:
    """One layer input's B, in a form of its own.

    Attributes:
        dtype: a signal is cast to it first.
        width: number of features of the prepared signal: n, unless :meth:`prepare` changes it.
    """

    dtype: torch.dtype
    width: int

    def prepare(self, signal: Tensor, axis: int, cache: Cache) -> Tensor:
        """The part of the work that layers share: done once per pass, on the whole signal.

        Args:
            signal: of e's shape.
            axis: its dimension with the n features.
            cache: of this pass; see :func:`once`.

        Returns:
            A tensor like ``signal``, with ``width`` features in place of n.
        """
        return signal if signal.dtype is self.dtype else signal.to(self.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """(M, width) -> (M, features): the rest of the work."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The equivalent B, of shape (n, ...); a new tensor."""
        raise NotImplementedError


def once(cache: Cache, owner: object, signal: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(signal)``, computed once per pass for all layers that share ``owner``."""
    key = (id(owner), id(signal))
    found = cache.get(key)
    if found is None or found[0] is not signal:
        found = cache[key] = (signal, make(signal))
    return found[1]


class Structure:
    """How the feedback B of direct rules is stored and multiplied. Subclasses are frozen dataclasses.

    Attributes:
        per: at convolutions (with one error per sample): a value of B for every ``"element"`` of the input, or
            one for every ``"channel"``, the same at all positions.
        dtype: of the tensors kept; None: the dtype of the layer's input.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""

    per: str
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if self.per not in PER:
            hint = nearest(self.per, PER) if isinstance(self.per, str) else ""
            raise ConversionError(f"per is {' or '.join(map(repr, PER))}, not {self.per!r}{hint}")
        if self.dtype is not None and not self._can_keep(self.dtype):
            raise ConversionError(f"{type(self).__name__}: dtype is a floating-point type or None, not {self.dtype!r}")

    def _can_keep(self, dtype: object) -> bool:
        return isinstance(dtype, torch.dtype) and dtype.is_floating_point

    def __repr__(self) -> str:
        changed = [f for f in fields(cast(Any, self)) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def routing(self) -> str:
        """``per`` as :func:`rewire.routing.plan` calls it."""
        return "dense" if self.per == "element" else "channel"

    def kept(self, place: Place) -> torch.dtype:
        """The dtype of the tensors kept."""
        return place.dtype if self.dtype is None else self.dtype

    def itemsize(self, default: int) -> int:
        """Bytes of one number kept, where the layer's input has ``default``."""
        return default if self.dtype is None else self.dtype.itemsize

    def make(self, place: Place) -> Tensor | Feedback:
        """B for ``place``: a pure function of its seed, names, shape and scale."""
        raise NotImplementedError

    def size(self, shape: Shape, itemsize: int) -> int:
        """Bytes kept for one B of ``shape`` alone.

        Args:
            itemsize: bytes of one number of the layer's input.
        """
        raise NotImplementedError

    def common_size(self, shapes: Iterable[Shape], itemsize: int) -> int:
        """Bytes kept once for all B of ``shapes``, those of one output layer."""
        return 0


def check_distribution(owner: Structure, name: object, more: tuple[str, ...] = ()) -> None:
    """Raise unless ``name`` is a distribution of independent entries, or one of ``more``."""
    known = (*DISTRIBUTIONS, *more)
    if name not in known:
        hint = nearest(name, known) if isinstance(name, str) else ""
        raise ConversionError(
            f"{type(owner).__name__}: distribution is one of {', '.join(map(repr, known))}, not {name!r}{hint}"
        )


def positive_int(owner: Structure, what: str, value: object) -> None:
    """Raise unless ``value`` is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConversionError(f"{type(owner).__name__}: {what} is a positive int, not {value!r}")


def features(shape: Shape) -> int:
    """Number of columns of a B of ``shape``."""
    return math.prod(shape[1:])
