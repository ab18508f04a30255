"""Training curves: mean over seeds per epoch, and the band from the lowest to the highest seed.

Positions are in a box of 1000 × 1000 that the page stretches, with labels set beside it: so one drawing fits a phone,
a screen and paper, with type of one size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .runs import Point
from .table import Group, Report, Row

BOX = 1000


@dataclass(frozen=True, slots=True)
class Axis:
    """From ``low`` to ``high``; ``ticks`` are pairs of a share of the way and a label."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Where ``value`` lies, 0 to 1 if within."""
        low, high = self.low, self.high
        if self.log:
            # What is not positive lies below everything.
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        return (value - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Line:
    """One rule. ``path`` and ``band`` are of the seeds that went to the end; those that did not are ``strays``, a path
    each, and ``ends`` the places where they stopped, with words for it.
    """

    label: str
    path: str
    band: str
    strays: tuple[str, ...]
    ends: tuple[tuple[float, float, str], ...]
    means: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One quantity over epochs for all rules of a group."""

    title: str
    x: Axis
    y: Axis
    epochs: tuple[int, ...]
    lines: tuple[Line, ...]
    words: str


def charts(report: Report, group: Group) -> list[Chart]:
    """Accuracy (or error) and loss; those of which there is anything."""
    drawn = (
        _chart(f"test {report.metric}, %", group, lambda point: report.value(point.accuracy), False),
        _chart("training loss", group, lambda point: point.loss, True),
    )
    return [chart for chart in drawn if chart is not None]


def _chart(title: str, group: Group, of: Callable[[Point], float | None], may_log: bool) -> Chart | None:
    seeds = {row.label: [_curve(each.history, of) for each in row.outcomes] for row in group.rows}
    every = [curve for curves in seeds.values() for curve in curves if curve]
    if not every:
        return None
    epochs = sorted({epoch for curve in every for epoch in curve})
    # What diverges leaves the frame, so that it does not press all else flat.
    done = [
        curve
        for row in group.rows
        for outcome, curve in zip(row.outcomes, seeds[row.label], strict=True)
        if outcome.status == "done" and curve
    ]
    values = [value for curve in done or every for value in curve.values()]
    x = _linear(epochs[0], epochs[-1], whole=True, widen=False)
    log = may_log and min(values) > 0 and max(values) / min(values) > 10
    y = _logarithmic(min(values), max(values)) if log else _linear(min(values), max(values))
    lines = tuple(_line(row, seeds[row.label], epochs, x, y) for row in group.rows if any(seeds[row.label]))
    words = ", ".join(f"{line.label} ends at {last:.4g}" for line in lines if (last := _last(line.means)) is not None)
    return Chart(
        title + (" (logarithmic)" if log else ""),
        x,
        y,
        tuple(epochs),
        lines,
        f"{title} over epochs {epochs[0]} to {epochs[-1]}, mean over seeds: {words}",
    )


def _curve(history: Sequence[Point], of: Callable[[Point], float | None]) -> dict[int, float]:
    return {point.epoch: value for point in history if (value := of(point)) is not None}


def _line(row: Row, curves: list[dict[int, float]], epochs: Sequence[int], x: Axis, y: Axis) -> Line:
    whole = [curve for each, curve in zip(row.outcomes, curves, strict=True) if each.status == "done"]
    present = {epoch: [curve[epoch] for curve in whole if epoch in curve] for epoch in epochs}
    at = {epoch: values for epoch, values in present.items() if values}
    mean = {epoch: statistics.fmean(values) for epoch, values in at.items()}
    top = [_place(x, y, epoch, max(values)) for epoch, values in at.items()]
    bottom = [_place(x, y, epoch, min(values)) for epoch, values in at.items()]
    ends, strays = [], []
    for outcome, curve in zip(row.outcomes, curves, strict=True):
        if outcome.status != "done" and curve:
            epoch = max(curve)
            left, down = _place(x, y, epoch, curve[epoch])
            down = min(max(down, 0.0), float(BOX))
            strays.append(_path([_place(x, y, epoch, value) for epoch, value in curve.items()]))
            ends.append(
                (left / BOX, 1 - down / BOX, f"{row.label}, seed {outcome.seed}: {outcome.status} after epoch {epoch}")
            )
    several = any(len(values) > 1 for values in at.values())
    return Line(
        row.label,
        _path([_place(x, y, epoch, value) for epoch, value in mean.items()]) if mean else "",
        _path(top + bottom[::-1]) + "z" if several else "",
        tuple(strays),
        tuple(ends),
        tuple(mean.get(epoch) for epoch in epochs),
    )


def _place(x: Axis, y: Axis, epoch: float, value: float) -> tuple[float, float]:
    return BOX * x.at(epoch), BOX * (1 - min(max(y.at(value), -1.0), 2.0))  # beyond that nobody sees it


def _path(points: Sequence[tuple[float, float]]) -> str:
    # A lone point still shows: a line of no length has round ends.
    points = [*points, points[0]] if len(points) == 1 else points
    return "M" + "L".join(f"{left:.0f} {down:.0f}" for left, down in points)


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _linear(low: float, high: float, *, whole: bool = False, widen: bool = True) -> Axis:
    """Ticks at 1, 2 or 5 times a power of ten; the axis ends at ticks, or, not widened, at the data."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = 0.5 if whole else max(abs(low) * 0.05, 1e-3)
        low, high = low - pad, high + pad
    step = _step((high - low) / 5)
    if whole:
        step = max(1.0, step)
    first, last = (math.floor(low / step), math.ceil(high / step)) if widen else (low / step, high / step)
    low, high = first * step, last * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    marks = [mark * step for mark in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
    if not widen and (not marks or marks[0] - low >= step / 2):
        marks.insert(0, low)
    return Axis(low, high, False, tuple(((mark - low) / (high - low), f"{mark:.{digits}f}") for mark in marks))


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))


def _logarithmic(low: float, high: float) -> Axis:
    # A margin of a twentieth of the range, so that no line runs along the frame.
    start, end = math.log10(low), math.log10(high)
    margin = 0.05 * (end - start)
    low, high = 10 ** max(start - margin, -307), 10 ** min(end + margin, 307)
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if top - bottom <= 3 else (1,)
    every = max(1, math.ceil((top - bottom) / 6))
    marks = [factor * 10.0**power for power in range(bottom, min(top, 307) + 1, every) for factor in factors]
    axis = Axis(low, high, True, ())
    ticks = tuple((axis.at(mark), f"{mark:g}") for mark in marks if low <= mark <= high)
    return Axis(low, high, True, ticks)
