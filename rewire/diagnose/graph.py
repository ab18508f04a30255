"""What the autograd graph of plain backprop says: where the loss looks, what feeds what, which weights are bypassed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from rewire.bypass import direct_uses
from rewire.diagnose.watch import Pass, Seen
from rewire.nodes import Node
from rewire.rows import rows_below


class Flow:
    """Output calls of a pass, and which calls feed each.

    An output call is one that a gradient reached and that has no other call between itself and the loss. Layers
    that the rules' errors do not start at (kept on backprop where the output layers were named) do not count.

    Args:
        seen: of plain backprop, after a backward from the loss. Rows that may have been picked are looked for.
        weights: tensors that belong to each layer's own operation, by layer name.
        starts: whether a call's layer may be an output layer.

    Attributes:
        outputs: the output calls.
        only: whether everything that the loss sees goes through them.
        uses: names of layers whose weight multiplies activations outside of any call.
    """

    def __init__(self, seen: Pass, weights: Mapping[str, Iterable[Tensor]], starts: Callable[[Seen], bool]) -> None:
        root = seen.loss.grad_fn
        self._at = dict(seen.at)  # as calls left it: an in-place operation later gives an output another node
        roots = [] if root is None else [root]
        outputs: list[Seen] = []
        self._feeders: dict[Seen, set[Seen]] = {}
        self._rows: dict[Seen, dict[Seen, Callable[[Tensor], Tensor]]] = {}
        self.only = True
        for call in seen:  # what was hidden in the forward
            call.pick = None if call.pick is None else call.pick.found()
        for wiring in {id(call.state.wiring): call.state.wiring for call in seen}.values():

            def ends(call: Seen, wiring: object = wiring) -> bool:
                return call.state.wiring is wiring and starts(call) and call.delta is not None

            first = [call for call in _upstream(self._at, roots, ends) if ends(call)]
            for call in first:
                self._feeders[call] = set(_upstream(self._at, call.sources))
                self._rows[call] = self._rows_of(call)
            found = [call for call in first if not any(call in self._feeders[o] for o in first if o is not call)]
            self.only &= len(found) == len(first)
            outputs += found
        self.outputs = outputs
        met = {
            id(weight)
            for weight in direct_uses(roots, lambda node: self._at[node].sources if node in self._at else None)
        }
        self.uses = {name for name, tensors in weights.items() if any(id(t) in met for t in tensors)}
        self._at = {}  # or the graph, with all the weights on it, would live as long as this

    def downstream(self, call: Seen) -> list[Seen]:
        """The output calls of the same conversion that ``call`` feeds, itself included."""
        wiring = call.state.wiring
        return [o for o in self.outputs if o.state.wiring is wiring and (o is call or call in self._feeders[o])]

    def rows(self, call: Seen, output: Seen) -> Callable[[Tensor], Tensor] | None:
        """What makes of the error at ``output`` what ``call`` feeds of it, row by row; None where that is all of it."""
        return self._rows[output].get(call) if call.pick is None else None

    def _rows_of(self, output: Seen) -> dict[Seen, Callable[[Tensor], Tensor]]:
        y = output.outputs[0]
        picked = output.pick is not None
        return rows_below(output.sources, output.state, y.shape, picked, self._at.get, lambda below: below.sources)


def may_be_outputs(seen: Pass, starts: Callable[[Seen], bool]) -> set[Seen]:
    """Those among which the output calls are, before a backward has shown which of them a gradient reaches."""
    found: set[Seen] = set()
    roots = [] if seen.loss.grad_fn is None else [seen.loss.grad_fn]
    for wiring in {id(call.state.wiring): call.state.wiring for call in seen}.values():

        def ends(call: Seen, wiring: object = wiring) -> bool:
            return call.state.wiring is wiring and starts(call)

        found |= {call for call in _upstream(seen.at, roots, ends) if ends(call)}
    return found


def _upstream(
    at: Mapping[Node, Seen], roots: Iterable[Node], stop: Callable[[Seen], bool] = lambda _: False
) -> list[Seen]:
    found: dict[Seen, None] = {}
    visited: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        call = at.get(node)
        if call is None:
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        elif call not in found:
            found[call] = None
            if not stop(call):
                stack.extend(call.sources)
    return list(found)
