"""The backward weight of one call under a local rule: made once, drawn anew, or given from outside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rewire import first_use
from rewire.errors import PassError
from rewire.exchange import exchangeable
from rewire.layers.kinds import BackwardWeight
from rewire.passes import backward_id
from rewire.rules.base import LocalRule
from rewire.stacked import given_local
from rewire.state import LayerState

# Looked up once: these run in every call of every layer.
_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


class LocalWeight(BackwardWeight):
    """The backward weight of a local rule. A redrawn R is made in the backward, and not kept."""

    def __init__(self, state: LayerState, rule: LocalRule, draw: int) -> None:
        self.state = state
        self.rule = rule
        self.keep = rule.uses_weight
        self.lasting = not rule.redraw
        self.draw = draw
        self.scale = 0.0
        self.fixed: Tensor | None = None
        self.looked = rule.redraw and state.wiring.looked  # one that is redrawn has another object for each call

    def random(self, weight: Tensor) -> Tensor | None:
        self.scale = self.state.local_scale(weight)
        self.state.random_as = (weight.shape, weight.dtype, weight.device)
        if self.rule.redraw:
            self.like = (weight.shape, weight.dtype, weight.device)
        elif self.rule.random:
            fixed = self.fixed
            if fixed is None or (fixed.shape, fixed.dtype, fixed.device) != (weight.shape, weight.dtype, weight.device):
                self.fixed = self.state.random(self.rule, weight.shape, weight.dtype, weight.device)
        return self.fixed

    def note(self, weight: Tensor) -> None:
        if self.rule.uses_weight and not _transforming():
            self.state.used = weight.detach()

    def combine(self, weight: Tensor | None, random: Tensor | None) -> Tensor:
        if self.rule.redraw:
            random = self.state.random(self.rule, *self.like, self.draw)
        if self.looked:
            return self.rule.backward_weight(weight, random, self.scale)
        assert self.state.random_as is not None
        made = first_use.backward_weight(
            self.rule, self.state.label, self.state.random_as[0], weight, random, self.scale
        )
        self.looked = True
        return made


class GivenWeight(BackwardWeight):
    """The backward weight of one of several models that run as one (:mod:`rewire.stacked`).

    R and s arrive in one tensor, as an input of the operation: what a transform is to map over cannot be a number
    that our code remembers.
    """

    lasting = False

    def __init__(self, state: LayerState, rule: LocalRule, packed: Tensor) -> None:
        self.state = state
        self.rule = rule
        self.packed = packed
        self.keep = rule.uses_weight

    def random(self, weight: Tensor) -> Tensor | None:
        self.shape = weight.shape
        if self.packed.numel() != 1 + (weight.numel() if self.rule.random else 0):
            raise PassError(f"layer {self.state.label}: the feedback given is not of the shape of its weight")
        return self.packed

    def combine(self, weight: Tensor | None, random: Tensor | None) -> Tensor:
        assert random is not None
        R = random[:-1].reshape(self.shape) if self.rule.random else None
        return self.rule.backward_weight(weight, R, random[-1])  # type: ignore[arg-type]


def local_weight(state: LayerState, rule: LocalRule) -> BackwardWeight:
    """What makes B in this call; the same object each time, unless R is drawn anew, or given from outside."""
    if _transforming() and (packed := given_local(state)) is not None:
        return GivenWeight(state, rule, packed)
    if rule.redraw:
        # A recomputation in backward is still the same pass: such have hooks on all that is saved. Without them it is
        # the first run with gradients (re-entrant checkpointing).
        if backward_id() == -1 or exchangeable():
            state.draws += 1
        return LocalWeight(state, rule, state.draws)
    made = state.local
    if not isinstance(made, LocalWeight) or made.rule is not rule:
        made = state.local = LocalWeight(state, rule, 0)
    return made
