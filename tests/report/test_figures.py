"""Curves and heat maps: what is drawn where, read back from the paths."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rewire.report.curves import BOX, Axis, _linear, _logarithmic, charts
from rewire.report.flags import flags
from rewire.report.heat import COLOURS, DEGREES, WIDEST, colours, heat
from rewire.report.runs import read
from rewire.report.table import Group, Report, build
from tests.report.made_up import diverged, line, write


def made(tmp_path: Path, *lines: dict[str, Any]) -> tuple[Report, Group]:
    report = build(read([write(tmp_path / "a", lines)]))
    return report, report.groups[0]


def curve(rule: str, seed: int, accuracies: Sequence[float | None], losses: Sequence[float | None]) -> dict[str, Any]:
    points = [
        {"epoch": epoch, "accuracy": a, "loss": b}
        for epoch, (a, b) in enumerate(zip(accuracies, losses, strict=True), start=1)
    ]
    return line(rule, seed) | {"history": points}


def points(path: str) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"(-?\d+) (-?\d+)", path)]


def value(axis: Axis, down: float) -> float:
    """The number at a height of the drawing."""
    share = 1 - down / BOX
    if axis.log:
        return math.exp(math.log(axis.low) + share * (math.log(axis.high) - math.log(axis.low)))
    return axis.low + share * (axis.high - axis.low)


def test_lines_are_means_and_bands_go_from_lowest_to_highest(tmp_path: Path) -> None:
    accuracies = [[0.2, 0.5, 0.9], [0.3, 0.6, 0.8], [0.1, 0.7, 0.7]]
    report, group = made(tmp_path, *(curve("bp", s, a, [2.0, 1.0, 0.5]) for s, a in enumerate(accuracies)))
    chart = charts(report, group)[0]
    (drawn,) = chart.lines

    near = (chart.y.high - chart.y.low) / BOX
    assert [value(chart.y, down) for _, down in points(drawn.path)] == pytest.approx([20, 60, 80], abs=near)
    assert [left for left, _ in points(drawn.path)] == [0, 500, 1000]
    assert drawn.means == pytest.approx((20, 60, 80))
    band = [value(chart.y, down) for _, down in points(drawn.band)]
    assert band == pytest.approx([30, 70, 90, 70, 50, 10], abs=near)


def test_loss_is_logarithmic_where_it_spans_decades(tmp_path: Path) -> None:
    report, group = made(tmp_path, curve("bp", 0, [0.5, 0.6, 0.7], [2.0, 0.1, 0.004]))
    chart = charts(report, group)[1]

    assert chart.y.log and "logarithmic" in chart.title
    assert [value(chart.y, d) for _, d in points(chart.lines[0].path)] == pytest.approx([2, 0.1, 0.004], rel=0.02)
    assert [name for _, name in chart.y.ticks] == ["0.01", "0.1", "1"]
    assert all(value(chart.y, BOX * (1 - at)) == pytest.approx(float(name)) for at, name in chart.y.ticks)
    assert chart.lines[0].band == ""  # one seed has no band


def test_a_diverged_seed_is_drawn_apart_and_does_not_stretch_the_axis(tmp_path: Path) -> None:
    report, group = made(tmp_path, line("bp", 0), line("dfa", 0), diverged("dfa", 1))
    accuracy, loss = charts(report, group)
    drawn = accuracy.lines[1]

    assert accuracy.y.low >= 50
    assert drawn.means == pytest.approx([100 * each["accuracy"] for each in line("dfa", 0)["history"]])
    assert len(drawn.strays) == 1 and len(points(drawn.strays[0])) == 5
    ((left, up, why),) = drawn.ends
    assert (left, up) == pytest.approx((4 / 14, 0)) and why == "dfa, seed 1: diverged after epoch 5"
    assert loss.lines[1].ends[0][1] == 1  # off the top


def test_only_diverged_seeds_still_make_a_chart(tmp_path: Path) -> None:
    report, group = made(tmp_path, diverged("bp", 0), diverged("bp", 1))
    for chart in charts(report, group):
        assert chart.lines[0].path == chart.lines[0].band == "" and len(chart.lines[0].strays) == 2


def test_one_epoch_is_a_dot(tmp_path: Path) -> None:
    report, group = made(tmp_path, curve("bp", 0, [0.5], [1.0]))
    assert points(charts(report, group)[0].lines[0].path) == [(500, 500)] * 2


def test_no_history_no_chart(tmp_path: Path) -> None:
    report, group = made(tmp_path, line() | {"history": []})
    assert charts(report, group) == []


@pytest.mark.parametrize(
    ("low", "high", "names"),
    [
        (61.3, 99.1, ["60", "70", "80", "90", "100"]),
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (97.02, 97.11, ["97.02", "97.04", "97.06", "97.08", "97.10", "97.12"]),
        (-30.0, 20.0, ["-30", "-20", "-10", "0", "10", "20"]),
    ],
)
def test_ticks_are_round_and_frame_the_data(low: float, high: float, names: list[str]) -> None:
    axis = _linear(low, high)
    assert [name for _, name in axis.ticks] == names
    assert axis.low <= low + 1e-9 and axis.high >= high - 1e-9
    assert all(axis.at(float(name)) == pytest.approx(at, abs=1e-6) for at, name in axis.ticks)


@pytest.mark.parametrize("last", [2, 3, 7, 15, 16, 99, 100, 1000])
def test_epochs_are_whole_and_the_first_is_named(last: int) -> None:
    names = [name for _, name in _linear(1, last, whole=True, widen=False).ticks]
    assert names[0] == "1" and len(names) == len(set(names)) <= 7 and all(name.isdigit() for name in names)


def test_equal_values_have_an_axis_too() -> None:
    for number in (0.0, 1.0, -3.0, 1e-12, 1e300):
        axis = _linear(number, number)
        assert axis.low < number < axis.high or number == 1e-12
    assert _logarithmic(1e-300, 1e300).ticks


def aligned(rule: str, seed: int, rows: Sequence[Sequence[float | None]], **more: Any) -> dict[str, Any]:
    """Layers l0, l1, ... with these angles at steps 0, 10, ..."""
    moments = [
        {
            "epoch": None, "step": 10 * k, "gamma": None, "flags": [],
            "layers": {f"l{i}": {"weight_angle": row[k]} for i, row in enumerate(rows)},
        }
        for k in range(len(rows[0]))
    ]  # fmt: skip
    return line(rule, seed, **more) | {"alignment": moments}


def cells(paths: Sequence[tuple[int, str]]) -> dict[tuple[int, int], int]:
    """(layer, column) → colour, out of the drawn strokes."""
    found: dict[tuple[int, int], int] = {}
    for shade, path in paths:
        strokes = re.findall(r"M(\d+) (\d+)h(\d+)v1H(\d+)z", path)
        assert "".join(f"M{a} {b}h{c}v1H{d}z" for a, b, c, d in strokes) == path
        for left, down, wide, back in (map(int, each) for each in strokes):
            assert left == back
            for column in range(left, left + wide):
                assert (down, column) not in found
                found[down, column] = shade
    return found


def test_the_heat_map_is_the_mean_over_seeds_with_gaps(tmp_path: Path) -> None:
    first = [[10.0, 20.0, 30.0, 40.0], [None, 90.0, None, 180.0]]
    second = [[20.0, 20.0, None, 60.0], [None, 100.0, 80.0, 170.0]]
    _, group = made(tmp_path, aligned("dfa", 0, first), aligned("dfa", 1, second))
    drawn = heat(group.rows[0])

    assert drawn is not None and drawn.layers == ("l0", "l1")
    assert drawn.angles == ((15.0, 20.0, 30.0, 50.0), (None, 95.0, 80.0, 175.0))
    assert drawn.last == (50.0, 175.0) and not drawn.exact
    assert drawn.columns == ("step 0", "step 10", "step 20", "step 30")
    assert cells(drawn.paths) == {
        (down, left): int(angle // DEGREES)
        for down, row in enumerate(drawn.angles)
        for left, angle in enumerate(row)
        if angle is not None
    }


def test_many_moments_share_columns_and_keep_their_mean(tmp_path: Path) -> None:
    angles = [float(k % 90) for k in range(WIDEST * 3)]
    _, group = made(tmp_path, aligned("dfa", 0, [angles]))
    drawn = heat(group.rows[0])

    assert drawn is not None and drawn.merged and len(drawn.columns) == WIDEST
    assert drawn.angles[0] == pytest.approx([sum(angles[3 * k : 3 * k + 3]) / 3 for k in range(WIDEST)])


def test_backprop_needs_no_picture_and_gaps_are_not_backprop(tmp_path: Path) -> None:
    _, group = made(
        tmp_path, aligned("bp", 0, [[0.0, 1e-3]]), aligned("fa", 0, [[0.0, None]]), aligned("dfa", 0, [[None, None]])
    )
    bp, fa, dfa = (heat(row) for row in group.rows)

    assert bp is not None and bp.exact
    assert fa is not None and not fa.exact and fa.last == (None,)  # what was measured before is not the end
    assert dfa is not None and not dfa.exact and dfa.paths == () and "not measurable" in dfa.words


def test_colours_run_from_the_page_to_both_ends() -> None:
    def light(colour: str) -> float:
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    for dark in (False, True):
        ramp = colours(dark)
        assert len(ramp) == len(set(ramp)) == COLOURS
        sign = -1 if dark else 1
        middle = COLOURS // 2
        assert sign * light(ramp[middle]) > sign * light(ramp[0]) and sign * light(ramp[middle]) > sign * light(
            ramp[-1]
        )


def test_flags_of_a_kind_are_one_with_where_and_when(tmp_path: Path) -> None:
    one, two, three = (aligned("dfa", seed, [[80.0, 80.0, 80.0]]) for seed in range(3))
    one["alignment"][0]["flags"] = ["not distinguishable from chance: l0 (80°)"]
    one["alignment"][1]["flags"] = ["activations have grown more than 100-fold since the start: l0 (×134)"]
    two["alignment"][1]["flags"] = ["activations have grown more than 100-fold since the start: l0 (×101)"]
    two["alignment"][2]["flags"] = ["activations have grown more than 100-fold since the start: l0 (×999), l1"]
    _, group = made(tmp_path, one, two, three, line("bp", 0) | {"alignment": []})
    grown, chance = flags(group)

    assert (grown.seeds, grown.of, grown.first, grown.last, grown.at_end) == (2, 3, "step 10", "step 20", 1)
    assert grown.words.endswith("l0 (×999), l1") and "blowing up" in grown.meaning
    assert (chance.seeds, chance.first, chance.last, chance.at_end) == (1, "step 0", "step 0", 0)
