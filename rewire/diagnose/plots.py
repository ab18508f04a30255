"""Pictures of alignment over training, from the records of a :class:`rewire.Recorder`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rewire.errors import RewireError

Record = Mapping[str, Any]
Curves = dict[str, list[float]]

_MOST = 12  # layers that a legend can name; above that a scale of colours does
_DASHES = (0, (4, 1.5))
_CHANCE = "not distinguishable from chance"
_TINTS = {True: "#9aa3ad", False: "#d1495b"}  # of stretches flagged for nothing but chance, and for anything else


@dataclass(frozen=True)
class _Panel:
    title: str
    label: str
    field: str
    log: bool = False
    beside: str = ""  # drawn dashed, as thin as it can be
    counted: bool = False  # only layers that count in Γ: the others' are exact
    line: float | None = None


_PANELS = (
    _Panel("Gradient of the weight, rule against backprop", "angle (°)", "weight_angle", counted=True, line=90),
    _Panel("Gradient at the layer's input, rule against backprop", "angle (°)", "input_angle", line=90),
    _Panel("Weight W and feedback B", "angle (°)", "feedback_angle", line=90),
    _Panel("Size of the feedback", "|B| / |W|", "feedback_ratio", line=1),
    _Panel("Norm of the weight's gradient (dashed: backprop's)", "norm", "norm", log=True, beside="backprop_norm"),
    _Panel("Size of the layer's output", "root mean square", "activation_norm", log=True),
)


def draw(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Draw every layer's curves to ``path``; the ending says the format (png, pdf, svg).

    Panels without a single number are left out. Stretches whose records are flagged are tinted, and the flags written
    below.

    Args:
        records: ``{"step", "gamma", "flags", "layers": {name: fields}}`` each, of one model.

    Raises:
        RewireError: if matplotlib is not installed, or there are no records.
    """
    if not records:
        raise RewireError("nothing has been recorded yet, so there is nothing to draw")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RewireError('drawing needs matplotlib: pip install "rewire[plots]"') from None

    names = list(dict.fromkeys(name for record in records for name in record["layers"]))
    steps = [record["step"] for record in records]
    panels = [panel for panel in _PANELS if any(_seen(c) for c in _curves(records, names, panel.field, panel).values())]
    outputs = {name for name in names if records[-1]["layers"].get(name, {}).get("output")}
    colours = _colours(matplotlib, names)
    flags = _flags(records)

    rows = -(-len(panels) // 2)
    below = 0.26 * min(len(flags), 6) + 0.3
    height = 0.9 + 3.0 * rows + below
    figure = Figure(figsize=(14.5, height), layout=None)
    grid = figure.add_gridspec(
        rows, 2, left=0.055, right=0.82, top=1 - 0.85 / height, bottom=(below + 0.45) / height, hspace=0.42, wspace=0.2
    )
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        _draw_panel(axes, records, steps, names, panel, colours)
    gamma = [record["gamma"] for record in records if record["gamma"] is not None]
    last = f"Γ = {gamma[-1]:.3f} when last measurable" if gamma else "Γ not measurable"
    figure.text(0.055, 1 - 0.35 / height, "Alignment with backprop", fontsize=15, weight="bold", va="center")
    figure.text(0.82, 1 - 0.35 / height, last, fontsize=12, color="#444444", va="center", ha="right")
    _name_layers(figure, matplotlib, names, outputs, colours, height)
    for line, (text, tint) in enumerate(flags[:6]):
        at = (below - 0.22 - 0.26 * line) / height
        figure.text(0.055, at, "■", color=tint, fontsize=11, va="center", alpha=0.6)
        figure.text(0.068, at, _plain(text), fontsize=9, color="#333333", va="center")
    figure.savefig(path, dpi=100, facecolor="white", bbox_inches="tight", pad_inches=0.15)  # labels may be of any width


def _draw_panel(
    axes: Any, records: Sequence[Record], steps: list[int], names: list[str], panel: _Panel, colours: Mapping[str, Any]
) -> None:
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_ylabel(panel.label, fontsize=9)
    axes.tick_params(which="both", labelsize=8)  # those in between are labelled where a scale spans less than a decade
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    if panel.log:
        axes.set_yscale("log")
    for start, stop, chance in _stretches(records, steps):
        axes.axvspan(start, stop, color=_TINTS[chance], alpha=0.10, linewidth=0, zorder=0)
    if panel.line is not None:
        axes.axhline(panel.line, color="#999999", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    marker = "o" if len(steps) < 3 else None
    positive: Callable[[float], bool] = lambda value: not panel.log or value > 0  # noqa: E731
    nan = float("nan")
    for name, values in _curves(records, names, panel.field, panel).items():
        if _seen(values):
            shown = [v if positive(v) else nan for v in values]
            axes.plot(steps, shown, color=colours[name], linewidth=1.8, marker=marker, zorder=3)
    if panel.beside:
        for name, values in _curves(records, names, panel.beside, panel).items():
            if _seen(values):
                shown = [v if positive(v) else nan for v in values]
                axes.plot(steps, shown, color=colours[name], linewidth=1.1, linestyle="--", alpha=0.8, zorder=2)
    if panel.field == "weight_angle":
        _draw_chance(axes, records, steps, names, panel)
        mean = [nan if r["gamma"] is None else math.degrees(math.acos(r["gamma"])) for r in records]
        axes.plot(
            steps, mean, color="black", linewidth=2.4, linestyle=_DASHES, marker=marker, zorder=4, label="arccos Γ"
        )
        if len(names) > _MOST:  # no other place names it
            axes.legend(loc="lower left", fontsize=8, frameon=False)
    axes.set_xlim(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1)
    axes.set_xlabel("training step", fontsize=9)


def _draw_chance(axes: Any, records: Sequence[Record], steps: list[int], names: list[str], panel: _Panel) -> None:
    """A band where fresh random feedback would put the layers: mean ± two deviations over layers and draws."""
    means = _curves(records, names, "null_angle", panel)
    spreads = _curves(records, names, "null_spread", panel)
    low: list[float] = []
    high: list[float] = []
    for i in range(len(steps)):
        here = [(means[n][i], spreads[n][i]) for n in names if means[n][i] == means[n][i]]
        here = [(mean, 0.0 if spread != spread else spread) for mean, spread in here]
        low.append(min((mean - 2 * spread for mean, spread in here), default=float("nan")))
        high.append(max((mean + 2 * spread for mean, spread in here), default=float("nan")))
    if _seen(low):
        axes.fill_between(steps, low, high, color="#b9c0c7", alpha=0.35, linewidth=0, zorder=1)
        at = next(i for i in reversed(range(len(steps))) if high[i] == high[i])
        axes.annotate(
            "by chance",
            (steps[at], high[at]),
            (-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#5c6670",
        )


def _name_layers(
    figure: Any, matplotlib: Any, names: list[str], outputs: set[str], colours: Mapping[str, Any], height: float
) -> None:
    if len(names) > _MOST:
        bar = figure.add_axes((0.84, 0.3, 0.011, 0.45))
        shades = matplotlib.colors.ListedColormap([colours[name] for name in names])
        figure.colorbar(matplotlib.cm.ScalarMappable(cmap=shades), cax=bar)
        bar.invert_yaxis()
        ticks = sorted({round(i * (len(names) - 1) / 7) for i in range(8)})
        bar.set_yticks([(i + 0.5) / len(names) for i in ticks], [_short(names[i]) for i in ticks], fontsize=8)
        bar.set_title("layer", fontsize=9, loc="left")
        return
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colours[name], linewidth=2.4) for name in names]
    handles.append(Line2D([], [], color="black", linewidth=2.4, linestyle=_DASHES))
    labels = [_short(name) + (" (output)" if name in outputs else "") for name in names]
    figure.legend(
        handles,
        [*labels, "arccos Γ"],
        loc="upper left",
        bbox_to_anchor=(0.832, 1 - 0.8 / height),
        frameon=False,
        fontsize=9,
        title="layer, first to last",
        title_fontsize=9,
        alignment="left",
    )


def _short(name: str, most: int = 24) -> str:
    name = name or "(model)"
    return _plain(name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}")


def _plain(text: str) -> str:
    """As matplotlib shows it, which takes what stands between two ``$`` for a formula."""
    return text.replace("$", r"\$")


def _colours(matplotlib: Any, names: list[str]) -> dict[str, Any]:
    """From dark to bright along the depth of the network; few layers get colours further apart."""
    scale = matplotlib.colormaps["viridis" if len(names) > 4 else "plasma"]
    return {name: scale(0.9 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)}


def _curves(records: Sequence[Record], names: list[str], field: str, panel: _Panel) -> Curves:
    """The values of ``field`` by layer; what was not measurable is not a number, and leaves a gap."""
    nan = float("nan")

    def value(record: Record, name: str) -> float:
        layer = record["layers"].get(name, {})
        found = layer.get(field)
        if found is None or (panel.counted and not layer.get("counted", True)):
            return nan
        return float(found)

    return {name: [value(record, name) for record in records] for name in names}


def _seen(values: Sequence[float]) -> bool:
    return any(value == value for value in values)


def _stretches(records: Sequence[Record], steps: list[int]) -> list[tuple[float, float, bool]]:
    """From, to, and whether chance was the only flag; each record stands for the steps around it."""
    middle = [(a + b) / 2 for a, b in pairwise(steps)]
    edges = [float(steps[0]), *middle, float(steps[-1])]
    found: list[tuple[float, float, bool]] = []
    for start, stop, record in ((*pair, r) for pair, r in zip(pairwise(edges), records, strict=True)):
        if record["flags"]:
            found.append((start, stop, all(flag.startswith(_CHANCE) for flag in record["flags"])))
    return found


def _flags(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What was flagged and when, with the colour of its stretches."""
    steps: dict[str, list[int]] = {}
    for record in records:
        for flag in record["flags"]:
            steps.setdefault(flag.partition(":")[0], []).append(record["step"])
    return [
        (f"{what}: {_when(at)}", _TINTS[what.startswith(_CHANCE)])
        for what, at in sorted(steps.items(), key=lambda entry: entry[1][0])
    ]


def _when(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"at step {steps[0]}"
    return f"at {len(steps)} measurements between steps {steps[0]} and {steps[-1]}"
