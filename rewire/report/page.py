"""The page: one file, no network, light and dark, for screens, phones and paper."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import rewire

from . import words
from .curves import BOX, Chart, charts
from .flags import flags, recorded
from .heat import COLOURS, Heat, colours, end_of, heat, note_of
from .runs import Outcome, count, environments
from .table import Group, Report, Row, described, plain

_HERE = Path(__file__).parent
# Rules beyond these start over with dashes.
_HUES = 6
_LAYER_NUMBERS = {
    "weight_angle": "weight angle",
    "input_angle": "input angle",
    "null_angle": "null angle",
    "feedback_angle": "W to B angle",
    "feedback_ratio": "‖B‖ ÷ ‖W‖",
    "activation_norm": "activation norm",
    "growth": "its growth",
    "norm": "gradient norm",
    "backprop_norm": "backprop’s norm",
}


def page(report: Report) -> str:
    """``report`` as HTML. All that comes from files is escaped; nothing in it can run or load."""
    style = (_HERE / "page.css").read_text(encoding="utf-8") + _ramp()
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=plain, text=_text, ident=id)
    paint = _Paint(report)
    views = [_View(report, group) for group in report.groups]
    drawn = [chart for view in views for chart in view.charts]
    maps = [each for view in views for each in view.heats if not each.exact]
    return environment.get_template("page.html").render(
        report=report,
        views=views,
        words=words,
        version=rewire.__version__,
        cells=_counts(report),
        described=described,
        flags=[flag for view in views for flag in view.flags],
        environments=environments(report.collected.runs),
        trouble=[
            (view, row, each) for view in views for row in view.rows for each in row.outcomes if each.status != "done"
        ],
        data={"charts": [_hover(chart, paint) for chart in drawn], "heats": [_hover_heat(each) for each in maps]},
        chart_number={id(chart): number for number, chart in enumerate(drawn)},
        heat_number={id(each): number for number, each in enumerate(maps)},
        paint=paint,
        box=BOX,
        ramp=range(COLOURS),
        end_of=end_of,
        note_of=note_of,
        short=_tail,
        pretty=lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str),
        style=Markup(style),  # ours, as is
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        count=count,
    )


class _View:
    """What the template needs of one group."""

    def __init__(self, report: Report, group: Group) -> None:
        self.group, self.title, self.rows = group, group.title, group.rows
        self.charts = charts(report, group)
        self.heats = [each for row in group.rows if (each := heat(row)) is not None]
        self.flags = flags(group)
        self.recorded = recorded(group)
        ends = [layer for row in group.rows for moment in row.last for layer in moment.layers.values()]
        self.layer_numbers = {
            key: name for key, name in _LAYER_NUMBERS.items() if any(layer.numbers[key] is not None for layer in ends)
        }
        self.in_short = words.in_short(report, group)
        done = [value for row in group.rows for each in row.outcomes if (value := self._done(report, each)) is not None]
        values = done or [value for row in group.rows for value in row.values.values()]
        self.low, self.high = min(values, default=0.0), max(values, default=1.0)

    @staticmethod
    def _done(report: Report, outcome: Outcome) -> float | None:
        return report.value(outcome.accuracy) if outcome.status == "done" else None

    def at(self, value: float) -> float:
        """Where ``value`` lies in the drawing's box, from the group's lowest to its highest finished seed."""
        room = self.high - self.low
        share = (value - self.low) / room if room else 0.5
        return BOX * (0.04 + 0.92 * min(max(share, -0.02), 1.02))

    def within(self, value: float) -> bool:
        """Whether ``value`` lies between these."""
        return self.low <= value <= self.high

    def has(self, name: str) -> bool:
        """Whether any cell has this number."""
        return any(getattr(each, name) is not None for row in self.rows for each in row.outcomes)

    @property
    def slowest(self) -> float:
        """The largest step ratio, for the bars."""
        ratios = [ratio.mean for row in self.rows if (ratio := row.spread("step_ratio")) is not None]
        return max(ratios, default=1.0) or 1.0

    def row(self, label: str) -> Row:
        """The row called ``label``."""
        return next(row for row in self.rows if row.label == label)


class _Paint:
    """A rule's colour, the same everywhere: the baseline is ink, others take hues in order of appearance."""

    def __init__(self, report: Report) -> None:
        inked = {row.label for group in report.groups for row in group.rows if row.is_baseline}
        ink = [label for label in report.labels if label in inked]
        rest = [label for label in report.labels if label not in inked]
        self._classes = {label: f"c0 d{number % 4}" for number, label in enumerate(ink)}
        self._classes |= {label: f"c{number % _HUES + 1} d{number // _HUES % 4}" for number, label in enumerate(rest)}
        self._numbers = {label: number for number, label in enumerate(report.labels)}

    def __call__(self, label: str) -> str:
        """Classes of colour and dash."""
        return self._classes[label]

    def number(self, label: str) -> int:
        """For the script, so that no name becomes a selector."""
        return self._numbers[label]


def _hover(chart: Chart, paint: _Paint) -> dict[str, Any]:
    return {
        "title": chart.title,
        "epochs": chart.epochs,
        "at": [_short(chart.x.at(epoch)) for epoch in chart.epochs],
        "lines": [
            {
                "label": line.label,
                "paint": paint(line.label),
                "rule": paint.number(line.label),
                "values": [_short(value) for value in line.means],
                "up": [None if value is None else _short(chart.y.at(value)) for value in line.means],
            }
            for line in chart.lines
        ],
    }


def _hover_heat(each: Heat) -> dict[str, Any]:
    angles = [[None if angle is None else round(angle) for angle in row] for row in each.angles]
    return {"label": each.label, "layers": each.layers, "columns": each.columns, "angles": angles}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _counts(report: Report) -> list[tuple[int, str]]:
    outcomes = report.collected.outcomes
    every = [(sum(each.status == status for each in outcomes), status) for status in ("done", "diverged", "failed")]
    flagged = sum(bool(each.alignment and each.alignment[-1].flags) for each in outcomes)
    return every + ([(flagged, "flagged")] if any(each.alignment for each in outcomes) else [])


def _tail(name: str, length: int = 22) -> str:
    """The end of a layer's name, which tells layers apart."""
    return name if len(name) <= length else f"…{name[1 - length :].lstrip('.')}"


def _text(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number for a table cell."""
    if value is None:
        return words.MISSING
    if value and unit != "°" and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}{unit}"
    return f"{value:.{digits}f}{unit}"


def _ramp() -> str:
    """The heat map's colours as classes, for light and dark."""

    def rules(dark: bool) -> str:
        return "".join(f".h{number}{{fill:{each};background:{each}}}" for number, each in enumerate(colours(dark)))

    return f"{rules(False)}@media screen and (prefers-color-scheme:dark){{{rules(True)}}}"
