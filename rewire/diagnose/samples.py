"""Whose error is it? Which sample each row of a layer's input belongs to, as plain backprop shows it.

With the error of sample i multiplied by w_i, the gradient of a row that only feeds sample i is multiplied by w_i
too. So one more backward tells, without a look at any shape, which sample's feedback each row has to get. Rows
that several samples depend on (batch statistics, a table of positions) show no single factor and prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewire.diagnose.graph import Flow
from rewire.diagnose.match import PIECE
from rewire.diagnose.watch import Pass, Place, Seen

Errors = Mapping[Seen, list[Tensor | None]]


@dataclass(frozen=True)
class Factors:
    """What each row of an input was multiplied by; ``clear`` where it was multiplied by one number.

    Attributes:
        dim: the dimension of the errors that was weighted.
    """

    dim: int
    factor: Tensor
    clear: Tensor


class Samples:
    """The factors of every input in one pass.

    Args:
        seen: of plain backprop, with its graph, which is used up.
        errors: gradients at the output calls.
    """

    def __init__(self, seen: Pass, flow: Flow, errors: Errors) -> None:
        self.factors: dict[Place, list[Factors]] = {}
        self.known: dict[int, Tensor] = {}
        ends = [
            (end, e, output.state.kind.axis(e.dim()))
            for output in flow.outputs
            for end, e in zip(output.ends, errors[output], strict=True)
            if e is not None
        ]
        # (T, N, n) or (N, T, n)? Where samples do not mix, either dimension is as good.
        dims = [d for d in (0, 1) if any(_has_samples(e, axis, d) for _, e, axis in ends)]
        if not dims:
            return
        roots = [end for end, _, _ in ends]
        axes = {place: call.state.kind.axis(place.x.dim()) for call in seen for place in call.places}

        def ignore(call: Seen, index: int, gradient: Tensor | None) -> None: ...

        seen.backward(roots, [e for _, e, _ in ends], at_output=ignore)
        plain = {place: place.handed for place in axes if place.handed is not None and axes[place] != 0}
        for dim in dims:
            self.known[dim] = _factors(max(e.shape[dim] for _, e, axis in ends if _has_samples(e, axis, dim)))

            def note(place: Place, after: Tensor | None, dim: int = dim) -> None:
                before = plain.get(place) if dim != dims[-1] else plain.pop(place, None)
                if before is not None and after is not None:
                    self.factors.setdefault(place, []).append(compare(before, after, axes[place], dim))

            weights = [weighted(e, axis, dim) for _, e, axis in ends]
            seen.backward(roots, weights, last=dim == dims[-1], at_place=note, at_output=ignore)

    def disagree(
        self, place: Place, axis: int, fed: Tensor, fed_weighted: Mapping[int, Tensor], coarse: bool = False
    ) -> bool:
        """Whether rows got the feedback of other errors than their own sample's.

        Args:
            place: in the pass of plain backprop.
            axis: of the features in the input.
            fed: what is fed back.
            fed_weighted: the same with the errors weighted, by dimension.
            coarse: these went through numbers of two bytes.
        """
        verdicts: list[bool] = []
        sure = False
        for shown in self.factors.get(place, []):
            if shown.dim not in fed_weighted or not bool(shown.clear.any()):
                continue
            got = compare(fed, fed_weighted[shown.dim], axis, shown.dim, coarse)
            # What many samples share gets the mean of their errors, also where one alone used it in this pass.
            others = got.clear & ((got.factor - shown.factor).abs() > (3 if coarse else 1) * _TOLERANCE)
            # A row that several samples share may have grown by some factor too, but by none of theirs.
            single = _nearest(self.known[shown.dim].to(shown.factor), shown.factor) <= 1e-3
            if _rows(fed, axis).shape[1] == 1 and not bool(single[shown.clear].all()):
                continue  # a number is a multiple of any other: one that happens to fit shows nothing
            alive = _alive(_squares(_rows(fed, axis)))
            rows = shown.clear & single & alive
            verdicts.append(bool((rows & others).any()))
            # Grids of other sizes are made to fit: then rows get a mean of what several positions would get. One
            # position alone may be what all of another sequence was used for, or what some tokens attend to.
            most = (
                2 * int((rows & others).sum()) > int(alive.sum())
                and float(shown.factor[rows].std(correction=0)) > _TOLERANCE
            )
            sure |= most and len(self.known[shown.dim]) in place.x.shape
        return sure or (bool(verdicts) and all(verdicts))


_TOLERANCE = 1e-2  # of a factor; neighbours in a small batch are further apart than that
_GOLDEN = 0.6180339887498949


def _factors(count: int) -> Tensor:
    """A number of its own for each sample."""
    return 0.5 + (torch.arange(count, dtype=torch.float64) * _GOLDEN) % 1


def _nearest(known: Tensor, factors: Tensor) -> Tensor:
    """How far each factor is from the nearest of ``known``."""
    known = known.sort().values
    above = torch.searchsorted(known, factors).clamp(max=len(known) - 1)
    below = (above - 1).clamp(min=0)
    return torch.minimum((known[above] - factors).abs(), (known[below] - factors).abs())


def weighted(e: Tensor, axis: int, dim: int) -> Tensor:
    """``e`` with each sample multiplied by a number of its own."""
    if not _has_samples(e, axis, dim):
        return e
    factor = _factors(e.shape[dim]).to(e)
    return e * factor.reshape([-1 if d == dim else 1 for d in range(e.dim())])


def compare(before: Tensor, after: Tensor, axis: int, dim: int, coarse: bool = False) -> Factors:
    """What each row of ``before`` was multiplied by to give ``after``."""
    a, b = _rows(before.detach(), axis), _rows(after.detach(), axis)
    size, dot, rest = (torch.zeros(len(a), dtype=torch.float64, device=a.device) for _ in range(3))
    for rows, columns in _pieces(*a.shape):
        x, y = a[rows, columns].double(), b[rows, columns].double()
        size[rows] += x.square().sum(1)
        dot[rows] += (x * y).sum(1)
    factor = dot / size.clamp_min(1e-300)
    whole = torch.zeros_like(rest)
    for rows, columns in _pieces(*a.shape):
        x, y = a[rows, columns].double(), b[rows, columns].double()
        rest[rows] += (y - factor[rows, None] * x).square().sum(1)
        whole[rows] += y.square().sum(1)
    precise = 3e-2 if coarse or before.dtype.itemsize <= 2 else 1e-3
    return Factors(dim, factor, _alive(size) & (rest.sqrt() <= precise * whole.sqrt()))


def _pieces(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """A matrix in pieces small enough for copies in float64."""
    wide = max(min(columns, PIECE), 1)
    high = max(PIECE // wide, 1)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            yield slice(top, top + high), slice(left, left + wide)


def _squares(rows: Tensor) -> Tensor:
    found = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for at, columns in _pieces(*rows.shape):
        found[at] += rows[at, columns].double().square().sum(1)
    return found


def _rows(t: Tensor, axis: int) -> Tensor:
    if axis == -1:
        return t.reshape(-1, t.shape[-1]) if t.numel() else t.new_zeros(0, 0)  # a layer may have no features at all
    return t.flatten(1)


def _alive(size: Tensor) -> Tensor:
    """Of sums of squares by row: which are of rows that are not zero, or too small to tell."""
    return size > 1e-8 * size.max() if size.numel() else size > 0


def _has_samples(e: Tensor, axis: int, dim: int) -> bool:
    sequence = axis == -1 and e.dim() == 3
    return (dim == 0 or sequence) and axis != 0 and e.dim() > dim + (axis == -1) and e.shape[dim] > 1
