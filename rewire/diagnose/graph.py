"""What the autograd graph of plain backprop says: where the loss looks, what feeds what, which weights are bypassed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewire.diagnose.watch import Node, Pass, Seen


class Flow:
    """Output calls of a pass, and which calls feed each.

    An output call is one that a gradient reached and that has no other call between itself and the loss. Layers
    that the rules' errors do not start at (kept on backprop where the output layers were named) do not count.

    Args:
        seen: of plain backprop, after a backward from the loss.
        weights: tensors that belong to each layer's own operation, by layer name.
        starts: whether a call's layer may be an output layer.

    Attributes:
        outputs: the output calls.
        only: whether everything that the loss sees goes through them.
        uses: names of layers whose weight multiplies activations outside of any call.
    """

    def __init__(self, seen: Pass, weights: Mapping[str, Iterable[Tensor]], starts: Callable[[Seen], bool]) -> None:
        root = seen.loss.grad_fn
        self._at = {y.grad_fn: call for call in seen for y in call.outputs if y.grad_fn is not None}
        roots = [] if root is None else [root]
        outputs: list[Seen] = []
        self._feeders: dict[Seen, set[Seen]] = {}
        self.only = True
        for wiring in {id(call.state.wiring): call.state.wiring for call in seen}.values():

            def ends(call: Seen, wiring: object = wiring) -> bool:
                return call.state.wiring is wiring and starts(call) and call.delta is not None

            first = [call for call in self._upstream(roots, ends) if ends(call)]
            for call in first:
                self._feeders[call] = set(self._upstream(call.sources))
            found = [call for call in first if not any(call in self._feeders[o] for o in first if o is not call)]
            self.only &= len(found) == len(first)
            outputs += found
        self.outputs = outputs
        self.uses = self._direct_uses(roots, weights)

    def downstream(self, call: Seen) -> list[Seen]:
        """The output calls of the same conversion that ``call`` feeds, itself included."""
        wiring = call.state.wiring
        return [o for o in self.outputs if o.state.wiring is wiring and (o is call or call in self._feeders[o])]

    def _upstream(self, roots: Iterable[Node], stop: Callable[[Seen], bool] = lambda _: False) -> list[Seen]:
        found: dict[Seen, None] = {}
        visited: set[Node] = set()
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            call = self._at.get(node)
            if call is None:
                stack.extend(parent for parent, _ in node.next_functions if parent is not None)
            elif call not in found:
                found[call] = None
                if not stop(call):
                    stack.extend(call.sources)
        return list(found)

    def _direct_uses(self, roots: Iterable[Node], weights: Mapping[str, Iterable[Tensor]]) -> set[str]:
        """Layers whose weight meets an activation in a product that is not part of a call."""
        owners: dict[int, set[str]] = {}
        for name, tensors in weights.items():
            for tensor in tensors:
                owners.setdefault(id(tensor), set()).add(name)
        known: dict[Node, _Made] = {}
        used: set[str] = set()
        stack = list(roots)
        while stack:
            node = stack[-1]
            call = self._at.get(node)
            if node in known:
                stack.pop()
            elif call is not None:
                known[node] = _Made(frozenset(), call=True, other=False)
                stack.extend(call.sources)
            else:
                parents = [parent for parent, _ in node.next_functions if parent is not None]
                waiting = [parent for parent in parents if parent not in known]
                if waiting:
                    stack.extend(waiting)
                    continue
                made = [known[parent] for parent in parents]
                known[node] = _made(node, made, owners)
                used.update(*_met(node, made))
        return used


@dataclass(frozen=True)
class _Made:
    """What the value of a node outside of calls is made of: weights of layers, outputs of calls, anything else."""

    weights: frozenset[str]
    call: bool
    other: bool


def _made(node: Node, parents: list[_Made], owners: Mapping[int, set[str]]) -> _Made:
    variable = getattr(node, "variable", None)
    if variable is not None:
        mine = owners.get(id(variable))
        return _Made(frozenset(mine or ()), call=False, other=mine is None and variable.numel() > 1)
    weights: frozenset[str] = frozenset().union(*(p.weights for p in parents))
    return _Made(weights, any(p.call for p in parents), any(p.other for p in parents))


def _met(node: Node, parents: list[_Made]) -> Iterator[frozenset[str]]:
    """Weights that meet an activation in ``node``: a penalty on weights is no use of them, and a sum is none."""
    name = node.name().removesuffix("Backward0").removesuffix("Backward1")
    own = isinstance(node, torch.autograd.function.BackwardCFunction)  # an operation of one's own may do anything
    if name not in _PRODUCTS and name != "Mul" and not own:
        return
    for i, made in enumerate(parents):
        others = parents[:i] + parents[i + 1 :]
        if made.weights and not made.call and any(o.call or (o.other and name != "Mul") for o in others):
            yield made.weights


_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Dot", "Linear", "Convolution", "Einsum")
