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
k·N windows, patches, choices      (N, ...)            each of the k parts gets its sample's e B
no batch dimension                 any                 mean over the batch, then e B
=================================  ==================  =============================================

Anything else is a :class:`~rewire.errors.RoutingError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rewire.errors import RoutingError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """How one shape of e reaches one shape of x.

    Attributes:
        feedback_shape: shape of B: ``(n, *x without batch)`` when every element has a value of its own,
            ``(n, features)`` when positions share it.
        before: e -> (M, n).
        after: (M, features) -> x's shape, contiguous.
        kind: one word for tables.
        layout: what was learned about the order of dimensions, if anything.
    """

    feedback_shape: Shape
    before: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], Tensor]
    kind: str
    layout: str | None = None

    def __call__(self, signal: Tensor, feedback: Tensor) -> Tensor:
        """Feed ``signal`` (of e's shape) back through ``feedback``; the result has x's shape, B's dtype."""
        rows = self.before(signal).to(feedback.dtype)
        return self.after(rows @ feedback.flatten(1))


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

    def rows(self, t: Tensor) -> Tensor:
        """(batch, grid..., features), features last."""
        if self.first:
            t = t.movedim(0 if self.batch is None else 1, -1)
        return t if self.batch is not None else t.unsqueeze(0)

    def back(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`rows`, contiguous."""
        if self.first:
            t = t.movedim(-1, 1)
        return t.reshape(self.shape).contiguous()


def plan(
    x_shape: Shape,
    x_axis: int,
    e_shape: Shape,
    e_axis: int,
    *,
    structure: str = "dense",
    layout: str | None = None,
) -> Route:
    """Decide the way from an e of ``e_shape`` to an x of ``x_shape``.

    Args:
        x_axis, e_axis: where the features are: -1, 1 (after the batch) or 0 (no batch dimension).
        structure: ``"dense"`` or ``"channel"`` (one value per channel of a convolution's input).
        layout: ``"sequence_first"`` or ``"batch_first"`` if known, to decide shapes that fit both.

    Raises:
        RoutingError: when the shapes have no defined way; the message names both.
    """
    x, e = _Side.read(tuple(x_shape), x_axis), _Side.read(tuple(e_shape), e_axis)
    n = e.features
    batch_e = 1 if e.batch is None else e.batch
    batch_x = 1 if x.batch is None else x.batch

    if not x.first and not e.first:
        x_lead, e_lead = x.shape[:-1], e.shape[:-1]
        flattened = len(x_lead) <= 1 or len(e_lead) <= 1 or x_lead[0] == e_lead[0]
        if x_lead == e_lead or (math.prod(x_lead) == math.prod(e_lead) and flattened):
            return Route((n, x.features), lambda t: t.reshape(-1, n), lambda t: t.reshape(x.shape), "position")

    swap_x, swap_e = _sequence_first(x, e, layout)
    if swap_x or swap_e:
        inner = plan(_swap(x.shape, swap_x), x_axis, _swap(e.shape, swap_e), e_axis, structure=structure)
        return Route(
            inner.feedback_shape,
            (lambda t: inner.before(t.transpose(0, 1))) if swap_e else inner.before,
            (lambda t: inner.after(t).transpose(0, 1).contiguous()) if swap_x else inner.after,
            inner.kind,
            "sequence_first",
        )

    if batch_x == batch_e:
        return _same_batch(x, e, n, structure)
    if x.batch is not None and batch_e > 1 and batch_x == 1:
        return _no_batch(x, e, n)
    if x.batch is None and batch_e > 1:
        return _no_batch(x, e, n)
    if batch_x % batch_e == 0:
        parts = batch_x // batch_e
        per_sample = _Side((batch_e, *x.shape[1:]), batch_e, x.grid, x.features, x.first)
        one = _same_batch(per_sample, _Side((batch_e, n), batch_e, (), n, False), n, structure)
        return Route(
            one.feedback_shape,
            lambda t: _mean_over_grid(e.rows(t)),
            lambda t: one.after(t).repeat_interleave(parts, 0),
            "parts",
        )
    if len(x.grid) >= 1 and not x.first:
        # Neither the batch nor a multiple of it: a table the model makes for itself.
        return _no_batch(x, e, n)
    raise RoutingError(
        f"no defined way from the output error of shape {tuple(e_shape)} to an input of shape {tuple(x_shape)}: "
        f"{batch_x} rows are neither the batch of {batch_e} nor a multiple of it"
    )


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


def _swap(shape: Shape, swap: bool) -> Shape:
    return (shape[1], shape[0], *shape[2:]) if swap else shape


def _sequence_first(x: _Side, e: _Side, layout: str | None) -> tuple[bool, bool]:
    """Whether x, and whether e, have their sequence dimension before their batch dimension.

    Recognised by where the other's batch size stands. (T, N, F) with T a multiple of N could as well be
    windows, and with T = N batch first; then ``layout`` decides, and batch first without it.
    """
    if layout == "batch_first":
        return False, False
    x_lead = () if x.first else x.shape[:-1]
    e_lead = () if e.first else e.shape[:-1]
    if len(x_lead) >= 2 and len(e_lead) >= 2 and x_lead[1] == e_lead[1] and x_lead[0] != e_lead[0]:
        return True, True
    if len(x_lead) == 2 and len(e_lead) == 2 and x_lead == e_lead[::-1]:
        return True, False
    batch = e.batch
    if len(x_lead) >= 2 and batch is not None and len(e_lead) != 2 and x_lead[1] == batch:
        if layout == "sequence_first" or x_lead[0] % batch:
            return True, False
    if len(e_lead) == 2 and len(x_lead) == 1 and e_lead[1] == x_lead[0] and e_lead[0] != x_lead[0]:
        return False, True
    return False, False
