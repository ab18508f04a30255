"""One matrix that several layers learn: what each has learned becomes one again.

Where a structure has one matrix for all layers (:attr:`~rewire.structures.Structure.joint`), a rule that learns gives
each layer the B that it would have learned alone. The matrix is then the mean of these, each divided by its layer's
scale: column by column, over the layers that have the column and learned something just now. Every layer keeps its own
columns of it, in full, so that each is complete in any file and any copy of a part of the model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewire import buffers
from rewire.rules.base import LearnedDirect

if TYPE_CHECKING:
    from rewire.state import LayerState
    from rewire.wiring import Wiring

Member = tuple["LayerState", str]  # a layer, and the name of the buffer that has its columns


def agree(wiring: Wiring, taught: set[Member]) -> None:
    """Make what some layers have learned, each alone, one matrix for all layers that have columns of it.

    Args:
        taught: those that have learned something just now.
    """
    groups: dict[Hashable, list[Member]] = {}
    for state in wiring.layers.values():
        for name, group in _of(state):
            groups.setdefault(group, []).append((state, name))
    groups = {group: all_of for group, all_of in groups.items() if not taught.isdisjoint(all_of)}
    for all_of in groups.values():
        among = [member for member in all_of if member in taught]
        matrix = mean([state.learned[name] for state, name in among])
        if all(isinstance(state.rule, LearnedDirect) and state.rule.keeps_norm for state, _ in among):
            matrix = matrix * _what_averaging_took(matrix, among)
        for state, name in all_of:
            own = state.learned[name]
            own[: len(matrix)].copy_(matrix[: len(own)])
            buffers.drop_copies(state)
    # All before any is made smaller: what is limited is B of all output layers together.
    limits = [(all_of, list(_limits(all_of))) for all_of in groups.values()]
    for all_of, factors in limits:
        if factors:
            factor = torch.stack([one.to(factors[0]) for one in factors]).min()
            for state, name in all_of:
                state.learned[name].mul_(factor.to(state.learned[name].device))


def join(state: LayerState, name: str) -> None:
    """Let columns that were just drawn be those of the matrix, as far as other layers have learned it."""
    mine = next((group for found, group in _of(state) if found == name), None)
    others = [
        other.learned[found]
        for other in state.wiring.layers.values()
        if mine is not None and other is not state
        for found, group in _of(other)
        if group == mine
    ]
    if others:
        widest, own = max(others, key=len), state.learned[name]
        own[: len(widest)].copy_(widest[: len(own)])


def mean(matrices: Iterable[Tensor]) -> Tensor:
    """Of the first rows of one matrix, (rows, n) each: row by row, over those that have it."""
    found = list(matrices)
    widest = max(found, key=len)
    dtype = reduce(torch.promote_types, (t.dtype for t in found), torch.float32)
    total, count = widest.new_zeros(widest.shape, dtype=dtype), widest.new_zeros(len(widest), 1, dtype=dtype)
    for t in found:
        total[: len(t)] += t.to(total)
        count[: len(t)] += 1
    return total / count


def _what_averaging_took(matrix: Tensor, among: list[Member]) -> Tensor:
    """By what factor layers' columns of their mean are smaller than what each has learned: a mean of directions is."""
    learned = torch.stack([state.learned[name].to(matrix).square().sum() for state, name in among]).sum()
    left = torch.stack([matrix[: len(state.learned[name])].square().sum() for state, name in among]).sum()
    return (learned / left.clamp_min(torch.finfo(left.dtype).tiny)).sqrt()


def _limits(members: list[Member]) -> Iterator[Tensor]:
    """Factors, at most 1, that bring the norm of a layer's B down to what its rule lets it have."""
    for state, index in dict.fromkeys((state, buffers.index_of(state, name)) for state, name in members):
        if not isinstance(state.rule, LearnedDirect):
            continue
        most = state.rule.largest(buffers.memory_of(state, index))
        if most is not None:
            own = [state.learned[name] for name, _ in _of(state) if buffers.index_of(state, name) == index]
            norm = torch.stack([t.norm() for t in own]).norm() * (1.0 if state.scale is None else state.scale)
            yield (most.to(norm) / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(max=1)


def _of(state: LayerState) -> Iterator[tuple[str, Hashable]]:
    """The layer's columns of such matrices by the buffer's name, each with what tells which matrix it is."""
    kind = state.joint if state.learned else None
    if kind is not None:
        for name, tensor in state.learned.items():
            output = buffers.output_of(state, name)
            if output is not None:
                yield name, (kind, output, tensor.shape[1:])
