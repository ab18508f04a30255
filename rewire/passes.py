"""One pass: which calls of which layers fed which output, and that output's error.

A pass is not a global state but what the autograd graph says it is. Every call of a converted layer
leaves a :class:`Call` on the graph node of its output. When an output layer runs, :func:`upstream` walks
the graph from its input and finds exactly the calls that feed it. So two models, two threads, two forwards
before one backward, a forward that never gets a backward, or a submodule called without its root cannot
mix: they are different graphs. A `detach()` in the model separates what it separates for backprop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewire import first_use
from rewire.nodes import Node
from rewire.picks import Pick
from rewire.rules.base import DirectRule
from rewire.structures.base import Cache

if TYPE_CHECKING:
    from rewire.state import LayerState
    from rewire.wiring import Wiring

_LEAF: type = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
_ALWAYS = -3  # in place of the number of a backward pass
CALL = "rewire.call"  # where a call lies in the metadata of its output's graph node


# () -> a number for the backward pass this thread is in, -1 outside of one.
backward_id: Callable[[], int] = torch._C._current_graph_task_id


class OutputError:
    """The error e at one output layer's output in one pass; filled in by the backward.

    Attributes:
        state: the output layer.
        axis: dimension of e with the n output features.
        shared: what structures of feedback make of e once per pass, for all layers.
        above: errors further downstream. If a gradient came from one of them, this layer was not where the
            loss looked, and e here counts for nobody: neither then nor in later backwards of the pass.
        nested: the output layer ran inside a backward pass.
        pick: how the rows of the output layer's input, and so of e, were picked from the batch, if they were.
        ports: how many inputs of upstream calls will ask for e.
        voted: this pass counted towards the layer being an output layer.
        straight: it was looked for what puts rows elsewhere, and nothing below does.
    """

    __slots__ = (
        "_arrived",
        "_hidden",
        "_pending",
        "_seen",
        "_signals",
        "_whole",
        "above",
        "axis",
        "error",
        "nested",
        "pick",
        "ports",
        "shared",
        "state",
        "straight",
        "targets",
        "voted",
    )

    def __init__(self, state: LayerState, axis: int, targets: Tensor | None) -> None:
        self.state = state
        self.axis = axis
        self.targets = targets
        self.above: list[OutputError] = []
        self.error: Tensor | None = None
        self.nested = False
        self.pick: Pick | None = None
        self.ports = 0
        self.voted = False
        self.straight = False
        self._seen = -2  # the newest backward pass in which any gradient came by here
        self._arrived = -2  # the newest one in which it was the output error
        self._hidden = False
        self._pending = 0
        self._signals: dict[DirectRule, Tensor]
        self._whole: dict[DirectRule, Tensor]
        self.shared: Cache

    def deliver(self, gradient: Tensor) -> bool:
        """Take the gradient at this layer's output; True if it is an output error."""
        now = backward_id()
        self._seen = now
        if self._hidden or (self.above and any(error._seen == now for error in self.above)):
            self._hidden = True
            return False
        self._arrived = now
        if self.pick is not None:
            self.pick = self.pick.found()
        self.state.called = False
        self._pending = self.ports
        self.error = gradient
        self._signals, self._whole = {}, {}
        self.shared = {}
        return True

    def here(self) -> bool:
        """Whether e arrived in the backward pass under way."""
        return self._arrived == backward_id() or self._arrived == _ALWAYS

    def stand(self) -> None:
        """An e that arrived counts in all later backward passes too (a streamed pass has many)."""
        self._arrived = _ALWAYS

    def signal(self, rule: DirectRule) -> Tensor:
        """What ``rule`` makes of e, computed once per pass for all layers."""
        assert self.error is not None
        if rule not in self._signals:
            if type(rule) in self.state.looked:
                made = rule.signal(self.error, self.targets, self.axis)
            else:
                made = first_use.signal(rule, self.state.label, self.error, self.targets, self.axis)
                self.state.looked |= {type(rule)}
            self._signals[rule] = made
        return self._signals[rule]

    def whole(self, rule: DirectRule) -> Tensor:
        """:meth:`signal`, with picked rows back at their places in the batch."""
        if self.pick is None:
            return self.signal(rule)
        if rule not in self._whole:
            self._whole[rule] = self.pick.put(self.signal(rule))
        return self._whole[rule]

    def let_go(self) -> None:
        """Forget e if no port will ask for it."""
        if self._pending <= 0:
            self.error = None
            self._signals, self._whole = {}, {}
            self.shared = {}

    def used(self) -> None:
        """One port is done with e. After the last one e is let go: a loss kept around keeps no e alive."""
        self._pending -= 1
        self.let_go()


class PartialError(OutputError):
    """e as a layer sees it that feeds only some of its rows, or each row of whose input goes to another row of e.

    Args:
        entire: e itself.
        rows: makes of e what the layer sees of it.
        unless: a call whose rows may have been picked by index: should the backward find so, it sees e itself.
    """

    __slots__ = ("entire", "rows", "unless")

    def __init__(self, entire: OutputError, rows: Callable[[Tensor], Tensor], unless: Call | None = None) -> None:
        # What is not set here is asked of ``entire``.
        self.entire = entire
        self.rows = rows
        self.unless = unless
        self.state, self.axis = entire.state, entire.axis

    @property
    def pick(self) -> Pick | None:  # type: ignore[override]
        return None if self._partial() else self.entire.pick

    def _partial(self) -> bool:
        lower = self.unless
        if lower is None:
            return True
        if lower.pick is not None and lower.pick.found() is not None:
            return False
        wiring = lower.state.wiring
        wiring.pours = True  # for the forwards to come
        wiring.unclear.discard(lower.state.name)
        return True

    @property
    def error(self) -> Tensor | None:  # type: ignore[override]
        return self.entire.error

    def here(self) -> bool:
        return self.entire.here()

    def signal(self, rule: DirectRule) -> Tensor:
        self.shared = {}  # of another tensor each time
        if not self._partial():
            return self.entire.signal(rule)
        return self.rows(self.entire.whole(rule))

    def whole(self, rule: DirectRule) -> Tensor:
        return self.signal(rule) if self._partial() else self.entire.whole(rule)

    def used(self) -> None:
        self.entire.used()


class Call:
    """One call of one layer: what the walk from an output layer needs to know about it.

    Attributes:
        state: the layer.
        sources: graph nodes of its inputs.
        tickets: outputs of its ports, to be handed to every output layer downstream.
        ports: how many of its inputs will ask for e: by a port, or by a probe, which has no ticket.
        errors: shared with the ports; every output layer downstream adds its e.
        own: errors at its own outputs, if it is (or may be) an output layer.
        feeders: for a layer with errors of its own: all calls upstream of it, so that no walk is done twice.
        pick: how its rows were picked from the batch, if they were.
        inputs: inside ``torch.func`` transforms, the input tensors themselves in place of tickets.
        index: number of the first of them.
        nested: it was made inside a backward pass.
        mirrored: (x, its shape, rule, B), if there is no ticket and the join itself hands e B to x. Let go in the
            backward that frees the graph.
    """

    __slots__ = (
        "errors",
        "feeders",
        "index",
        "inputs",
        "mirrored",
        "nested",
        "own",
        "pick",
        "ports",
        "sources",
        "state",
        "tickets",
    )

    def __init__(
        self,
        state: LayerState,
        sources: Sequence[Node],
        tickets: Sequence[Tensor],
        errors: list[OutputError],
        ports: int = 0,
    ) -> None:
        self.state = state
        self.ports = ports
        self.sources = sources
        self.tickets = tickets
        self.errors = errors
        self.own: tuple[OutputError, ...] = ()
        self.feeders: Sequence[Call] = ()
        self.pick: Pick | None = None
        self.inputs: Sequence[Tensor] = ()
        self.index = 0
        self.nested = False
        self.mirrored: tuple[Tensor, torch.Size, DirectRule, Tensor] | None = None


def metadata(node: Node) -> dict[Any, Any]:
    """A dict that lives on a graph node, exactly as long as the graph does."""
    found: Any = node.metadata
    return found  # type: ignore[no-any-return]


def leave(node: Node, call: Call) -> None:
    """Put ``call`` on the graph node of its output."""
    node.metadata[CALL] = call  # type: ignore[index]


def call_at(y: Tensor) -> Call | None:
    """The call whose output ``y`` is."""
    return None if y.grad_fn is None else metadata(y.grad_fn).get(CALL)


def call_of(node: Node) -> Call | None:
    """The call whose output ``node`` is of."""
    return metadata(node).get(CALL)


def call_sources(node: Node) -> Iterable[Node] | None:
    """Where a look at what lies between calls ends: at calls, each of which looks further itself."""
    return () if CALL in metadata(node) else None


def picked(node: Node) -> Pick | None:
    """How the rows of the call whose output ``node`` is were picked; KeyError if it is no call's."""
    call: Call = metadata(node)[CALL]
    return call.pick


def upstream(sources: Iterable[Node], wiring: Wiring) -> list[Call]:
    """All calls of layers of ``wiring`` on the way from the graph's leaves to ``sources``."""
    found: dict[Call, None] = {}  # in the order they were met
    seen: set[Node] = set()
    stack = [*sources]
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        call: Call | None = node.metadata.get(CALL)
        if call is None:
            for parent, _ in node.next_functions:
                if parent is not None and type(parent) is not _LEAF:
                    stack.append(parent)
            continue
        # From here only the inputs matter; how the layer's own weights were made does not.
        if call.state.wiring is not wiring:
            wiring.met(call.state)
        elif call not in found:
            found[call] = None
            if call.own:
                found.update(dict.fromkeys(call.feeders))
                continue
        stack += call.sources
    return [*found]
