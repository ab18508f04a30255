"""Feedback of every structure in compiled graphs, and what they share there."""

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import rewire
from rewire.rules.direct import DFA
from rewire.structures import NAMES, Dense, Feedback, LowRank, Seeded, Shared, Sparse, Structure
from rewire.structures.dense import Signs
from rewire.structures.lowrank import Product
from rewire.structures.seeded import Tiles
from rewire.structures.shared import Slice
from rewire.structures.sparse import Gathered

from .nets import (
    Mixed,
    Tokens,
    Two,
    chain,
    chain_by_hand,
    error,
    images,
    one_graph,
    pair,
    same,
    step,
    tokens,
    two_losses,
    vectors,
)

STRUCTURES = {
    **NAMES,
    "lowrank": LowRank(2),
    "lowrank per element": LowRank(2, per="element"),
    "sparse": Sparse(nonzeros=2),
    "sparse per element": Sparse(nonzeros=2, per="element"),
    "shared per element": Shared(per="element"),
    "seeded per channel": Seeded("binary", per="channel"),
    "in bytes": Dense("ternary", dtype=torch.int8),
}
every = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


@every
@pytest.mark.parametrize("net, data", [(Mixed, images), (Tokens, tokens)], ids=["convolutions", "tokens"])
def test_one_graph_same_gradients(net, data, structure):
    model, twin = pair(net, data, "dfa", feedback=structure)
    fast = one_graph(model)
    for n in (6, 4, 3):
        step(fast, data(n)), step(twin, data(n))
        same(twin, model)
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]  # fixed, then dynamic


def by_hand(model, data):
    chain_by_hand(model, data[0], error(model, data))


@pytest.mark.parametrize(
    "structure",
    [LowRank(2), Sparse(nonzeros=2), Shared(), Seeded(), Dense("binary", dtype=torch.int8)],
    ids=lambda structure: type(structure).__name__,
)
def test_generated_code_is_as_the_equation_says(structure):
    model, _ = pair(chain, vectors, "dfa", feedback=structure)
    fast = one_graph(model, backend="inductor")
    for n in (6, 4):
        step(fast, vectors(n))
        by_hand(model, vectors(n))


@pytest.mark.parametrize("owner", [Product, Gathered, Slice, Tiles, Signs])
def test_breaking_it_is_found(monkeypatch, owner):
    of = {Product: LowRank(2), Gathered: Sparse(nonzeros=2), Slice: Shared(), Tiles: Seeded()}
    model, _ = pair(chain, vectors, "dfa", feedback=of.get(owner, Dense("binary", dtype=torch.int8)))
    name = "_tiles" if owner is Tiles else "__call__"  # drawing tiles is a call within a call
    usual = getattr(owner, name)
    wrong = (lambda self: ((i, -t) for i, t in usual(self))) if owner is Tiles else lambda self, e: -usual(self, e)
    monkeypatch.setattr(owner, name, wrong)
    step(one_graph(model), vectors(6))
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        by_hand(model, vectors(6))


@pytest.mark.parametrize("structure", [LowRank(2), Shared(), Sparse(nonzeros=2)], ids=lambda s: type(s).__name__)
def test_what_layers_share_is_made_once(structure):
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    model, twin = pair(chain, vectors, "dfa", feedback=structure)
    # Inductor's way of making forward and backward of one graph, which leaves out what is there already.
    backend = aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    step(one_graph(model, backend=backend), vectors(6))
    step(twin, vectors(6))
    same(twin, model)
    calls = [node for node in graphs[-1].graph.nodes if node.op == "call_function"]
    if isinstance(structure, Sparse):
        laid_out = [c for c in calls if c.target is torch.ops.aten.clone.default and 20 in c.meta["val"].shape]
        assert len(laid_out) == 1  # e, each of its features in one piece
        return
    products = [c for c in calls if c.target is torch.ops.aten.mm.default]
    squeezed = [c for c in products if c.args[0].meta["val"].shape == (6, 20)]
    assert len(squeezed) == 1


def test_layers_with_structures_of_their_own():
    layers = {"2": DFA(feedback=LowRank(2)), "4": DFA(feedback=LowRank(3))}
    model, _ = pair(chain, vectors, "dfa", layers=layers)
    step(one_graph(model), vectors(6))
    by_hand(model, vectors(6))
    for structures in ({"2": Shared(), "4": Shared("binary")}, {"2": Sparse(nonzeros=3), "4": LowRank(2)}):
        layers = {name: DFA(feedback=structure) for name, structure in structures.items()}
        model, _ = pair(chain, vectors, "dfa", layers=layers)
        step(one_graph(model), vectors(6))
        by_hand(model, vectors(6))


def test_each_output_has_its_own():
    torch.manual_seed(0)
    model, twin = (rewire.convert(Two((9, 7)), "dfa", feedback=LowRank(2)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        two_losses(m), two_losses(m)
    two_losses(one_graph(model))
    same(twin, model)


@pytest.mark.parametrize("structure", [Dense(dtype=torch.bfloat16), LowRank(2, dtype=torch.bfloat16)])
def test_kept_in_another_dtype(structure):
    model, twin = pair(chain, vectors, "dfa", feedback=structure)
    step(one_graph(model), vectors(6)), step(twin, vectors(6))
    same(twin, model)


@pytest.mark.parametrize("structure", ["lowrank", "shared", "sparse", "seeded"])
def test_autocast_after_an_ordinary_pass_without(structure):
    model, twin = pair(chain, vectors, "dfa", feedback=structure)
    fast = one_graph(model)
    for m in (fast, twin):
        with torch.autocast("cpu", torch.bfloat16):
            step(m, vectors(6))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.01)


class Doubled(Feedback):
    """A B of the user's: twice a matrix."""

    def __init__(self, half):
        self.half, self.dtype, self.width = half, half.dtype, half.shape[0]

    def __call__(self, rows):
        return 2 * (rows @ self.half.flatten(1))

    def dense(self):
        return 2 * self.half


class Given(Doubled):
    """The same, and it says how a graph can have it."""

    def tensors(self):
        return (self.half,)

    def of(self, *tensors):
        return Given(*tensors)


class Own(Structure):
    per, dtype = "channel", None

    def __init__(self, kind):
        self.kind = kind

    def make(self, place):
        return self.kind(Dense().make(place) / 2)

    def size(self, shape, itemsize):
        return 0

    def __repr__(self):
        return f"Own({self.kind.__name__})"

    def __eq__(self, other):
        return isinstance(other, Own) and other.kind is self.kind

    def __hash__(self):
        return hash(self.kind)


def test_a_structure_of_ones_own():
    model, _ = pair(chain, vectors, "dfa", feedback=Own(Given))
    step(one_graph(model), vectors(6))
    by_hand(model, vectors(6))

    model, _ = pair(chain, vectors, "dfa", feedback=Own(Doubled))
    with pytest.warns(rewire.RewireWarning, match="layer '2' cannot be part of a compiled graph"):
        step(torch.compile(model, backend="aot_eager"), vectors(6))
    by_hand(model, vectors(6))


@pytest.mark.parametrize("structure", [LowRank(2), Sparse(nonzeros=2), Shared(), Seeded()], ids=lambda s: s.name)
def test_a_b_derived_from_one_of_ours(structure, monkeypatch):
    """A graph has the user's own B, not the one that it is derived from."""
    model, _ = pair(chain, vectors, "dfa", feedback=structure)
    step(one_graph(model), vectors(6))
    usual = type(structure).make

    def make_own(self, place):
        made = usual(self, place)
        base = type(made)
        made.__class__ = type("Own", (base,), {"__call__": lambda b, rows: -base.__call__(b, rows)})
        return made

    monkeypatch.setattr(type(structure), "make", make_own)
    own, _ = pair(chain, vectors, "dfa", feedback=structure)
    step(one_graph(own), vectors(6))
    torch.testing.assert_close(own[2].bias.grad, -model[2].bias.grad, rtol=1e-4, atol=1e-6)


def test_a_copy_and_a_change_of_structure():
    model, twin = pair(chain, vectors, "dfa", feedback="lowrank")
    fast = one_graph(model)
    step(fast, vectors(6)), step(twin, vectors(6))
    for m, other in ((model, model), (twin, twin)):
        with rewire.use_rule(other, DFA(feedback="shared")):
            step(m, vectors(6))
    with rewire.use_rule(model, DFA(feedback="shared")), rewire.use_rule(twin, DFA(feedback="shared")):
        step(fast, vectors(6)), step(twin, vectors(6))
        same(twin, model)
    step(fast, vectors(6)), step(twin, vectors(6))
    same(twin, model)
