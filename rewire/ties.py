"""Weights that several modules have, as an output layer its embedding's.

Where one of two layers with the same weight runs, the weight is used by that layer, not the other's by another module;
and a weight that an embedding looks rows up in gets a gradient though the layer that has it too never ran.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from rewire.state import LayerState


def note_ties(model: nn.Module, states: dict[nn.Module, list[LayerState]]) -> None:
    """Before any pass: which layers have a weight that other layers, or other modules, have too."""
    held = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    first: dict[Tensor, list[LayerState]] = {}
    for layer, parts in states.items():
        for state in parts:
            weight = state.kind.own(layer) if state.kind.local else None
            if weight is None:
                continue
            state.shared = held[weight] > 1
            for other in first.setdefault(weight, []):
                tie(state, other)
            first[weight].append(state)


def tie(one: LayerState, other: LayerState) -> None:
    """Two layers have the same weight."""
    for state, twin in ((one, other), (other, one)):
        state.shared = True
        if not any(known is twin for known in state.twins):
            state.twins.append(twin)
