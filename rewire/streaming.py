"""A streamed forward, which takes the calls of direct rules into its own hands (:mod:`rewire.stream`)."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

from rewire.layers.kinds import Forward
from rewire.passes import OutputError, backward_id
from rewire.rules.base import DirectRule
from rewire.state import LayerState
from rewire.wiring import Wiring


class Stream(Protocol):
    """A forward that takes the calls of direct rules into its own hands (:mod:`rewire.stream`).

    Attributes:
        wiring: the conversion it is about.
        joins: output layers are to be joined to the pass.
    """

    wiring: Wiring
    joins: bool

    def direct(
        self,
        state: LayerState,
        rule: DirectRule,
        module: nn.Module,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: int,
    ) -> Any:
        """In place of cutting the layer off from its input."""

    def has_cut(self, x: Tensor) -> bool:
        """Whether x was part of the graph until a layer was fed with it."""

    def joined(self, error: OutputError, y: Tensor) -> None:
        """An output layer was joined to the pass; ``y`` is its output."""


# Read only where skip connections are cut (a streamed pass cuts), and at output layers.
streaming: ContextVar[Stream | None] = ContextVar("rewire_streaming", default=None)


def stream_of(state: LayerState) -> Stream | None:
    """The streamed forward that this call is a part of; a recomputation in a backward is none."""
    stream = streaming.get()
    return stream if stream is not None and stream.wiring is state.wiring and backward_id() == -1 else None
