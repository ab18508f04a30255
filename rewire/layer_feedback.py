"""The feedback of one layer, made from its seed and kept until copies or another device want it made again.

B of a direct rule belongs to one input and one output layer, and has the shape that passes ask for; R of a local
rule has the weight's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewire import agree, buffers, first_use
from rewire.feedback import quick_normal, standard_normal, streams
from rewire.rules.base import LearnedDirect, LocalRule, parts_of
from rewire.structures import Feedback, Place, Structure

if TYPE_CHECKING:
    from rewire.state import LayerState


_SIZES = 8  # of one input, whose B are kept


def B_of(
    state: LayerState,
    structure: Structure,
    output: str,
    index: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | Feedback:
    """B of a direct rule: its entries have standard deviation ``scale``, or 1 while that is not known."""
    if torch.is_inference_mode_enabled():  # it will be used, and may learn, in passes that train
        with torch.inference_mode(False):
            return B_of(state, structure, output, index, shape, dtype, device)
    wiring = state.wiring
    stream, suffix = streams(state.name, index, output, wiring.outputs)
    scale = 1.0 if state.scale is None else state.scale
    place = Place(wiring.seed, stream, suffix, shape, scale, dtype, device, wiring.common)
    if not state.learns:
        same = (structure, output, index, shape)
        kept = reversed(changed_feedback(state)[0].items())
        changed: Tensor | None = next((B for key, B in kept if key[:4] == same), None)
        if changed is not None:
            return changed.to(device=device, dtype=structure.kept(place))
        fixed = structure.make(place)
        if not isinstance(fixed, Feedback):
            first_use.shape_of_B(structure, "make", state.label, fixed, shape)
        return fixed
    name = buffers.name_of(state, "B", index, output)
    held = state.learned.get(name)
    needed = structure.own_shape(shape)
    if held is None or held.shape != needed:
        if held is not None:
            state.wiring.warn_once(
                f"anew:{state.name}",
                f"layer {state.label}: what its feedback has learned, of shape {tuple(held.shape)}, does not fit, as "
                f"{needed} is needed here: it starts anew. Inputs of several sizes want feedback='channel'",
            )
        wide = torch.promote_types(dtype, torch.float32)
        # Small steps would be lost in what a structure keeps in few bits.
        drawn = structure.draw(replace(place, dtype=wide))
        first_use.shape_of_B(structure, "draw", state.label, drawn, needed)
        held = state.learned[name] = drawn.to(wide)
        if structure.joint is not None:
            agree.join(state, name)
        buffers.unlink(state)
    if structure.joint is not None and state.scale is not None:
        buffers.note_scale(state)
    made = structure.around(place, held)
    if isinstance(made, Feedback) or any(
        isinstance(part, LearnedDirect) and part.context for part in parts_of(state.given)
    ):
        buffers.note_seed(state)
    return made


def made_for(
    state: LayerState,
    output: str,
    index: int,
    shape: tuple[int, ...],
    like: tuple[torch.dtype, torch.device] | None = None,
) -> Tensor | Feedback:
    """B for one input and output layer, of the dtype and on the device of ``like``.

    Without that as the last pass needed it; float32 on the CPU if none of this process did.
    """
    dtype, device = like or state.kept_as.get((output, index), (torch.float32, torch.device("cpu")))
    key = (state.structures[output, index], output, index, shape, dtype, device)
    made = state.made  # as in rewire.ways
    found = made.get(key)
    return keep(state, made, key) if found is None else found


def keep(state: LayerState, made: Kept, key: tuple[Any, ...]) -> Tensor | Feedback:
    """Make B, and keep it in ``made``. Of many sizes of inputs that is so for the newest; others are made again.

    Args:
        key: what :func:`B_of` is called with.
    """
    others = [k for k, B in tuple(made.items()) if k[1:3] == key[1:3] and k[3] != key[3] and not _is_changed(B)]
    sizes = list(dict.fromkeys(k[3] for k in others))  # of B of this output layer and input, the oldest first
    if len(sizes) >= _SIZES and not state.learns:
        for k in others:
            if k[3] == sizes[0]:
                made.pop(k, None)
        state.routes = {}  # they hold it too
        state.wiring.warn_once(
            "sizes",
            f"layer {state.label} gets inputs of more than {_SIZES} sizes, and each has feedback of its own, "
            f"{'×'.join(map(str, key[3]))} numbers now: only the newest {_SIZES} are kept, others are drawn again. "
            "feedback='channel' has the same for all sizes",
        )
    B = made[key] = B_of(state, *key)
    return B


def held_B(state: LayerState, output: str, index: int) -> Tensor:
    """What learns of B, which is all of it or what its structure keeps; every copy is made from it."""
    name = buffers.name_of(state, "B", index, output)
    if name not in state.learned:
        made_for(state, output, index, state.shapes[output, index])
    return state.learned[name]


def dense_feedback(state: LayerState, module: nn.Module) -> dict[tuple[str, int], Tensor]:
    """The dense B by (output layer, input), as used last; made again where a copy of the model dropped it."""
    used: dict[tuple[str, int], Tensor | Feedback] = {}
    for (structure, output, index, shape, *like), feedback in state.made.items():
        place = (output, index)
        last = state.structures.get(place), state.shapes.get(place), state.kept_as.get(place)
        if (structure, shape, tuple(like)) == last:
            used[place] = feedback
    near = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    for (output, index), shape in state.shapes.items():
        if (output, index) not in used:  # and is what will be used from now on
            at = state.kept_as.get((output, index))
            if at is None or at[1] != near.device:
                at = near.dtype, near.device
            used[output, index] = made_for(state, output, index, shape, at)
    return {place: B.dense() if isinstance(B, Feedback) else B for place, B in used.items()}


def all_made(state: LayerState, output: str, index: int) -> Iterator[Tensor]:
    """The dense B for every shape of an input that there has been."""
    for (_, above, number, *_), B in state.made.items():
        if (above, number) == (output, index):
            yield B.dense() if isinstance(B, Feedback) else B


def keeps_tensors(state: LayerState) -> bool:
    """Whether all its direct feedback is plain tensors."""
    return all(isinstance(made_for(state, *place, shape), Tensor) for place, shape in state.shapes.items())


# What LayerState.made and LayerState.randoms hold: tensors, and what a direct rule needs in place of one.
Kept = dict[tuple[Any, ...], Any]


def changed_feedback(state: LayerState) -> tuple[Kept, Kept]:
    """Of fixed feedback (B of direct rules, R of local ones) what somebody changed in place: no seed gives it again."""
    made: Kept = {} if state.learns else state.made  # threads may add to it
    return {key: B for key, B in tuple(made.items()) if _is_changed(B)}, changed_randoms(state)


def changed_randoms(state: LayerState) -> Kept:
    """The second of :func:`changed_feedback`."""
    return {key: R for key, R in state.randoms.items() if _is_changed(R)}


def _is_changed(B: Tensor | Feedback) -> bool:
    # Copies, and what was read from files, count too: PyTorch makes them by a change in place.
    return isinstance(B, Tensor) and not B.is_inference() and B._version > 0


def random(
    state: LayerState, rule: LocalRule, shape: torch.Size, dtype: torch.dtype, device: torch.device, draw: int = 0
) -> Tensor:
    """R of a local rule: N(0, std^2), or its magnitude. Kept, unless it is a redraw."""
    assert state.std is not None
    if draw:
        drawn = quick_normal(
            shape, seed=state.wiring.seed, name=state.name, draw=draw, scale=state.std, magnitude=rule.magnitude
        )
        return drawn.to(device=device, dtype=dtype)
    key = (shape, dtype, device, rule.magnitude)
    found = state.randoms.get(key)
    if found is None:
        changed = changed_randoms(state)
        same = next((R for k, R in reversed(changed.items()) if (k[0], k[-1]) == (shape, rule.magnitude)), None)
        if same is not None:
            found = same.to(device=device, dtype=dtype)
        else:
            unit = standard_normal(shape, seed=state.wiring.seed, name=state.name)
            found = ((unit.abs_() if rule.magnitude else unit) * state.std).to(device=device, dtype=dtype)
        state.randoms = {**changed, key: found}
    return found
