"""Which parts of a pass can be back-propagated when: the pieces between fed-back tensors.

Under ``skip="cut"`` the gradient of a fed-back tensor is what was fed back and nothing else: it is a *wall*. Walls
cut the autograd graph into *pieces* that no gradient leaves. The gradients that enter a piece are those of its
walls (fed back, so known as soon as e is known) and, for the last one, the loss. So a piece can be back-propagated
and freed when the last layer that its walls feed is called.

In a chain a piece is one layer's operation and what follows up to the next layer. A residual stream that is not fed
back itself ties everything that is added to it to one piece, which is complete only at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rewire.nodes import Node
from rewire.passes import OutputError
from rewire.state import LayerState

END = 1 << 62  # "at the end of the pass", later than any call

Edge = tuple[Node, int]  # a graph node and which of its outputs: one tensor's place in the graph


@dataclass
class SeenWall:
    """A fed-back tensor in the first forward.

    Attributes:
        number: of the wall, in order of first use.
        time: autograd's running number of nodes when a layer was first fed with it.
        detachable: ``detach_`` can cut the tensor off its graph in place (impossible for views).
        last: the last call fed with it.
        uses: how many inputs of layers it is.
    """

    number: int
    time: int
    detachable: bool
    last: int
    uses: int = 1


@dataclass
class SeenCall:
    """A call of a layer under a direct rule in the first forward.

    Attributes:
        state: the layer.
        errors: output errors downstream; filled in when the output layers run.
        inputs: for each fed input its place among the flattened arguments, and its place in the graph or, for a
            leaf, the tensor itself.
    """

    state: LayerState
    errors: list[OutputError]
    inputs: list[tuple[int, Edge | Tensor]]


@dataclass(frozen=True)
class Wall:
    """A fed-back tensor as the second forward shall treat it.

    Attributes:
        piece: the piece above it.
        open: something has used the tensor before it was fed back (or will, and it cannot be detached): it stays
            connected, and a hook keeps other gradients out.
        detach: cut it off in place.
        uses: how many inputs of layers it is.
    """

    piece: int
    open: bool
    detach: bool
    uses: int


@dataclass
class Step:
    """One call of the second forward.

    Attributes:
        state, errors: as in :class:`SeenCall`.
        inputs: for each fed input its place among the flattened arguments, and its wall (None: a leaf).
        closes: pieces that are complete with this call.
        ready: parameters whose gradient is complete with this call.
    """

    state: LayerState
    errors: list[OutputError]
    inputs: list[tuple[int, int | None]]
    closes: list[int] = field(default_factory=list)
    ready: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """The second forward: its calls in order, and the walls they are fed with."""

    steps: list[Step]
    walls: list[Wall]


def plan(calls: list[SeenCall], walls: dict[Edge, SeenWall], loss: Tensor) -> Plan:
    """Find the pieces of a pass.

    Args:
        calls: those of the first forward, in order.
        walls: fed-back tensors by their place in the graph.
        loss: the scalar at the end of the first forward.
    """
    groups = _Groups()
    crossings: dict[Edge, list[Node]] = {}
    leaves: dict[int, tuple[Tensor, list[Node]]] = {}
    stack = [node for node, _ in walls]
    if loss.grad_fn is not None:
        stack.append(loss.grad_fn)
    seen = set(stack)
    while stack:
        node = stack.pop()
        for parent, output in node.next_functions:
            if parent is None:
                continue
            if (parent, output) in walls:
                crossings.setdefault((parent, output), []).append(node)
            elif (leaf := _leaf(parent)) is not None:
                leaves.setdefault(id(leaf), (leaf, []))[1].append(node)
                continue
            else:
                groups.unite(node, parent)
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)

    is_open: set[Edge] = set()
    for edge, users in crossings.items():
        wall = walls[edge]
        # What uses the tensor after it was cut off is not connected to it. What used it before is, and to free
        # the graph above it twice is an error: the two pieces are one.
        if not wall.detachable or any(_time(user) < wall.time for user in users):
            is_open.add(edge)
            for user in users:
                groups.unite(user, edge[0])

    closing: dict[Node, int] = {}
    for (node, _), wall in walls.items():
        group = groups.find(node)
        closing[group] = max(closing.get(group, -1), wall.last)
    if loss.grad_fn is not None:
        closing[groups.find(loss.grad_fn)] = END
    pieces = {group: number for number, group in enumerate(closing)}

    steps = [
        Step(
            call.state,
            call.errors,
            [(place, None if isinstance(x, Tensor) else walls[x].number) for place, x in call.inputs],
        )
        for call in calls
    ]
    for group, time in closing.items():
        if time != END:
            steps[time].closes.append(pieces[group])
    _find_ready(steps, calls, leaves, {node: closing[groups.find(node)] for node in seen})
    planned = [
        Wall(pieces[groups.find(edge[0])], edge in is_open, wall.detachable and edge not in is_open, wall.uses)
        for edge, wall in walls.items()
    ]
    return Plan(steps, planned)


def _find_ready(
    steps: list[Step],
    calls: list[SeenCall],
    leaves: dict[int, tuple[Tensor, list[Node]]],
    closing: dict[Node, int],
) -> None:
    """Note each leaf at the call with which its gradient is complete; not those that have to wait for the end."""
    times = {key: (leaf, max(closing[node] for node in nodes)) for key, (leaf, nodes) in leaves.items()}
    for time, call in enumerate(calls):
        for _, x in call.inputs:
            if isinstance(x, Tensor):
                times[id(x)] = (x, max(times[id(x)][1] if id(x) in times else -1, time))
    for leaf, time in times.values():
        if time != END:
            steps[time].ready.append(leaf)


def _time(node: Node) -> int:
    """Nodes are numbered in the order in which they are made, in each thread."""
    number: int = node._sequence_nr()
    return number


def _leaf(node: Node) -> Tensor | None:
    """The leaf tensor (parameter) whose gradient is accumulated here.

    Autocast keeps one cast of a parameter for all its uses; it saves nothing, so it ties no pieces together.
    """
    if node.name() == "ToCopyBackward0":
        parents = node.next_functions
        if len(parents) == 1 and parents[0][0] is not None:
            node = parents[0][0]
    if node.name() == "torch::autograd::AccumulateGrad":
        leaf: Tensor = node.variable  # type: ignore[attr-defined]
        return leaf
    return None


class _Groups:
    """Disjoint sets of graph nodes."""

    def __init__(self) -> None:
        self._above: dict[Node, Node] = {}
        self._sizes: dict[Node, int] = {}

    def find(self, node: Node) -> Node:
        """The node that stands for the set."""
        root = node
        while (above := self._above.get(root, root)) is not root:
            root = above
        while node is not root:
            self._above[node], node = root, self._above[node]
        return root

    def unite(self, a: Node, b: Node) -> None:
        """Make one set of two, the smaller one a part of the larger: so no way up is long."""
        a, b = self.find(a), self.find(b)
        if a is not b:
            size_a, size_b = self._sizes.get(a, 1), self._sizes.get(b, 1)
            if size_a > size_b:
                a, b = b, a
            self._above[a] = b
            self._sizes[b] = size_a + size_b
