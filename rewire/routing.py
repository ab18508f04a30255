"""The way of the output error to a layer's input: from e of one shape to a tensor of x's shape.

Both e and x are read as (batch, grid, features): ``grid`` is empty for a plain feature vector, holds
positions for token sequences and space for images. What happens, in this order:

=================================  ==================  =============================================
x                                  e                   feedback
=================================  ==================  =============================================
same batch and grid                                    e B at every position
same batch, with a grid            no grid             convolutions: a value for every element
                                                       (``dense``) or channel (``channel``);
                                                       otherwise e B, the same at every position
same batch, another grid           with a grid         e B, resampled (area) to x's own grid
same batch, no grid                with a grid         mean over e's grid, then e B
sequence first (T, N, F)           (N, ...)            as above, with the first two dimensions swapped
any                                (T, N, n)           the same, with e's first two dimensions swapped
N·T frames, each a row of x        (N, T, ...)         e B of its own frame
(N, F), or N images                (N·T, ...)          mean over a sample's T rows, then e B: a guess
k·N windows, patches, choices      (N, ...)            each of the k parts gets its sample's e B
no batch dimension                 any                 mean over the batch, then e B
any other number of images         any                 the same: a guess
=================================  ==================  =============================================

Anything else is a :class:`~rewire.errors.RoutingError`.

Shapes alone cannot tell everything: with as many positions as samples, (T, N, F) and (N, T, F) look the same.
Then what was asked for decides (``DFA(layout="sequence_first")``), then what other passes have shown, and
else a guess is made that :attr:`Route.ambiguous` puts into words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewire.errors import RoutingError

Shape = tuple[int, ...]
Reading = tuple[bool, bool]
"""Whether x, and whether e, has its sequence dimension before its batch dimension."""
LAYOUTS = ("batch_first", "sequence_first")

_BATCH_FIRST: Reading = (False, False)


@dataclass(frozen=True)
class Route:
    """How one shape of e reaches one shape of x.

    Attributes:
        feedback_shape: shape of B: ``(n, *x without batch)`` when every element has a value of its own,
            ``(n, features)`` when positions share it.
        before: e -> (M, n).
        after: (M, features) -> x's shape, contiguous.
        kind: one word for tables.
        ambiguous: the guess that was made, in words, where the shapes fit more than one reading.
        common: that guess is about e, and the same for all layers below.
        reading: what the shapes show clearly about the order of dimensions; None if nothing.
        plain: e and x are both (N, features), so that ``before`` and ``after`` do nothing.
        repeats: e is (N, n), and x (N, positions..., features) is handed back the same e B at all positions.
        runs: each row that ``before`` gives belongs to a run of rows of x, all runs of the same length, once rows of x
            that are ``behind`` one another have been put in order.
        behind: (k, N) where x's rows are k times N, each of the k having a part of all N samples; None: nothing to do.
    """

    feedback_shape: Shape
    before: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], Tensor]
    kind: str
    ambiguous: str | None = None
    common: bool = False
    reading: Reading | None = None
    plain: bool = False
    repeats: bool = False
    runs: bool = True
    behind: tuple[int, int] | None = None

    def __call__(self, signal: Tensor, feedback: Tensor) -> Tensor:
        """Feed ``signal`` (of e's shape) back through ``feedback``; the result has x's shape and B's dtype."""
        if signal.dtype != feedback.dtype:
            signal = signal.to(feedback.dtype)
        if self.plain:  # the hot path of small networks, where every small operation counts
            return torch.mm(signal, feedback)
        if feedback.dim() > 2:
            feedback = feedback.flatten(1)
        return self.after(torch.mm(self.before(signal), feedback))

    def through(self, signal: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """The same with ``project`` in place of a multiplication with B: (M, n) -> (M, features)."""
        return self.after(project(self.before(signal)))


@dataclass(frozen=True)
class _Side:
    """A shape read as batch, grid and features; ``first`` says whether features come right after the batch."""

    shape: Shape
    batch: int | None
    grid: Shape
    features: int
    first: bool

    @staticmethod
    def read(shape: Shape, axis: int) -> _Side:
        if axis == -1:
            lead = shape[:-1]
            return _Side(shape, lead[0] if lead else None, lead[1:], shape[-1], first=False)
        # axis 1: (N, C, *space); axis 0: (C, *space), one sample without a batch dimension
        return _Side(shape, shape[0] if axis == 1 else None, shape[axis + 1 :], shape[axis], first=True)

    @property
    def size(self) -> int:
        """Number of samples; one without a batch dimension."""
        return 1 if self.batch is None else self.batch

    @property
    def lead(self) -> Shape:
        """Batch and grid."""
        return self.grid if self.batch is None else (self.batch, *self.grid)

    def swapped(self, swap: bool) -> _Side:
        """With the first two dimensions exchanged, if ``swap``."""
        return _Side.read((self.shape[1], self.shape[0], *self.shape[2:]), -1) if swap else self

    def rows(self, t: Tensor) -> Tensor:
        """(batch, grid..., features), features last."""
        if self.first:
            t = t.movedim(0 if self.batch is None else 1, -1)
        return t if self.batch is not None else t.unsqueeze(0)

    def back(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`rows`; strided as it comes, so that whoever asked can lay it out as x is."""
        if self.first:
            t = t.movedim(-1, 1)
        return t if t.shape == self.shape else t.reshape(self.shape)


def plan(
    x_shape: Shape,
    x_axis: int,
    e_shape: Shape,
    e_axis: int,
    *,
    structure: str = "dense",
    layout: str | None = None,
    e_layout: str | None = None,
    seen: Reading | None = None,
    stacked: int = 1,
) -> Route:
    """Decide the way from an e of ``e_shape`` to an x of ``x_shape``.

    Args:
        x_axis, e_axis: where the features are: -1, 1 (after the batch) or 0 (no batch dimension).
        structure: ``"dense"`` or ``"channel"`` (one value per channel of a convolution's input).
        layout: ``"sequence_first"`` or ``"batch_first"`` where x's order of dimensions is known.
        e_layout: the same for e.
        seen: a reading that other shapes have shown; decides where several fit.
        stacked: batches that lie one behind the other in x, for one of e.

    Raises:
        RoutingError: when the shapes have no defined way; the message names both.
    """
    if structure not in ("dense", "channel"):
        raise ValueError(f"structure is 'dense' or 'channel', not {structure!r}")
    if not x_shape or not e_shape:
        raise RoutingError(
            f"no defined way from the output error of shape {tuple(e_shape)} to an input of shape {tuple(x_shape)}: "
            "a single number has no features"
        )
    x, e = _Side.read(tuple(x_shape), x_axis), _Side.read(tuple(e_shape), e_axis)
    reading, ambiguous, clear = _read_order(x, e, layout, e_layout, seen)
    swap_x, swap_e = reading
    route = _batch_first(x.swapped(swap_x), e.swapped(swap_e), structure, stacked, e_layout or layout)
    if swap_x or swap_e:
        inner = route
        route = replace(
            route,
            before=(lambda t: inner.before(t.transpose(0, 1))) if swap_e else inner.before,
            after=(lambda t: inner.after(t).transpose(0, 1).contiguous()) if swap_x else inner.after,
            runs=inner.runs and not (swap_x and inner.behind),
            behind=(x.shape[0], x.shape[1]) if swap_x else inner.behind,
        )
    if route.ambiguous is not None and layout == "batch_first":
        route = replace(route, ambiguous=None)  # said to be so
    repeats = route.kind == "broadcast" and not (swap_x or swap_e or x.first) and len(e.shape) == 2
    return replace(route, ambiguous=ambiguous or route.ambiguous, reading=reading if clear else None, repeats=repeats)


def route_to(x_shape: Shape, x_axis: int, e_shape: Shape, e_axis: int, *, hint: str | None, **options: Any) -> Route:
    """:func:`plan`, with x's layout as ``hint`` says if nobody asked for one, as long as that leads anywhere."""
    if hint is not None and options.get("layout") is None:
        with suppress(RoutingError):
            return plan(x_shape, x_axis, e_shape, e_axis, **{**options, "layout": hint})
    return plan(x_shape, x_axis, e_shape, e_axis, **options)


def _batch_first(x: _Side, e: _Side, structure: str, stacked: int, flat: str | None) -> Route:
    """The way, once the batch is known to come first in both (where it is there).

    Args:
        flat: the layout of what was flattened into e's rows, if that is known.
    """
    n = e.features
    if _positional(x, e):
        plain = len(x.shape) == len(e.shape) == 2
        return Route((n, x.features), lambda t: t.reshape(-1, n), lambda t: t.reshape(x.shape), "position", plain=plain)
    if x.size == e.size:
        return _same_batch(x, e, n, structure)
    if x.size == 1:
        return _no_batch(x, e, n)
    folded = _frames(x.size, e)
    if folded is not None:
        inner = _batch_first(x, folded, structure, stacked, flat)
        return replace(inner, before=lambda t: inner.before(e.rows(t).reshape(folded.shape)), plain=False)
    if e.size and x.size % e.size == 0:
        parts = x.size // e.size
        per_sample = _Side((e.size, *x.shape[1:]), e.size, x.grid, x.features, x.first)
        one = _same_batch(per_sample, _Side((e.size, n), e.size, (), n, False), n, structure)
        return Route(
            one.feedback_shape,
            lambda t: _mean_over_grid(e.rows(t)),
            lambda t: _repeated(one.after(t), parts, stacked),
            "parts",
            behind=(stacked, x.size // stacked) if stacked > 1 and parts % stacked == 0 else None,
        )
    if x.size and e.size and e.size % x.size == 0 and (x.first or not x.grid):
        return _rows_of_samples(x, e, n, structure, flat)
    problem = f"{x.size} rows are neither the batch of {e.size} nor a multiple of it"
    if x.grid and e.size:  # a table the model makes for itself, or images with a number of regions each
        guess = f"taken to have no batch dimension, because {problem}"
        return replace(_no_batch(x, e, n), ambiguous=guess, common=x.first)
    raise RoutingError(
        f"no defined way from the output error of shape {e.shape} to an input of shape {x.shape}: {problem}"
    )


def _rows_of_samples(x: _Side, e: _Side, n: int, structure: str, flat: str | None) -> Route:
    """The way from T errors of each sample, flattened: one sample after another unless ``flat`` is sequence first."""

    sequence_first = flat == LAYOUTS[1]

    def mean(t: Tensor) -> Tensor:
        rows = _mean_over_grid(e.rows(t))
        return rows.reshape(-1, x.size, n).mean(0) if sequence_first else rows.reshape(x.size, -1, n).mean(1)

    guess = f"taken to be {x.size} samples, whose errors are {e.size // x.size} rows each, one sample after another"
    return replace(
        _same_batch(x, _Side((x.size, n), x.size, (), n, False), n, structure),
        before=mean,
        ambiguous=guess if flat is None else None,
        common=True,
    )


def _repeated(t: Tensor, parts: int, stacked: int) -> Tensor:
    """Each row of t ``parts`` times: next to itself, but for ``stacked`` copies of it all, one behind the other."""
    if stacked == 1 or parts % stacked:
        return t.repeat_interleave(parts, 0)
    return t.repeat_interleave(parts // stacked, 0).repeat(stacked, *(1,) * (t.dim() - 1))


def _positional(x: _Side, e: _Side) -> bool:
    """Whether the rows of x and e are the same positions in the same order, flattened or not."""
    if x.first or e.first:
        return False
    if x.lead == e.lead:
        return True
    if len(x.lead) == 2 and x.size == 1 < e.size and len(e.lead) == 1:
        return False  # (1, N, F) is a sequence of one step, or has no batch dimension
    flattened = len(x.lead) <= 1 or len(e.lead) <= 1 or (x.size == e.size and len(x.grid) != len(e.grid))
    return flattened and math.prod(x.lead) == math.prod(e.lead)


def _frames(rows: int, e: _Side) -> _Side | None:
    """e with as much of its grid folded into the batch as x has in its rows; None if nothing is."""
    lead = e.lead if e.batch is not None else ()
    for folded in range(len(lead), 1, -1):
        size = math.prod(lead[:folded])
        if size == rows or (folded == len(lead) and size and rows % size == 0):
            rest = lead[folded:]
            return _Side((size, *rest, e.features), size, rest, e.features, first=False)
    return None


def _mean_over_grid(rows: Tensor) -> Tensor:
    """(N, grid..., n) -> (N, n)."""
    return rows.flatten(1, -2).mean(1) if rows.dim() > 2 else rows


def _same_batch(x: _Side, e: _Side, n: int, structure: str) -> Route:
    if not e.grid or not x.grid:
        # One error per sample.
        if x.grid and x.first and structure == "dense":
            shape = x.shape if x.batch is None else x.shape[1:]
            return Route((n, *shape), lambda t: _mean_over_grid(e.rows(t)), lambda t: t.reshape(x.shape), "dense")

        def spread(t: Tensor) -> Tensor:
            rows = t.reshape(t.shape[0], *(1,) * len(x.grid), x.features)
            return x.back(rows.expand(-1, *x.grid, -1))

        kind = "channel" if x.first and x.grid else "sample" if not x.grid else "broadcast"
        return Route((n, x.features), lambda t: _mean_over_grid(e.rows(t)), spread, kind)

    target = _matching_grid(x.grid, e.grid)
    if target is None:
        flat = _Side((0, n), 0, (), n, False)
        one = _same_batch(x, flat, n, "channel")
        return Route(one.feedback_shape, lambda t: _mean_over_grid(e.rows(t)), one.after, "broadcast")
    if target == e.grid:
        return Route(
            (n, x.features),
            lambda t: e.rows(t).reshape(-1, n),
            lambda t: x.back(t.reshape(-1, *x.grid, x.features)),
            "position",
        )
    # Projection and resampling commute: project on the smaller of the two grids.
    if math.prod(e.grid) <= math.prod(target):
        return Route(
            (n, x.features),
            lambda t: e.rows(t).reshape(-1, n),
            lambda t: x.back(_resample(t.reshape(-1, *e.grid, x.features), target).reshape(-1, *x.grid, x.features)),
            "resampled",
            runs=False,
        )
    return Route(
        (n, x.features),
        lambda t: _resample(e.rows(t), target).reshape(-1, n),
        lambda t: x.back(t.reshape(-1, *x.grid, x.features)),
        "resampled",
    )


def _matching_grid(x: Shape, e: Shape) -> Shape | None:
    """The grid e is resampled to so that it covers ``x``: x itself, or x's flattened form taken apart.

    Tokens flattened from an image, (T,), match an e with space (H', W') when T = h·w with h : w = H' : W'.
    None if there is no such correspondence.
    """
    if len(x) == len(e):
        return x if len(x) <= 3 else None
    if len(x) == 1 and len(e) in (2, 3):
        ratio = (x[0] / math.prod(e)) ** (1 / len(e))
        sides = tuple(round(side * ratio) for side in e)
        return sides if math.prod(sides) == x[0] else None
    return None


def _resample(rows: Tensor, grid: Shape) -> Tensor:
    """(N, grid'..., F) -> (N, *grid, F): means when it shrinks, repeats when it grows."""
    return F.interpolate(rows.movedim(-1, 1), size=grid, mode="area").movedim(1, -1)


def _no_batch(x: _Side, e: _Side, n: int) -> Route:
    def spread(t: Tensor) -> Tensor:
        rows = t.reshape(1, *(1,) * len(x.grid), x.features).expand(1 if x.batch is None else x.batch, *x.grid, -1)
        return x.back(rows)

    return Route((n, x.features), lambda t: e.rows(t).reshape(-1, n).mean(0, keepdim=True), spread, "no batch")


# -- the order of dimensions ---------------------------------------------------------------------------


def _read_order(
    x: _Side, e: _Side, layout: str | None, e_layout: str | None, seen: Reading | None
) -> tuple[Reading, str | None, bool]:
    """(reading, the guess in words if it is one, whether the shapes show it clearly)."""
    can_x = not x.first and len(x.lead) >= 2
    can_e = not e.first and len(e.lead) == 2
    if not can_x and not can_e:
        return _BATCH_FIRST, None, False
    differ = layout is not None and e_layout is not None and layout != e_layout
    if _positional(x, e):
        return _order_of_positions(x, e, differ, layout, e_layout, seen)

    if not can_x and 1 not in e.lead and e.size and x.size % math.prod(e.lead) == 0:
        return (False, differ), None, False  # frames: flattened in one order or the other

    options: list[Reading] = [(a, b) for a, b in _READINGS if a <= can_x and b <= can_e]
    fit = {(a, b): _fit(x.swapped(a).size, e.swapped(b).size) for a, b in options}
    if layout is not None or e_layout is not None:
        may_x = [a for a in (False, True) if not can_x or layout in (None, LAYOUTS[a])]
        may_e = [b for b in (False, True) if not can_e or e_layout in (None, LAYOUTS[b])]
        options = [(a, b) for a, b in options if fit[a, b] and a in may_x and b in may_e]
    elif len(x.lead) > 2 and (fit[_BATCH_FIRST] or x.size == 1):
        options = [(a, b) for a, b in options if not a]  # images with channels last

    fitting = [r for r in options if fit[r] == 2]
    if (True, False) in fitting and (False, True) in fitting and can_x:
        fitting.remove((False, True))  # transposed is transposed
    exact = bool(fitting)
    if exact and _BATCH_FIRST in options and fit[_BATCH_FIRST] == 1:
        fitting.append(_BATCH_FIRST)
    elif not exact:
        fitting = [r for r in options if fit[r] and (r in (_BATCH_FIRST, seen) or layout == "sequence_first")]
    if not fitting:
        return _BATCH_FIRST, None, False
    no_batch = fitting[0] == (True, False) and x.size == 1 and layout is None
    if seen is not None and (seen in fitting or (no_batch and seen == _BATCH_FIRST)):
        return seen, None, False
    reading = fitting[0]
    samples = e.swapped(reading[1]).size
    others = [_in_words(r, can_x, can_e) for r in fitting[1:]] + ["no batch dimension"] * no_batch
    if samples > 1 and others:
        return reading, _guess(_in_words(reading, can_x, can_e), others), False
    return reading, None, exact and samples > 1


def _order_of_positions(
    x: _Side, e: _Side, differ: bool, layout: str | None, e_layout: str | None, seen: Reading | None
) -> tuple[Reading, str | None, bool]:
    """The same where x and e have a row for every position: in the same order, or transposed."""
    two = (len(x.lead) == 2, len(e.lead) == 2)
    if differ and two[0] != two[1]:
        return two, None, False  # one of them flattened in the other order
    if all(two) and x.lead[0] == x.lead[1] > 1:
        if differ or (layout is None and seen is not None and seen[0] != seen[1]):
            return (True, False), None, False
        if seen is None and (layout is None or e_layout is None):
            other = "one of the two sequence first and the other batch first"
            return _BATCH_FIRST, _guess("both having the same order of dimensions", [other]), False
    return _BATCH_FIRST, None, False


_READINGS: tuple[Reading, ...] = (_BATCH_FIRST, (True, True), (True, False), (False, True))


def _fit(rows: int, samples: int) -> int:
    """2: the batch; 1: parts of its samples; 0: neither."""
    return 2 if rows == samples else 1 if samples and rows % samples == 0 else 0


def _guess(reading: str, others: Sequence[str]) -> str:
    return f"read as {reading}, but {' or '.join(others)} fits as well"


def _in_words(reading: Reading, can_x: bool, can_e: bool) -> str:
    swaps: Sequence[bool] = [swap for swap, can in zip(reading, (can_x, can_e), strict=True) if can]
    if len(set(swaps)) == 1:
        return "sequence first" if swaps[0] else "batch first"
    return "sequence first with an error batch first" if reading[0] else "batch first with an error sequence first"
