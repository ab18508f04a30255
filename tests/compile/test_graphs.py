"""Compiled, a converted model is one graph and trains with the gradients it has in eager mode.

Most tests use the ``aot_eager`` backend, which traces forward and backward as Inductor's users have them but leaves
code generation out.
"""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import rewire
from rewire import traced, ways
from rewire.errors import PassError
from rewire.passes import OutputError
from rewire.rules.direct import DFA
from rewire.structures import LowRank

from .nets import (
    Mixed,
    Tokens,
    Two,
    chain,
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


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(4, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.stem(x)).unflatten(-1, (1, 8)).expand(-1, 3, -1).transpose(0, 1)
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(0))


RULES = ["bp", "fa", "usf", "frsf", "brsf", "dfa", "sdfa", "drtp", "shallow"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net, data", [(Mixed, images), (Tokens, tokens)], ids=["convolutions", "tokens"])
def test_one_graph_same_gradients(net, data, rule):
    model, twin = pair(net, data, rule)
    compiled = one_graph(model)
    for n in (6, 6, 4, 3, 7):  # the last batch of an epoch is smaller
        out, plain = step(compiled, data(n)), step(twin, data(n))
        torch.testing.assert_close(out, plain)
        same(twin, model)
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]  # fixed, then dynamic


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_with_inductor(rule):
    model, twin = pair(Mixed, images, rule)
    compiled = torch.compile(model, fullgraph=True)
    for n in (6, 4):
        step(compiled, images(n)), step(twin, images(n))
        same(twin, model)


def test_training_stays_together():
    model, twin = pair(Mixed, images, "dfa")
    compiled = one_graph(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for n in range(3, 9):
        for m, optimizer in zip((compiled, twin), optimizers, strict=True):
            step(m, images(n))
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_first_pass_runs_outside_and_is_backprop():
    torch.manual_seed(0)
    plain = Mixed()
    model = rewire.convert(copy.deepcopy(plain), "dfa")
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.warns(rewire.RewireWarning, match="no ordinary training pass .* outside of compiled graphs"):
        step(compiled, images(6))
    step(plain, images(6))
    same(plain, model)
    twin = copy.deepcopy(model)
    for n in (6, 6, 4, 3):  # graphs of other batch sizes are no reason to join them
        step(compiled, images(n)), step(twin, images(n))
        same(twin, model)


def test_fullgraph_before_the_first_pass_says_what_to_do():
    model = rewire.convert(Mixed(), "dfa")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run one ordinary training step"):
        one_graph(model)(images(6)[0])
    step(model, images(6))
    twin = copy.deepcopy(model)
    step(one_graph(model), images(6)), step(twin, images(6))
    same(twin, model)


def test_what_cannot_be_compiled_runs_outside():
    model, twin = pair(Mixed, images, "kp")
    compiled = torch.compile(model, backend="aot_eager")
    for n in (6, 4):
        step(compiled, images(n)), step(twin, images(n))
        same(twin, model)


def test_nothing_of_the_library_is_compiled_by_itself():
    """Outside of graphs, what watches the weights would be compiled again for each of them."""
    model = torch.compile(rewire.convert(Tokens(), "dfa"), backend="aot_eager")
    torch._dynamo.utils.clear_compilation_metrics()
    for _ in range(2):
        step(model, tokens(6))
    compiled = {Path(m.co_filename) for m in torch._dynamo.utils.get_compilation_metrics() if m.co_filename}
    assert compiled and not [path for path in compiled if Path(rewire.__file__).parent in path.parents]


def test_several_outputs():
    torch.manual_seed(0)
    model = rewire.convert(Two(), "dfa")
    two_losses(model)
    two_losses(model)
    twin = copy.deepcopy(model)
    compiled = one_graph(model)
    for n in (6, 4):
        two_losses(compiled, n), two_losses(twin, n)
        same(twin, model)


def test_another_rule_for_a_while():
    model, twin = pair(Mixed, images, "dfa")
    compiled = one_graph(model)
    step(compiled, images(6))
    for m, other in ((compiled, model), (twin, twin)):
        with rewire.use_rule(other, "bp"):
            step(m, images(6))
    same(twin, model)
    step(compiled, images(6)), step(twin, images(6))
    same(twin, model)


def test_two_conversions_of_one_architecture_do_not_mix():
    model, twin = pair(Mixed, images, "dfa")
    other, other_twin = pair(Mixed, images, "dfa", seed=1)
    for m, t in ((model, twin), (other, other_twin)):
        step(one_graph(m), images(6)), step(t, images(6))
        same(t, m)
    assert not torch.equal(model.wide.weight.grad, other.wide.weight.grad)


def test_accumulation_and_two_backwards():
    model, twin = pair(Mixed, images, "dfa")
    compiled = one_graph(model)
    for m in (compiled, twin):
        m.zero_grad()
        a, b = (F.cross_entropy(m(images(n)[0]), images(n)[1]) for n in (6, 6))
        (a + b).backward()
        step(m, images(6), zero=False)
    same(twin, model)


def test_evaluation_without_gradients():
    model, twin = pair(Mixed, images, "dfa")
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(6)[0]), twin.eval()(images(6)[0]))


def test_autocast():
    model, twin = pair(Tokens, tokens, "dfa")
    compiled = one_graph(model)
    for m in (compiled, twin):
        with torch.autocast("cpu", torch.bfloat16):
            step(m, tokens(6))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.01)


def test_a_graph_break_between_layer_and_output_is_no_silence():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.b(torch.tanh(self.a(x))))
            torch._dynamo.graph_break()
            return self.c(h)

    torch.manual_seed(0)
    model = rewire.convert(Broken(), "dfa")
    x = torch.randn(5, 4)
    for _ in range(2):
        model(x).square().sum().backward()
    with pytest.raises(Exception) as caught:
        torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    assert "graph break" in str(caught.value) or isinstance(caught.value, PassError)


@pytest.mark.parametrize("rule", ["dfa", "fa", "frsf"])
def test_use_of_a_weight_by_another_module_is_under_its_rule(rule):
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.used, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(torch.tanh(F.linear(torch.tanh(self.a(x)), self.used.weight)))

    torch.manual_seed(0)
    model = rewire.convert(Uses(), rule)
    x = torch.randn(5, 4)
    for _ in range(2):
        model(x).square().sum().backward()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")  # leaves that module out
    for m in (compiled, twin):
        m.zero_grad()
        m(x).square().sum().backward()
    same(twin, model)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"'used'|cannot be part of a compiled graph"):
        one_graph(model)(x)


def said(rule):
    """Of direct rules it is said that they run outside."""
    if "dfa" in rule:
        return pytest.warns(rewire.RewireWarning, match="outside of compiled graphs")
    return contextlib.nullcontext()


class Uses(nn.Module):
    """Uses a child's weight itself."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.used.weight)


@pytest.mark.parametrize("rule, used", [("dfa", "fa"), ("dfa", "bp"), ("fa", "fa"), ("fa", "frsf"), ("bp", "fa")])
def test_use_of_a_weight_inside_a_module_further_down(rule, used):
    """Whatever Dynamo does with the module around, no layer goes without its gradient, and nothing is left behind."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.uses, self.b, self.c = nn.Linear(4, 8), Uses(), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.uses(torch.tanh(self.a(x)))))))

    model, twin = pair(Net, vectors, rule, layers={"uses.used": used})
    step(model, vectors(6)), step(twin, vectors(6))
    compiled = torch.compile(model, backend="aot_eager")
    for n in (6, 4):
        step(compiled, vectors(n)), step(twin, vectors(n))
        same(twin, model)
    assert torch._C._len_torch_function_stack() == 0
    torch._dynamo.reset()
    other, other_twin = pair(chain, vectors, "dfa")
    step(one_graph(other), vectors(6)), step(other_twin, vectors(6))
    same(other_twin, other)


class Row(nn.Module):
    """Layers written out one after another: a break of the graph leaves several graphs, and no frame out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.d(torch.tanh(self.c(h)))


@pytest.mark.parametrize("net, name", [(chain, "2"), (Row, "b")], ids=["container", "row"])
@pytest.mark.parametrize(
    "rule", ["kp", "wm", "ldfa", "switch(first=fa, then=usf, at=100)", "switch(first=bp, then=fa, at=100)"]
)
def test_a_layer_that_cannot_be_compiled_among_others(net, name, rule):
    model, twin = pair(net, vectors, "dfa", layers={name: rule})
    step(model, vectors(6)), step(twin, vectors(6))
    compiled = torch.compile(model, backend="aot_eager")
    with said("dfa"):
        step(compiled, vectors(6))
    step(twin, vectors(6))
    same(twin, model)
    step(compiled, vectors(4)), step(twin, vectors(4))
    same(twin, model)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("other", ["fa", "usf", "bp", "sdfa"])
def test_other_rules_to_and_fro_in_a_container(before, other):
    """A break of the graph makes Dynamo leave containers out, whose layers it then compiles one by one."""
    model, twin = pair(chain, vectors, "dfa")
    compiled = torch.compile(model, backend="aot_eager")
    if before:
        step(compiled, vectors(6)), step(twin, vectors(6))
    for _ in range(2):
        with rewire.use_rule(model, other), rewire.use_rule(twin, other):
            step(compiled, vectors(6)), step(twin, vectors(6))
        same(twin, model)
        step(compiled, vectors(6)), step(twin, vectors(6))
        same(twin, model)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("net", [chain, Row])
def test_compiled_in_place(net, rule):
    """Of a container's own call some versions of Dynamo compile nothing, and say so if it was to be one graph."""
    whole = net is Row or compiles_containers()
    model, twin = pair(net, vectors, rule)
    model.compile(backend="aot_eager")
    with contextlib.nullcontext() if whole else said(rule):
        step(model, vectors(6))
    step(twin, vectors(6))
    same(twin, model)
    step(model, vectors(4)), step(twin, vectors(4))
    same(twin, model)
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    if whole:
        step(model, vectors(6)), step(twin, vectors(6))
        same(twin, model)
    else:
        with pytest.raises(RuntimeError, match="no compiled frames"):
            model(vectors(6)[0])


def compiles_containers():
    """Whether Dynamo compiles an ordinary container that is compiled in place: torch 2.13 does not, 2.15 does."""
    plain = chain()
    plain.compile(backend="aot_eager", fullgraph=True)
    try:
        plain(vectors(6)[0])
    except RuntimeError:
        return False
    finally:
        torch._dynamo.reset()
    return True


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_a_part_compiled_by_itself(rule):
    """Under a direct rule its layers would miss the output error: an error, not silence."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.head = Row(), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.part(x)))

    model, twin = pair(Whole, vectors, rule)
    model.part.compile(backend="aot_eager")
    if rule == "dfa":
        with pytest.raises(Exception, match="compiling a part of the model"):
            step(model, vectors(6))
    else:
        step(model, vectors(6)), step(twin, vectors(6))
        same(twin, model)


@pytest.mark.parametrize("rule", ["fa", "frsf", "usf", "dfa", "sdfa"])
@pytest.mark.parametrize("net", [chain, Row, Attends])
def test_thawed_after_it_was_compiled(net, rule):
    """Then layers need feedback that never had any: in the pass that makes it, they run outside."""
    torch.manual_seed(0)
    model = net()
    first = next(iter(model.children()))
    first.requires_grad_(False)
    rewire.convert(model, rule)
    for _ in range(2):
        step(model, vectors(6))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    step(compiled, vectors(6)), step(twin, vectors(6))
    same(twin, model)
    first.requires_grad_(True), next(iter(twin.children())).requires_grad_(True)
    with said(rule):
        step(compiled, vectors(6))
    step(twin, vectors(6))
    same(twin, model)
    for n in (6, 4):
        step(compiled, vectors(n)), step(twin, vectors(n))
        same(twin, model)
    assert all(p.grad is not None for p in first.parameters())


@pytest.mark.parametrize("rule", ["fa", "dfa", "usf"])
@pytest.mark.parametrize("net", [chain, Row])
def test_an_input_that_comes_to_need_a_gradient(net, rule):
    model, twin = pair(net, vectors, rule)
    compiled = torch.compile(model, backend="aot_eager")
    for needs in (False, True, True):
        inputs = []
        for m in (compiled, twin):
            x, y = vectors(6)
            inputs.append(x.requires_grad_(needs))
            step(m, (x, y))
        same(twin, model)
        if needs:
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("rule", ["fa", "dfa", DFA(feedback=LowRank(2)), DFA(feedback="ternary")], ids=str)
def test_after_an_ordinary_pass_in_fewer_bits(rule):
    """Feedback is made again in those of the compiled pass, as in eager mode."""
    torch.manual_seed(0)
    model = rewire.convert(chain(), rule)
    x, y = vectors(6)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
    twin = copy.deepcopy(model)
    step(one_graph(model), (x, y)), step(twin, (x, y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", ["fa", "frsf", "dfa"])
def test_a_copy_of_a_trained_model(rule):
    """A copy leaves fixed feedback behind; what is compiled then makes the same again."""
    model, twin = pair(Mixed, images, rule)
    step(model, images(4)), step(twin, images(4))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for n in (6, 4):
        step(compiled, images(n)), step(twin, images(n))
        same(twin, compiled)


@pytest.mark.parametrize(
    "before, other",
    [
        ("fa", "frsf"),
        ("dfa", "fa"),
        ("dfa", "sdfa"),
        ("fa", "dfa"),
        ("dfa", DFA(feedback="channel")),
    ],
    ids=str,
)
def test_other_rules_to_and_fro(before, other):
    """Each graph is given the feedback of its own rule, whenever it is used again."""
    model, twin = pair(Mixed, images, before)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        step(compiled, images(6)), step(twin, images(6))
        same(twin, model)
        for _ in range(2):
            with rewire.use_rule(model, other), rewire.use_rule(twin, other):
                step(compiled, images(6)), step(twin, images(6))
            same(twin, model)


def test_no_more_graphs_when_rules_come_back():
    model, _ = pair(Mixed, images, "fa")
    compiled = one_graph(model)
    for _ in range(3):
        step(compiled, images(6))
        with rewire.use_rule(model, "frsf"):
            step(compiled, images(6))
    assert counters["stats"]["unique_graphs"] == 2


class Experts(nn.Module):
    """Each token goes to one of two experts, which sees the rows of its tokens."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate = nn.Linear(5, 6), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.stem(x)).flatten(0, 1)
        weight, chosen = self.gate(h).softmax(-1).max(-1)
        mixed = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == i)
            mixed = mixed.index_add(0, rows, torch.tanh(expert(h[rows])) * weight[rows, None])
        return self.head(mixed).unflatten(0, x.shape[:2])


def rows(n):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, 5, generator=g), torch.randint(0, 3, (n, 4), generator=g)


def test_rows_picked_by_index_run_outside():
    model, twin = pair(Experts, rows, "dfa")
    compiled = torch.compile(model, backend="aot_eager")
    for n in (6, 3):
        step(compiled, rows(n)), step(twin, rows(n))
        same(twin, model)
    assert all(expert.weight.grad.any() for expert in model.experts)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        one_graph(model)(rows(6)[0])


class Gate(nn.Module):
    """A unit given a list and a nested tuple of tensors, and one by name."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, pair, deeper, *, scale):
        a, b = pair
        (c, (d, times)) = deeper
        return torch.sigmoid(self.mix(a + c)) * b + d * times * scale["by"]


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 6) for _ in range(5))
        self.gate, self.head = Gate(), nn.Linear(6, 3)

    def forward(self, x):
        a, b, c, d, e = (torch.tanh(part(x)) for part in self.parts)
        return self.head(torch.tanh(self.gate([a, b], (c, (d, 2.0)), scale={"by": e})))


def test_a_block_given_lists_of_tensors():
    model, twin = pair(Gated, vectors, "dfa", blocks=["gate"])
    step(model, vectors(6))
    by_hand(model, vectors(6))
    compiled = one_graph(model)
    for n in (6, 4):
        step(compiled, vectors(n)), step(twin, vectors(n))
        same(twin, model)
        by_hand(model, vectors(n))


def by_hand(model, data):
    """The gradients of the five layers below the block, from the rule's equation."""
    x, _ = data
    B = rewire.feedback(model)
    e = error(model, data)
    names = ["gate", *(f"gate#{i}" for i in range(1, 5))]
    for part, name in zip(model.parts, names, strict=True):
        delta = (e @ B[name]) * (1 - torch.tanh(part(x).detach()) ** 2)
        torch.testing.assert_close(part.weight.grad, delta.T @ x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rule, owner, name, wrong",
    [
        ("fa", traced._Given, "combine", lambda self, weight, random: -random),
        ("usf", traced._Given, "combine", lambda self, weight, random: weight),
        ("dfa", traced, "plan", lambda *a: lambda e, B: ways.plan(*a)(e, -B)),
        ("dfa", traced, "plan", lambda *a: lambda e, B: ways.plan(*a)(e.roll(1, 0), B)),
        ("sdfa", OutputError, "signal", lambda self, rule: self.error),
    ],
)
def test_breaking_it_is_found(monkeypatch, rule, owner, name, wrong):
    model, twin = pair(Tokens, tokens, rule)
    step(twin, tokens(6))
    monkeypatch.setattr(owner, name, wrong)
    step(one_graph(model), tokens(6))
    with pytest.raises(AssertionError):
        same(twin, model)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_compiled_pass_leaves_no_output_error(rule):
    model, _ = pair(Mixed, images, rule)
    compiled = one_graph(model)
    for _ in range(2):
        step(model, images(6))
        assert rewire.output_error(model) is not None
        step(compiled, images(6))
        assert rewire.output_error(model) is None
