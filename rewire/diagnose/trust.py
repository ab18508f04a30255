"""Whether angles to backprop's gradient mean anything: four checks, each of which can only say no.

**Floor.** An angle to a vector that is made of rounding is no angle. Backprop's gradient counts as rounding where

- moving every weight by one unit in its last place turns it by more than ``ROUNDING`` degrees; or
- it is too small to matter: (‖g‖/‖W‖) of the layer is less than ``eps`` times the largest of all layers. A step that
  changes that layer's weight by as much as itself would then not change this layer's at all. Neither the scale of the
  loss nor that of the weights makes a difference.

Such layers have no angle and do not count in Γ.

**Growth.** The activations of a layer have grown more than ``GROWTH``-fold since the start, and ``BEYOND`` times as
much as the network's outputs; or ``ANYWAY``-fold, whatever the outputs did. In a network that learns, activations
grow, and outputs with them. Where the network ends in a normalisation the loss does not feel the activations' size:
nothing keeps a rule with fixed feedback from enlarging them, while backprop's gradient falls in proportion.

**Chance.** Fresh random feedback knows nothing of the network. A layer whose angle is not smaller than the mean with
fresh feedback by ``SPREADS`` standard deviations could be chance: with 8 draws, one that is chance passes once in 20
times. Its note says so. The flag is raised where this is true of more than ``MOST`` of the layers in Γ, as it is of all
before training; lower convolutions that the rule does not reach are common in networks that learn all the same.

**Carried.** Without its best layer Γ is less than ``REST`` of what it is; and that layer is not chance, and has a
cosine of ``LEAST`` or more.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rewire.errors import some

if TYPE_CHECKING:
    from rewire.diagnose.alignment import LayerAlignment

ROUNDING = 15.0
GROWTH, BEYOND, ANYWAY = 100.0, 10.0, 10_000.0
UNKNOWN = 1000.0
"""In place of ``GROWTH`` where the outputs started at zero, so that nothing can be said of their growth."""
REST, LEAST = 0.25, 0.2
MOST = 2 / 3
SPREADS = 2.0
FEWEST = 3
"""Draws of fresh feedback below which nothing is said about chance."""


def judge(layers: Sequence[LayerAlignment], draws: int) -> tuple[list[LayerAlignment], list[str]]:
    """The layers, without angles where there can be none; and the flags."""
    floor = {layer.name: why for layer in layers if (why := _at_floor(layer, layers))}
    judged = [_without_angle(layer, floor[layer.name]) if layer.name in floor else layer for layer in layers]
    chance = {x.name: f"{x.weight_angle:.1f}°, by chance {x.null_angle:.1f}°" for x in judged if _is_chance(x, draws)}
    judged = [_noted(layer, "could be chance") if layer.name in chance else layer for layer in judged]
    limit = _growth_limit(judged)
    grown = {x.name: f"×{x.growth:.3g}" for x in judged if not x.output and x.growth is not None and x.growth > limit}
    found = [
        _say(floor, "backprop's gradient is at the numeric floor: not measurable"),
        _say(grown, f"activations have blown up, by more than {limit:.0f} since the start"),
        _say([x.name for x in judged if not _finite(x.activation_norm)], "activations are not finite"),
        _say([x.name for x in judged if not _finite(x.backprop_norm)], "backprop's gradient is not finite"),
        _say([x.name for x in judged if not _finite(x.norm)], "the rule's gradient is not finite"),
        _say(chance if len(chance) > MOST * sum(x.counted for x in judged) else {}, "not distinguishable from chance"),
        _carried(judged, chance),
    ]
    return judged, [flag for flag in found if flag]


def mean_cosine(angles: Iterable[float | None]) -> float | None:
    """Of angles in degrees; None of none."""
    cosines = [math.cos(math.radians(a)) for a in angles if a is not None]
    return math.fsum(cosines) / len(cosines) if cosines else None


def _at_floor(layer: LayerAlignment, layers: Sequence[LayerAlignment]) -> str:
    if layer.weight_angle is None:
        return ""
    if layer.rounding_angle is None or layer.rounding_angle > ROUNDING:
        turned = "vanishes" if layer.rounding_angle is None else f"turns by {layer.rounding_angle:.0f}°"
        return f"{turned} when weights are rounded"
    largest = max((_relative(other) for other in layers), default=0.0)
    # Formats of two bytes have few digits, but the range of larger ones.
    eps = min(torch.finfo(getattr(torch, layer.dtype)).eps, torch.finfo(torch.float32).eps)
    relative = _relative(layer)
    return f"{relative / largest:.1g} of the largest, relative to weights" if relative < eps * largest else ""


def _relative(layer: LayerAlignment) -> float:
    if not layer.backprop_norm or not layer.weight_norm or not math.isfinite(layer.backprop_norm):
        return 0.0
    return layer.backprop_norm / layer.weight_norm


def _without_angle(layer: LayerAlignment, why: str) -> LayerAlignment:
    layer = replace(layer, weight_angle=None, null_angle=None, null_spread=None, input_angle=None, counted=False)
    return _noted(layer, f"not measurable: backprop's gradient is at the numeric floor, {why}")


def _noted(layer: LayerAlignment, note: str) -> LayerAlignment:
    return replace(layer, note="; ".join(filter(None, [note, layer.note])))


def _growth_limit(layers: Sequence[LayerAlignment]) -> float:
    outputs = [layer.growth for layer in layers if layer.output and layer.growth is not None]
    outputs = [growth for growth in outputs if math.isfinite(growth)]
    return min(max(GROWTH, BEYOND * max(outputs)), ANYWAY) if outputs else UNKNOWN


def _is_chance(layer: LayerAlignment, draws: int) -> bool:
    if draws < FEWEST or not layer.counted:
        return False
    if layer.weight_angle is None or layer.null_angle is None or layer.null_spread is None:
        return False
    return layer.weight_angle > layer.null_angle - SPREADS * layer.null_spread


def _carried(layers: Sequence[LayerAlignment], chance: Container[str]) -> str:
    angles = {layer.name: layer.weight_angle for layer in layers if layer.counted and layer.weight_angle is not None}
    gamma = mean_cosine(angles.values())
    if gamma is None or gamma <= 0 or len(angles) < 2:
        return ""
    best = min(angles, key=angles.__getitem__)
    if best in chance or math.cos(math.radians(angles[best])) < LEAST:
        return ""
    rest = mean_cosine(angle for name, angle in angles.items() if name != best)
    if rest is None or rest >= REST * gamma:
        return ""
    return f"one layer carries Γ: {gamma:.3f}, and {rest:.3f} without {best or '(model)'}"


def _say(names: dict[str, str] | list[str], what: str, most: int = 8) -> str:
    if not names:
        return ""
    shown = [(name or "(model)") + (f" ({names[name]})" if isinstance(names, dict) else "") for name in names]
    return f"{what}: {some(shown, most)}"


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)
