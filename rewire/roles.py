"""Which layers are output layers: what a backward pass shows of it, and what that means once the pass is over.

A layer whose gradient arrives before that of any layer below it is one whose output the loss sees. Passes vote, as a
side loss alone may come first.
"""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewire.errors import PassError
from rewire.exchange import refuse_second_order
from rewire.passes import backward_id

if TYPE_CHECKING:
    from rewire.passes import OutputError
    from rewire.state import LayerState
    from rewire.wiring import Wiring


class Role(Enum):
    """What the first pass showed a layer to be."""

    UNKNOWN = "not seen yet"
    HIDDEN = "hidden"
    OUTPUT = "output"


def error_reached(wiring: Wiring, state: LayerState, error: OutputError, gradient: Tensor) -> bool:
    """The gradient at the output of ``state`` is here. Whether it is the output error, not a hidden layer's own.

    Called in the backward of the layer's join, before any port upstream of it runs.
    """
    if wiring.swapped:
        wiring.swapped = False
        if torch.is_grad_enabled() and backward_id() != -1:
            refuse_second_order()
    is_output = error.deliver(gradient)
    if is_output and (error.nested or wiring.reentered):
        # With a part that is run again (re-entrant checkpointing) the graph does not show what lies above that part, or
        # in it. But a backward meets the output layer first.
        if wiring.outputs and state.name not in wiring.outputs:
            return is_output
        wiring.reentered = True
    if is_output and wiring.asked is not None and state.name not in wiring.asked:
        _unasked(wiring, state)
        return is_output
    if is_output:
        if wiring.unclear:
            wiring.say_unclear()
        if wiring.counts:
            wiring.passed = wiring.unsettled = True
        # Of many gradients at a time (is_grads_batched) PyTorch has no copy.
        try:  # noqa: SIM105 - suppress() takes longer than all the rest
            wiring.errors[state.name] = gradient.detach()
        except RuntimeError:
            pass
        if state.name not in wiring.outputs:
            wiring.outputs.append(state.name)
    if state.role is Role.OUTPUT:
        # Roles may be known from elsewhere, while no pass of this process has been looked at.
        if not wiring.looked:
            wiring.unsettled = wiring.news = True
        return is_output
    # Roles are votes of passes: a side loss alone may come first and look like the output.
    if is_output != error.voted:
        state.votes += 1 if is_output else -1
        error.voted = is_output
    state.seen = True
    wiring.unsettled = wiring.news = True
    return is_output


def _unasked(wiring: Wiring, state: LayerState) -> None:
    """Note an output layer that ``output=`` does not name; the error comes at the end, and names all."""
    if not wiring.unnamed:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(_refuse, wiring))
    wiring.unnamed.append(state.name)


def _refuse(wiring: Wiring) -> None:
    assert wiring.asked is not None
    unnamed, wiring.unnamed = tuple(dict.fromkeys(wiring.unnamed)), []
    seen = tuple(name for name in wiring.layers if name in unnamed or name in wiring.errors)
    more = f" (at other times too: output={[*wiring.asked, *unnamed]!r})" if set(wiring.asked) - set(seen) else ""
    raise PassError(
        f"the loss sees the output of layer{'s' * (len(unnamed) > 1)} {', '.join(map(repr, unnamed))}, which "
        f"output={_one_or_all(wiring.asked)} does not name. Write output={_one_or_all(seen)}, every layer that this "
        f"loss sees{more}; or keep what is not named on backprop, layers={dict.fromkeys(unnamed, 'bp')!r}"
    )


def _one_or_all(names: tuple[str, ...]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(list(names))


def take_in(wiring: Wiring) -> None:
    """Between passes: what layers are by the votes so far."""
    for state in wiring.layers.values():
        if state.seen and state.role is not Role.OUTPUT:
            state.role = Role.OUTPUT if state.votes > 0 else Role.HIDDEN
    wiring.certain = certain(wiring)
    _forget_hidden_outputs(wiring)


def certain(wiring: Wiring) -> bool:
    """Whether the role of every layer is known; frozen ones need none."""
    return all(state.role is not Role.UNKNOWN or state.idle for state in wiring.layers.values())


def _forget_hidden_outputs(wiring: Wiring) -> None:
    """A side loss came first: its layer is no output after all, and no feedback is named after it."""
    outputs = [name for name in wiring.outputs if wiring.layers[name].role is not Role.HIDDEN]
    if outputs != wiring.outputs:
        wiring.outputs = outputs
        wiring.errors = {name: e for name, e in wiring.errors.items() if name in outputs}
        for state in wiring.layers.values():
            state.forget_routes()
            state.shapes, state.structures = {}, {}
