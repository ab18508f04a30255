"""Alignment over training as a picture: layers × time, the angle between the rule's and backprop's weight gradient."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .flags import when
from .runs import Moment, Outcome
from .table import Row

DEGREES = 5  # of one colour
COLOURS = 180 // DEGREES
WIDEST = 40  # columns; more moments share one

# From 0° over 90°, which says nothing, to 180°. ColorBrewer's YlGnBu and OrRd: lightness alone tells the
# two halves' ends from the middle, so no kind of colour blindness hides it. On a dark page the middle is dark.
_LIGHT = ("#081d58", "#225ea8", "#41b6c4", "#c7e9b4", "#ffffd9", "#fdcc8a", "#fc8d59", "#d7301f", "#7f0000")
_DARK = ("#f4fbd0", "#a5dbb6", "#41b6c4", "#1f6a95", "#26303d", "#7a3b1e", "#c2552b", "#f58b5a", "#ffd9b0")


@dataclass(frozen=True, slots=True)
class Heat:
    """One rule's heat map.

    ``angles`` is layers × columns in degrees, None where no seed could measure; ``paths`` has for each colour in
    use the cells of that colour in a box of columns × layers; ``last`` is each layer's angle in the last column.
    """

    label: str
    layers: tuple[str, ...]
    columns: tuple[str, ...]
    angles: tuple[tuple[float | None, ...], ...]
    paths: tuple[tuple[int, str], ...]
    last: tuple[float | None, ...]
    words: str
    merged: bool

    @property
    def exact(self) -> bool:
        """Whether all of it is backprop's own gradient: nothing to draw."""
        return all(angle is not None and angle < 0.5 for row in self.angles for angle in row)


def heat(row: Row) -> Heat | None:
    """The mean over seeds of each layer's weight angle; None if alignment was not recorded."""
    moments: dict[tuple[float, float], list[Moment]] = {}
    for outcome in row.outcomes:
        for moment in outcome.alignment:
            moments.setdefault(moment.when, []).append(moment)
    layers = tuple(dict.fromkeys(name for each in row.outcomes for m in each.alignment for name in m.layers))
    if not layers:
        return None
    times = sorted(moments)
    shares = min(len(times), WIDEST)
    columns = [times[i * len(times) // shares : (i + 1) * len(times) // shares] for i in range(shares)]
    angles = tuple(
        tuple(_mean_angle(name, (moment for when in column for moment in moments[when])) for column in columns)
        for name in layers
    )
    last = tuple(each[-1] for each in angles)
    known = [angle for angle in last if angle is not None]
    words = (
        f"mean {statistics.fmean(known):.0f}°, from {min(known):.0f}° to {max(known):.0f}° over layers"
        if known
        else "not measurable in any layer"
    )
    return Heat(
        row.label,
        layers,
        tuple(when(moments[column[-1]][0]) for column in columns),
        angles,
        tuple(sorted(_paths(angles).items())),
        last,
        f"Alignment of {row.label}: angle to backprop's weight gradient, {len(layers)} layers by "
        f"{len(columns)} moments of training. At the end: {words}",
        len(times) > WIDEST,
    )


def colours(dark: bool) -> list[str]:
    """One colour for each :data:`DEGREES` from 0° to 180°."""
    stops = _DARK if dark else _LIGHT
    return [_between(stops, (index + 0.5) / COLOURS) for index in range(COLOURS)]


def end_of(outcomes: Iterable[Outcome], layer: str, number: str) -> float | None:
    """The mean over seeds of ``number`` in the last record of ``layer``."""
    found = [
        value
        for each in outcomes
        if each.alignment
        and layer in each.alignment[-1].layers
        and (value := each.alignment[-1].layers[layer].numbers[number]) is not None
    ]
    return statistics.fmean(found) if found else None


def note_of(outcomes: Iterable[Outcome], layer: str) -> str:
    """What the last records of ``layer`` say beside numbers, each once."""
    last = [each.alignment[-1].layers for each in outcomes if each.alignment]
    notes = [layers[layer].note for layers in last if layer in layers]
    return "; ".join(dict.fromkeys(note for note in notes if note))


def _mean_angle(layer: str, moments: Iterable[Moment]) -> float | None:
    found = [m.layers[layer].angle for m in moments if layer in m.layers]
    known = [angle for angle in found if angle is not None]
    return statistics.fmean(known) if known else None


def _paths(angles: tuple[tuple[float | None, ...], ...]) -> dict[int, str]:
    """Neighbours of one colour in one stroke, or a page of many layers would be all rectangles."""
    paths: dict[int, str] = {}
    for down, row in enumerate(angles):
        start = 0
        shades = [None if angle is None else _shade(angle) for angle in row]
        for left in range(1, len(row) + 1):
            if left == len(row) or shades[left] != shades[start]:
                shade = shades[start]
                if shade is not None:
                    paths[shade] = paths.get(shade, "") + f"M{start} {down}h{left - start}v1H{start}z"
                start = left
    return paths


def _shade(angle: float) -> int:
    return min(max(int(angle // DEGREES), 0), COLOURS - 1)


def _between(stops: tuple[str, ...], share: float) -> str:
    place = share * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    pairs = zip(_rgb(stops[index]), _rgb(stops[index + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in pairs)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
