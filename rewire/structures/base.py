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

from rewire.errors import ConversionError, PassError, nearest
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

    # -- for compiled graphs, which are given tensors --------------------------------------------

    def tensors(self) -> tuple[Tensor, ...] | None:
        """What it multiplies with; None: it cannot be part of a compiled graph."""
        return None

    def of(self, *tensors: Tensor) -> Feedback:
        """The same B, with others in place of :meth:`tensors`: in a graph, what stands for them there."""
        raise NotImplementedError

    # -- for rules that learn; what each layer keeps for itself is called own ----------------------

    @property
    def own(self) -> Tensor | None:
        """What :meth:`Structure.around` was given; None where nothing of it can learn."""
        return None

    def shown(self, signal: Tensor, axis: int, cache: Cache) -> Tensor:
        """What a rule that learns is shown in place of the signal: like ``signal``, with w features; w is n by default.

        The arguments are those of :meth:`prepare`.
        """
        return signal

    def as_matrix(self, own: Tensor) -> Tensor:
        """(w, features): what the rule knows as B. :meth:`shown` times this is what is handed back."""
        return own.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`as_matrix`, or what is nearest to that: ``own``, perhaps in another shape."""
        return matrix

    def mask(self) -> Tensor | None:
        """(w, features) bool: where the matrix has entries that may learn; None: everywhere."""
        return None


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

    @property
    def said(self) -> dict[str, Any]:
        """Options whose values are not the usual ones."""
        return {f.name: value for f in fields(cast(Any, self)) if (value := getattr(self, f.name)) != f.default}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.said.items())})"

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

    @property
    def fixed(self) -> str:
        """Why rules that learn cannot change what is kept of B, in words that follow its name; "" if they can.

        "" will do for a structure whose :meth:`make` returns plain tensors. One whose B is a :class:`Feedback` has to
        say what of it learns: :meth:`own_shape`, :meth:`draw`, :meth:`around`, and what :class:`Feedback` asks for.
        """
        return "does not say that what it keeps can learn (Structure.fixed)"

    @property
    def joint(self) -> Hashable | None:
        """What tells which B are learned as one matrix, M (:mod:`rewire.agree`); None: each layer's by itself.

        What learns of such a B is (features, n): the layer's columns of M, which are the first ones, transposed. B has
        them times the layer's scale.
        """
        return None

    def own_shape(self, shape: Shape) -> Shape:
        """Shape of what learns of a B of ``shape``."""
        return shape

    def heard(self, shape: Shape) -> int:
        """How many features of e a rule that learns is shown for a B of ``shape``."""
        return shape[0]

    def draw(self, place: Place) -> Tensor:
        """What learns, as it is before anything is learned."""
        made = self.make(place)
        if isinstance(made, Feedback):
            raise PassError(f"{self!r} makes a {type(made).__name__}, and does not say what of it learns")
        return made

    def around(self, place: Place, own: Tensor) -> Tensor | Feedback:
        """B, of which ``own`` has been learned. ``own`` is kept, and seen to change in place, if its dtype allows."""
        return own.to(device=place.device, dtype=self.kept(place))

    def size(self, shape: Shape, itemsize: int) -> int:
        """Bytes kept for one B of ``shape`` alone.

        Args:
            itemsize: bytes of one number of the layer's input.
        """
        raise NotImplementedError

    def common_size(self, shapes: Iterable[Shape], itemsize: int) -> int:
        """Bytes kept once for all B of ``shapes``, those of one output layer."""
        return 0

    def learned_size(self, shape: Shape, itemsize: int) -> int:
        """:meth:`size` where B learns. Of what is :attr:`joint`, nothing is kept in common then."""
        return self.size(shape, itemsize)


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
