"""What ``convert(on_nonfinite=...)`` watches: gradients that are not finite, errors of zero, exploding feedback.

Looked at is the gradient at the output of every layer, as it arrives there: at an output layer that is the output error
e, elsewhere what the layers above made of it. It is dropped, or the pass ended, before it reaches the layer's own
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rewire.errors import PassError
from rewire.passes import CALL, Call, metadata

if TYPE_CHECKING:
    from rewire.state import LayerState

MODES = ("warn", "skip", "raise")
FACTOR = 1000.0  # growth that counts as an explosion
RECORDED = 10  # passes in which sizes are recorded
PATIENCE = 100  # gradients of one layer skipped in a row before that is an error

_transforming = torch._C._are_functorch_transforms_active


@dataclass
class Start:
    """Largest root mean squares in the first passes: of any layer's gradient, of e, and of one over the other.

    Only where a gradient outgrows all of them has something exploded: a branch that starts at zero may grow from there,
    and a gradient scaler changes all sizes alike.
    """

    passes: int = 0
    size: float = 0.0
    error: float = 0.0
    gain: float = 0.0


@dataclass
class Guard:
    """One conversion's watch.

    Attributes:
        mode: one of ``MODES``.
        start: what sizes were at first.
        skipped: how many gradients in a row were skipped, by layer.
        error: root mean square of the newest e.
    """

    mode: str
    start: Start = field(default_factory=Start)
    skipped: dict[str, int] = field(default_factory=dict)
    error: float = 0.0

    def watch(self, state: LayerState, output: Any) -> None:
        """Look at the gradients that will arrive at what a call of the layer returned."""
        nodes = {y.grad_fn for y in tree_leaves(output) if isinstance(y, Tensor) and y.grad_fn is not None}
        for node in nodes:
            node.register_prehook(partial(self._look, state, metadata(node).get(CALL)))

    def _look(self, state: LayerState, call: Call | None, gradients: Sequence[Tensor | None]) -> Any:
        """Hook of the node of the layer's output: None, or what to pass on in place of the gradients."""
        present = [g for g in gradients if g is not None and g.is_floating_point() and g.numel()]
        if not present or _transforming():  # inside transforms values cannot be looked at
            return None
        problem = self._problem(state, present)
        if problem is None:
            self.skipped.pop(state.name, None)
            return None
        if self.mode == "raise":
            raise PassError(f"{problem}. on_nonfinite='skip' leaves such gradients out, None does not look")
        kind = problem.partition(" is ")[2][:8]
        if self.mode == "warn":
            state.wiring.warn_once(f"guard:{state.name}:{kind}", f"{problem} (said once for this layer)")
            return None
        count = self.skipped[state.name] = self.skipped.get(state.name, 0) + 1
        if count >= PATIENCE:
            raise PassError(
                f"{problem}; so were the {count} before it, and all were skipped: the layer is not trained any more. A "
                "gradient scaler has to see such gradients to lower its scale: use on_nonfinite=None with it"
            )
        state.wiring.warn_once(
            f"guard:{state.name}:{kind}",
            f"{problem}; it is skipped, and no parameter that it would reach gets anything",
        )
        for error in [] if call is None else call.own:
            error.error = None  # of an earlier backward of the same pass
        return (None,) * len(gradients)

    def look_first(self, state: LayerState, error: Tensor) -> None:
        """Look at an output error that is found before any hook sees it: only what ends the pass is of interest."""
        if self.mode == "raise" and not bool(error.isfinite().all()):
            self._look(state, None, [error])

    def _problem(self, state: LayerState, gradients: list[Tensor]) -> str | None:
        """What is wrong, in words. One number of each gradient tells, in nearly all cases: its norm."""
        output = state.role.value == "output"
        what = (
            f"layer {state.label}: the output error" if output else f"layer {state.label}: the gradient at its output"
        )
        norms = [torch.linalg.vector_norm(g.detach(), dtype=_wide(g)) for g in gradients]
        norm = math.hypot(*(float(n) for n in norms))
        count = sum(g.numel() for g in gradients)
        if not math.isfinite(norm):
            bad = sum(int((~g.isfinite()).sum()) for g in gradients)
            if bad:
                return f"{what} is not finite ({bad} of {count} numbers are NaN or infinite)"
        if norm == 0.0:
            zero = output and not any(bool(g.any()) for g in gradients)
            return f"{what} is all zeros: nothing can be learned from this pass" if zero else None
        return self._grown(what, norm / math.sqrt(count), output)

    def _grown(self, what: str, size: float, output: bool) -> str | None:
        start = self.start
        gain = 0.0 if output or not self.error else size / self.error
        if output:
            self.error = size
        largest = start.error if output else start.size
        if start.passes < RECORDED:
            start.passes += output
            if math.isfinite(size):
                if output:
                    start.error = max(start.error, size)
                else:
                    start.size, start.gain = max(start.size, size), max(start.gain, gain)
            return None
        exploded = largest > 0 and size > FACTOR * largest and (output or gain > FACTOR * start.gain)
        if not exploded:
            return None
        first = "it was at most" if output else "that of any layer was at most"
        return f"{what} is exploding: root mean square {size:.3g}, where {first} {largest:.3g} in the first passes"

    def recorded(self) -> dict[str, Any]:
        """For a saved configuration."""
        return {"mode": self.mode, **asdict(self.start)}


def _wide(g: Tensor) -> torch.dtype:
    """A type in which squares of half-precision numbers neither overflow nor vanish."""
    return torch.float64 if g.dtype is torch.float64 else torch.float32
