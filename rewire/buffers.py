"""Feedback of direct rules that learns, as buffers of the layer's module: what they are called, and what is in them.

The layer's state has the tensors too, by the same names; whichever of the two was changed, loaded or moved, they are
made one again.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewire.structures import Feedback

if TYPE_CHECKING:
    from rewire.state import LayerState

# What it is, of which input, of which output layer.
_NAME = re.compile(r"([A-Za-z]+)(?:_(\d+))?(?:_at_(.*))?")
_SCALE = "scaled_by"  # no name of what a rule remembers


def name_of(state: LayerState, what: str, index: int, output: str = "") -> str:
    """Name of one tensor of it; every output layer but the first has feedback of its own."""
    further = f"_at_{output.replace('.', '_')}" if output and state.wiring.outputs.index(output) > 0 else ""
    return f"{state.tag}{what}{f'_{index}' if index else ''}{further}"


def index_of(state: LayerState, name: str) -> int:
    """Of which input a tensor of it is."""
    parts = _NAME.fullmatch(name.removeprefix(state.tag))
    return int(parts[2] or 0) if parts is not None else 0


def output_of(state: LayerState, name: str) -> str | None:
    """Of which output layer a B is, as its name has it: "" for the first; None for what is no B."""
    parts = _NAME.fullmatch(name.removeprefix(state.tag))
    return (parts[3] or "") if parts is not None and parts[1] == "B" else None


def memory_of(state: LayerState, index: int) -> dict[str, Tensor]:
    """What the rule keeps besides B, by name."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.learned.items():
        parts = _NAME.fullmatch(name.removeprefix(state.tag))
        if parts is not None and parts[1] not in ("B", "passes", "origin") and int(parts[2] or 0) == index:
            found[parts[1]] = tensor
    return found


def remember(state: LayerState, index: int, memory: dict[str, Tensor]) -> None:
    """Keep what the rule has changed, and let nobody use an older B."""
    kept = {name_of(state, what, index): tensor for what, tensor in memory.items()}
    kept[f"{state.tag}passes"] = _counts(state)  # kept up to date by save()
    for name, tensor in kept.items():
        before = state.learned.get(name)
        if before is not None and before.shape == tensor.shape and before.dtype == tensor.dtype:
            if before is not tensor:
                before.copy_(tensor)
        else:
            state.learned[name] = tensor
            unlink(state)
    drop_copies(state)


def keep_count(state: LayerState) -> None:
    """From now on the number of passes is saved with the module."""
    state.learned.setdefault(f"{state.tag}passes", _counts(state))
    unlink(state)


def note_seed(state: LayerState) -> None:
    """Save with the module which seed its feedback belongs to: what of it does not learn is made from that."""
    name = f"{state.tag}origin"
    if name not in state.learned:
        state.learned[name] = _origin(state)
        unlink(state)


def note_scale(state: LayerState) -> None:
    """Save with the module the scale of feedback that is kept without it."""
    assert state.scale is not None
    mantissa, exponent = math.frexp(state.scale)
    # Whole numbers: others would be cast, and rounded, with the module.
    exact, name = torch.tensor([int(mantissa * 2**53), exponent - 53]), f"{state.tag}{_SCALE}"
    before = state.learned.get(name)
    if before is None or not torch.equal(before.cpu(), exact):
        state.learned[name] = exact
        unlink(state)


def other_seed(state: LayerState, state_dict: dict[str, Any], prefix: str) -> str | None:
    """What is wrong with feedback about to be loaded that was learned under another seed; None if nothing is."""
    saved = state_dict.get(f"{prefix}{state.tag}origin")
    if saved is None or torch.equal(saved.cpu(), _origin(state)):
        return None
    return (
        f"layer {state.label}: what its feedback has learned goes with random numbers of another seed than "
        f"{state.wiring.seed}, that of this conversion: convert(model, ..., seed=...) as the saved model was"
    )


def _origin(state: LayerState) -> Tensor:
    digest = hashlib.blake2b(str(state.wiring.seed).encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def _counts(state: LayerState) -> Tensor:
    return torch.tensor([state.wiring.passes, state.wiring.sampled])


def save(state: LayerState, module: nn.Module) -> None:
    """Before saving: everything is in the module, and so is the number of passes."""
    if state.learner is not None:
        state.learner.save(module)
        return
    passes = state.learned.get(f"{state.tag}passes")
    if passes is not None:
        passes.copy_(_counts(state))
    link(state, module)


def link(state: LayerState, module: nn.Module) -> None:
    """Make what was learned a part of the module."""
    for name, tensor in state.learned.items():
        if module._buffers.get(name) is not tensor:
            module.register_buffer(name, tensor)
    state.linked = True


def unlink(state: LayerState) -> None:
    """There is something new to be linked by the layer's next call."""
    state.linked = False
    state.steady = ""


def relink(state: LayerState, module: nn.Module) -> None:
    """The module's tensors may be others now: moved, cast, loaded."""
    if not state.saves or state.learner is not None:
        return
    found = {name: t for name, t in module._buffers.items() if name.startswith(state.tag) and t is not None}
    if not found:
        return
    state.learned = found
    passes = found.get(f"{state.tag}passes")
    if passes is not None:
        state.wiring.passes, state.wiring.sampled = (int(number) for number in passes)
    scale = found.get(f"{state.tag}{_SCALE}")
    if scale is not None:
        exact, exponent = scale.tolist()
        if state.scale != (kept := math.ldexp(exact, exponent)):
            state.scale, state.scale_note = kept, "learned, and loaded"
    if state.scale is None and state.joint is None and any(name.startswith(f"{state.tag}B") for name in found):
        state.scale, state.scale_note = 1.0, "learned, and loaded"
    state.forget_routes()
    state.turn()
    state.refresh()


def drop_copies(state: LayerState) -> None:
    """Forget copies of B in other dtypes or on other devices."""
    ours = {id(tensor) for tensor in state.learned.values()}
    if any(id(B.own if isinstance(B, Feedback) else B) not in ours for B in state.made.values()):
        state.forget_routes()
