"""What runs, how often and in which order: shared, skipped, routed, several heads, several forwards."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import rewire

from .checks import RULES, build, check, handed_back, labels, one_pass, randn

N = 6
X = randn(N, 5)
CLASSES = labels(N)


def loss(out):
    return F.cross_entropy(out, CLASSES)


class Albert(nn.Module):
    """One block three times, behind an embedding of its own width."""

    def __init__(self):
        super().__init__()
        self.embed, self.widen = nn.Embedding(11, 3), nn.Linear(3, 6)
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, ids):
        h = self.widen(self.embed(ids))
        for _ in range(3):
            h = self.norm(h + self.down(F.gelu(self.up(h))))
        return self.head(h[:, 0])


@pytest.mark.parametrize("rule", [*RULES, "brsf"])
def test_repeated_layers_and_embeddings(rule):
    check(Albert, labels(N, 5, classes=11), loss, rule, outputs=["head"])


class LayerDrop(nn.Module):
    """A layer is left out of a pass; which one is told from outside."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 4)
        self.dropped = 1

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            if i != self.dropped:
                x = x + torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_left_out_of_every_pass_so_far(rule):
    check(LayerDrop, X, loss, rule, outputs=["head"], not_run=["layers.1"])


@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
@pytest.mark.parametrize("rule", RULES)
def test_a_layer_left_out_of_the_first_passes_comes_in_later(rule):
    model = rewire.convert(build(LayerDrop), rule)
    for dropped in (1, 1, 0, 2, 1, 0):
        model.dropped = dropped
        got = one_pass(model, X, loss)
        for i in range(3):
            assert got[f"layers.{i}.weight"] is None if i == dropped else got[f"layers.{i}.weight"].any()
    for model.dropped in (0, 1, 2, None):
        result = rewire.verify(model, X, loss)
        assert result.ok, str(result)
        assert {r.name for r in result.layers if r.status == "not run"} == (
            set() if model.dropped is None else {f"layers.{model.dropped}"}
        )


class Stochastic(nn.Module):
    """Each branch is left out for some samples."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        for layer in (self.a, self.b):
            keep = (torch.rand(len(h), 1, dtype=h.dtype) < 0.7).to(h.dtype) if self.training else 1
            h = h + keep * torch.tanh(layer(h))
        return self.head(F.dropout(h, 0.2, self.training))


@pytest.mark.parametrize("rule", RULES)
def test_stochastic_depth(rule):
    check(Stochastic, X, loss, rule, outputs=["head"])


class Auxiliary(nn.Module):
    """A side head in training, as in GoogLeNet."""

    def __init__(self):
        super().__init__()
        self.aux1, self.aux2 = nn.Linear(6, 6), nn.Linear(6, 4)
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        side = self.aux2(torch.tanh(self.aux1(h))) if self.training else None
        return self.head(torch.tanh(self.b(h))), side


@pytest.mark.parametrize("rule", RULES)
def test_auxiliary_heads(rule):
    def both(out):
        return loss(out[0]) + 0.3 * loss(out[1])

    model, _ = check(Auxiliary, X, both, rule, outputs=["head", "aux2"])
    model.eval()
    model.zero_grad()
    loss(model(X)[0]).backward()
    assert model.aux1.weight.grad is None and model.a.weight.grad.any()
    result = rewire.verify(model, X, lambda out: loss(out[0]))
    assert result.ok and {r.status for r in result.layers if "aux" in r.name} == {"not run"}, str(result)


class Detector(nn.Module):
    """Two levels, one head for classes and one for boxes shared by both, lists in a dict."""

    def __init__(self):
        super().__init__()
        self.stem, self.low, self.high = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.lateral = nn.Conv2d(4, 4, 1)
        self.tower = nn.Conv2d(4, 4, 3, padding=1)
        self.classes, self.boxes = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        low = torch.relu(self.low(torch.relu(self.stem(x))))
        high = torch.relu(self.high(low))
        levels = [self.lateral(low) + F.interpolate(high, scale_factor=2), high]
        towers = [torch.relu(self.tower(level)) for level in levels]
        return {"classes": [self.classes(t) for t in towers], "boxes": [self.boxes(t).sigmoid() for t in towers]}


@pytest.mark.parametrize("rule", RULES)
def test_detection_heads(rule):
    def detect(out):
        return sum(c.square().mean() for c in out["classes"]) + sum((b - 0.3).abs().mean() for b in out["boxes"])

    check(Detector, randn(3, 2, 8, 8), detect, rule, outputs=["classes", "boxes"])


class MultiTask(nn.Module):
    def __init__(self):
        super().__init__()
        self.tasks = nn.ModuleDict({"kind": nn.Linear(6, 4), "age": nn.Linear(6, 1)})
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        h = self.body(x)
        return {name: task(h) for name, task in self.tasks.items()}


@pytest.mark.parametrize("rule", RULES)
def test_tasks_registered_before_their_body(rule):
    def both(out):
        return loss(out["kind"]) + (out["age"][:, 0] - 1).square().mean()

    check(MultiTask, X, both, rule, outputs=["tasks.kind", "tasks.age"])


class HeadFirst(nn.Module):
    """As XLM-RoBERTa for language modelling: the head is registered first, and tied to the embedding."""

    def __init__(self, tied):
        super().__init__()
        self.head = nn.Linear(6, 11)
        self.dense = nn.Linear(6, 6)
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, targets):
        h = self.embed(ids)
        h = h + torch.tanh(self.mix(h.cumsum(1)))
        y = self.head(F.gelu(self.dense(h)))
        return {"loss": F.cross_entropy(y.flatten(0, 1), targets.flatten()), "logits": y}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_an_output_layer_registered_first_with_the_loss_inside(rule, tied):
    ids = labels(3, 5, classes=11)
    check(lambda: HeadFirst(tied), (ids, ids), lambda out: out["loss"], rule, outputs=["head"])


class Recurrent(nn.Module):
    """Recurrent in the middle: exact through it, rules around it."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.before = nn.Linear(5, 6)
        self.recurrent = kind(6, 6, batch_first=True)
        self.after, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, ids):
        h, _ = self.recurrent(torch.tanh(self.before(self.embed(ids))))
        return self.head(torch.tanh(self.after(h)).mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("rule", RULES)
def test_recurrent_layers_are_exact_and_named(rule, kind):
    ids = labels(N, 5, classes=11)
    model, _ = check(lambda: Recurrent(kind), ids, loss, rule, outputs=["head"])
    row = next(row for row in rewire.summary(model).rows if row.name == "recurrent")
    assert not row.converted and "recurrent" in row.note
    # what comes to its output is what ``after`` hands back; through it and its weights, plain autograd
    seen = {}

    def at_input(module, args):
        args[0].register_hook(lambda g: seen.update(delta=g))

    def at_output(module, args, y):
        y.register_hook(lambda g: seen.update(below=g))

    hooks = [
        model.recurrent.register_forward_hook(lambda m, args, out: seen.update(x=args[0])),
        model.after.register_forward_pre_hook(at_input),
        model.before.register_forward_hook(at_output),
    ]
    got = one_pass(model, ids, loss)
    for hook in hooks:
        hook.remove()
    x = seen["x"].detach().requires_grad_()
    wanted = torch.autograd.grad(model.recurrent(x)[0], [x, *model.recurrent.parameters()], seen["delta"])
    for (name, _), gradient in zip(model.recurrent.named_parameters(), wanted[1:], strict=True):
        assert torch.allclose(got[f"recurrent.{name}"], gradient, atol=1e-12), name
    assert torch.allclose(seen["below"], wanted[0] * (1 - x.detach() ** 2), atol=1e-12)


class Twice(nn.Module):
    """Two forwards of one body before one loss: contrastive, or a triplet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Contrastive(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Twice()

    def forward(self, x, y):
        return F.normalize(self.body(x), dim=1), F.normalize(self.body(y), dim=1)


@pytest.mark.parametrize("rule", RULES)
def test_two_forwards_for_one_loss(rule):
    check(
        Contrastive,
        (X, randn(N, 5, seed=1)),
        lambda out: F.cross_entropy(out[0] @ out[1].t() * 3, torch.arange(N)),
        rule,
        outputs=["body.c"],
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_generator_trained_through_a_discriminator(rule):
    """Two conversions; the generator's error is what the discriminator hands back to its picture."""

    class Generator(Twice):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(6, 5)

    def make():
        model = nn.Sequential(build(Generator), build(Twice, seed=1))
        return model

    model = make()
    rewire.convert(model[0], rule)
    rewire.convert(model[1], rule)
    for _ in range(2):
        got = one_pass(model, X, lambda out: F.softplus(-out).mean())
    plain = one_pass(make(), X, lambda out: F.softplus(-out).mean())
    assert all(got[name].any() for name in plain)
    result = rewire.verify(model, X, lambda out: F.softplus(-out).mean())
    assert result.ok, str(result)
    assert {r.name for r in result.layers if r.status == "live"} == {"0.b", "0.c", "1.a", "1.b", "1.c"}
    for real in (randn(N, 5, seed=2), model[0](X).detach()):  # the discriminator's own steps, between
        model[1].zero_grad()
        F.softplus(model[1](real)).mean().backward()
        assert model[1].a.weight.grad.any()


class Conditional(nn.Module):
    """Which branch runs is decided by a value."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x, go_left):
        h = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.left(h) if go_left else self.right(h)))


@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
@pytest.mark.parametrize("rule", RULES)
def test_conditional_computation(rule):
    model = rewire.convert(build(Conditional), rule)
    for go_left in (True, True, False, False, True):
        got = one_pass(model, (X, go_left), loss)
        assert (got["left.weight"] is not None) == go_left == (got["right.weight"] is None)
        assert got["stem.weight"].any()
    for go_left in (True, False):
        result = rewire.verify(model, (X, go_left), loss)
        assert result.ok, str(result)
        assert {r.name: r.status for r in result.layers}["left" if go_left else "right"] == "live"


def wrapped(forward):
    @functools.wraps(forward)
    def inner(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return inner


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    @torch.jit.ignore
    def middle(self, x):
        return torch.tanh(self.b(x))

    @wrapped
    def forward(self, x):
        return self.c(self.middle(torch.tanh(self.a(input=x))))


class Slow(nn.Linear):
    @torch.jit.ignore
    def forward(self, input):
        return super().forward(input)


class Subclassed(Decorated):
    def __init__(self):
        super().__init__()
        self.b = Slow(6, 6)


@pytest.mark.parametrize("make", [Decorated, Subclassed])
@pytest.mark.parametrize("rule", RULES)
def test_decorated_forwards(rule, make):
    check(make, X, loss, rule, outputs=["c"])


# -- mixture of experts --------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Each token goes to its two best experts; an expert sees the rows of its tokens, in whatever number."""

    def __init__(self, how="index", experts=3, pooled=False):
        super().__init__()
        self.stem, self.gate = nn.Linear(5, 6), nn.Linear(6, experts)
        self.up = nn.ModuleList(nn.Linear(6, 7) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(7, 6) for _ in range(experts))
        self.head = nn.Linear(6, 4)
        self.how, self.pooled = how, pooled

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        shape = h.shape
        rows = h.reshape(-1, 6)
        weight, chosen = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, place = torch.where(chosen == i)
            if self.how == "skip empty" and not len(token):
                continue
            picked = rows.index_select(0, token) if self.how == "select" else rows[token]
            y = down(F.gelu(up(picked)))
            out = out.index_add(0, token, y * weight[token, place, None])
        h = (rows + out).reshape(shape)
        return self.head(h.mean(1) if self.pooled else h)


TOKENS = randn(3, 4, 5)
TOKEN_CLASSES = labels(3, 4).flatten()


def token_loss(out):
    return F.cross_entropy(out.reshape(-1, 4), TOKEN_CLASSES if out.dim() == 3 else labels(3))


@pytest.mark.parametrize("how", ["index", "select", "skip empty"])
def test_experts_under_a_local_rule(how):
    check(lambda: Experts(how), TOKENS, token_loss, "fa", outputs=["head"])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("how", ["index", "select", "skip empty"])
def test_experts_get_the_errors_of_their_own_tokens(how, pooled):
    model, _ = check(lambda: Experts(how, pooled=pooled), TOKENS, token_loss, "dfa", outputs=["head"])
    names = [f"{layer}.{i}" for layer in ("up", "down") for i in range(3)]
    for x in (TOKENS, TOKENS.flip(0), TOKENS * 2):  # each time other tokens, in other numbers
        with torch.no_grad():
            h = torch.tanh(model.stem(x)).reshape(-1, 6)
            chosen = model.gate(h).softmax(-1).topk(2)[1]
            rows = {i: torch.where(chosen == i)[0] for i in range(3)}
        seen = handed_back(model, x, token_loss, *names)
        e, B = rewire.output_error(model), rewire.feedback(model)
        e = e.repeat_interleave(4, 0) if pooled else e.reshape(-1, 4)
        for name in names:
            torch.testing.assert_close(seen[name], [e[rows[int(name[-1])]] @ B[name]])
        assert rewire.verify(model, x, token_loss).ok


def test_a_streamed_pass_with_experts_is_refused_by_name():
    model = rewire.convert(build(Experts), "dfa", skip="cut")
    for _ in range(2):
        one_pass(model, TOKENS, token_loss)
    with pytest.raises(rewire.PassError, match=r"layer 'up\.0': rows of its input are picked"):
        rewire.backward_streamed(model, TOKENS, token_loss)
    assert rewire.verify(model, TOKENS, token_loss).ok


class AsManyRows(Experts):
    """Every expert happens to get as many rows as there are tokens, in another order: shapes tell nothing."""

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        rows = h.reshape(-1, 6)
        order = torch.arange(len(rows)).flip(0)
        y = self.down[0](F.gelu(self.up[0](rows[order])))
        return self.head((rows + torch.zeros_like(rows).index_copy(0, order, y)).reshape(h.shape))


def test_rows_in_another_order():
    rest = [f"{layer}.{i}" for layer in ("up", "down") for i in (1, 2)] + ["gate"]
    model = rewire.convert(build(AsManyRows), "dfa", scale=0.3)
    for _ in range(3):
        (got,) = handed_back(model, TOKENS, token_loss, "up.0")["up.0"]
        e, B = rewire.output_error(model), rewire.feedback(model)
        assert torch.allclose(got, e.reshape(-1, 4).flip(0) @ B["up.0"], atol=1e-12)
    result = rewire.verify(model, TOKENS, token_loss)
    assert result.ok and {r.name for r in result.layers if r.status == "not run"} == set(rest), str(result)


PICKS = {
    "mask": lambda h: h[torch.tensor([True, False, True, True, False, True])],
    "index": lambda h: h[torch.tensor([5, -1, 0, 0])],
    "leading one": lambda h: h[None, torch.tensor([2, 4])].reshape(-1, 6),
    "index_select": lambda h: h.index_select(0, torch.tensor([4, 4, 1])),
    "of a pick": lambda h: h[torch.tensor([5, 1, 3, 0])][torch.tensor([2, 2, 0])],
    "gated": lambda h: h[torch.tensor([3, 1])] * h[torch.tensor([3, 1])].tanh(),
    "shuffled": lambda h: h[torch.tensor([3, 1, 5, 0, 2, 4])],
}
ROWS = {
    "mask": [0, 2, 3, 5],
    "index": [5, 5, 0, 0],
    "leading one": [2, 4],
    "index_select": [4, 4, 1],
    "of a pick": [3, 3, 5],
    "gated": [3, 1],
    "shuffled": [3, 1, 5, 0, 2, 4],
}


@pytest.mark.parametrize("how", PICKS)
def test_ways_to_pick_rows(how):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mid, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = torch.tanh(self.stem(x))
            y = torch.tanh(self.mid(PICKS[how](h)))
            return self.head(h.index_add(0, torch.tensor(ROWS[how]), y))

    model, _ = check(Net, X, loss, "dfa", outputs=["head"])
    (got,) = handed_back(model, X, loss, "mid")["mid"]
    assert torch.allclose(got, rewire.output_error(model)[ROWS[how]] @ rewire.feedback(model)["mid"], atol=1e-12)
    check(Net, X, loss, "fa", outputs=["head"])


class ThreeExperts(nn.Module):
    """As one parameter."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate = nn.Linear(5, 6), nn.Linear(6, 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 6) / 3)
        self.mid, self.head = nn.Linear(6, 6), nn.Linear(6, 4)


class SortedByExpert(ThreeExperts):
    """Each token goes to its two best experts, sorted by expert, as grouped products take them, and back in order."""

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        rows = h.reshape(-1, 6)
        weight, chosen = self.gate(rows).softmax(-1).topk(2)
        expert, order = chosen.flatten().sort()
        back = order.argsort()
        y = torch.einsum("nd,ndf->nf", rows[order // 2], self.experts[expert]) * weight.flatten()[order, None]
        h = h + y[back].view(-1, 2, 6).sum(1).view_as(h)
        return self.head(torch.tanh(self.mid(h)))


def test_tokens_sorted_by_expert_and_back_in_order():
    """Two picks meet: of each token twice, and of its weights, one by one. Neither is of the layers above."""
    model, _ = check(SortedByExpert, TOKENS, token_loss, "dfa", outputs=["head"])
    (got,) = handed_back(model, TOKENS, token_loss, "mid")["mid"]
    torch.testing.assert_close(got, rewire.output_error(model) @ rewire.feedback(model)["mid"])


@pytest.mark.parametrize("sort", [[4, 0, 3, 1, 5, 2], [4, 4, 3, 1, 5, 2]])
def test_a_layer_on_rows_that_are_there_twice(sort):
    """Sorted, and taken back twice, side by side; in the second case one row is missing for another."""
    sort = torch.tensor(sort)
    rows = sort[sort.argsort().repeat_interleave(2)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mid, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = torch.tanh(self.stem(x))
            y = torch.tanh(self.mid(h[sort][sort.argsort().repeat_interleave(2)]))
            return self.head(h.index_add(0, rows, y))

    model, _ = check(Net, X, loss, "dfa", outputs=["head"])
    (got,) = handed_back(model, X, loss, "mid")["mid"]
    torch.testing.assert_close(got, rewire.output_error(model)[rows] @ rewire.feedback(model)["mid"])


class Masked(nn.Module):
    """The head sees masked tokens alone, as in masked language modelling."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.mix = nn.Linear(6, 6)

    def forward(self, x, mask):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        h = h + torch.tanh(self.mix(h.mean(1, keepdim=True) + h))
        return self.head(h[mask])


@pytest.mark.parametrize("count", [1, 3, 5, 6, 12])
@pytest.mark.parametrize("rule", [*RULES, "sdfa", "shallow"])
def test_a_head_on_masked_tokens_alone(rule, count):
    mask = torch.zeros(12, dtype=torch.bool)
    mask[torch.randperm(12, generator=torch.Generator().manual_seed(3))[:count]] = True
    mask = mask.reshape(3, 4)
    zero = ("a", "b", "mix") if rule == "shallow" else ()
    model, _ = check(Masked, (TOKENS, mask), lambda out: (out - 1).square().mean(), rule, outputs=["head"], zero=zero)
    if rule == "dfa":
        (got,) = handed_back(model, (TOKENS, mask), lambda out: (out - 1).square().mean(), "b")["b"]
        whole = torch.zeros(3, 4, 4, dtype=torch.float64)
        whole[mask] = rewire.output_error(model)
        assert torch.allclose(got, whole @ rewire.feedback(model)["b"], atol=1e-12)


@pytest.mark.parametrize("order", [[3, 1, 5, 0, 2, 4], [5, 5, 0], [2]])
def test_a_head_on_other_rows(order):
    """As many as there are samples, in another order; twice the same; one."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x))))[torch.tensor(order)])

    model, _ = check(Net, X, lambda out: (out - 1).square().mean(), "dfa", outputs=["head"], passes=4)
    (got,) = handed_back(model, X, lambda out: (out - 1).square().mean(), "b")["b"]
    whole = torch.zeros(N, 4, dtype=torch.float64).index_add(0, torch.tensor(order), rewire.output_error(model))
    assert torch.allclose(got, whole @ rewire.feedback(model)["b"], atol=1e-12)


@pytest.mark.parametrize("layers", [{"head": "bp"}, {"head": "fa"}, {"b": "fa", "mix": "bp"}])
def test_mixes_on_masked_tokens(layers):
    mask = torch.tensor([[True, False, True, False], [False, False, False, True], [True, True, False, False]])
    model = rewire.convert(build(Masked), "dfa", layers=layers)
    for _ in range(3):
        one_pass(model, (TOKENS, mask), lambda out: (out - 1).square().mean())
    result = rewire.verify(model, (TOKENS, mask), lambda out: (out - 1).square().mean())
    assert result.ok, str(result)


@pytest.mark.parametrize("rule", RULES)
def test_one_token_of_each_sample_is_no_pick_of_rows(rule):
    """The last token of each, as a sequence classifier takes it."""

    class Last(Albert):
        def forward(self, ids):
            h = self.widen(self.embed(ids))
            h = self.norm(h + self.down(F.gelu(self.up(h))))
            return self.head(torch.tanh(self.pool(h[torch.arange(len(h)), torch.tensor([4, 2, 0, 1, 3, 4])])))

        def __init__(self):
            super().__init__()
            self.pool = nn.Linear(6, 6)

    check(Last, labels(N, 5, classes=11), loss, rule, outputs=["head"])


class PackedExperts(ThreeExperts):
    """All experts for all rows: left on backprop, and said."""

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        y = torch.einsum("nd,edf->nef", h, self.experts)
        h = h + torch.tanh((y * self.gate(h).softmax(-1)[..., None]).sum(1))
        return self.head(torch.tanh(self.mid(h)))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = PackedExperts()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("rule", RULES)
def test_packed_experts_are_named(rule):
    model, _ = check(Packed, X, loss, rule, outputs=["net.head"])
    row = next(row for row in rewire.summary(model).rows if row.name == "net")
    assert not row.converted and "PackedExperts" in row.note


class Router(nn.Linear):
    """A layer whose own forward returns more than its operation does, as routers of experts do."""

    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.softmax(1)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.router, self.head = nn.Linear(5, 6), Router(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.lower(x))
        logits, weights = self.router(h)
        return self.head(h * weights + logits)


@pytest.mark.parametrize("rule", ["fa", "dfa", "frsf"])
def test_a_layer_that_returns_a_tuple(rule):
    check(Routed, randn(7, 5), lambda out: F.cross_entropy(out, labels(7)), rule, outputs=["head"])


class AcrossSamples(nn.Module):
    """Attention over the batch, by mistake or not, of one feature: every row's gradient is a multiple of any other."""

    def __init__(self):
        super().__init__()
        self.lower, self.qkv, self.head = nn.Linear(5, 1), nn.Linear(1, 3), nn.Linear(60, 4)

    def forward(self, x):
        q, k, v = self.qkv(torch.tanh(self.lower(x))).unbind(-1)
        return self.head((q @ k.T).softmax(1) @ v)


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_one_number_prove_nothing_where_samples_mix(seed):
    check(AcrossSamples, randn(3, 60, 5, seed=seed), lambda out: F.cross_entropy(out, labels(3)), "dfa")


class Carries(nn.Module):
    """A state from pass to pass in plain attributes, as truncated backpropagation through time keeps it."""

    def __init__(self):
        super().__init__()
        self.i, self.h, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.state, self.steps = None, 0

    def forward(self, x):
        state = x.new_zeros(len(x), 6) if self.state is None else self.state[0]
        h = torch.tanh(self.i(x) + self.h(state))
        self.state, self.steps, self.seen = (h.detach(),), self.steps + 1, x.sum().item()
        return self.head(h * self.steps)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_kept_in_attributes(rule):
    loss = lambda out: F.cross_entropy(out, labels(7))  # noqa: E731
    model = rewire.convert(build(Carries), rule)
    for _ in range(3):
        one_pass(model, randn(7, 5), loss)
    before, steps = model.state[0].clone(), model.steps
    proof = rewire.verify(model, randn(7, 5), loss)
    assert proof.ok, proof
    assert torch.equal(model.state[0], before) and model.steps == steps
    rewire.alignment(model, randn(7, 5), loss)
    assert torch.equal(model.state[0], before) and model.steps == steps


class Sorted(nn.Module):
    """A recurrent layer over sequences of different lengths: sorted by length inside, and put back in order."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = first, last
        self.i, self.m, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.lower = nn.Linear(5, 5)
        self.rnn = nn.LSTM(6, 6, batch_first=first)

    def forward(self, x, lengths):
        h = torch.tanh(self.i(torch.tanh(self.lower(x))))
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=self.first, enforce_sorted=False)
        packed, (state, _) = self.rnn(packed)
        if self.last:
            return self.head(torch.tanh(self.m(state[-1])))
        y, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=self.first)
        return self.head(torch.tanh(self.m(y)).mean(1 if self.first else 0))


@pytest.mark.parametrize("last", [True, False], ids=["last state", "all states"])
@pytest.mark.parametrize("first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences(rule, first, last):
    x, lengths = randn(3, 7, 5), torch.tensor([7, 2, 4])
    inputs = (x if first else x.transpose(0, 1).contiguous(), lengths)
    loss = lambda out: F.cross_entropy(out, labels(3))  # noqa: E731
    model, _ = check(lambda: Sorted(first, last), inputs, loss, rule, outputs=["head"])
    if rule == "dfa":
        (got,) = handed_back(model, inputs, loss, "i")["i"]
        wanted = (rewire.output_error(model) @ rewire.feedback(model)["i"])[:, None].expand(3, 7, 5)
        torch.testing.assert_close(got if first else got.transpose(0, 1), wanted)


def test_a_pruned_layer():
    def make():
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
        prune.l1_unstructured(model[2], "weight", 0.5)
        return model

    for rule in RULES:
        model = rewire.convert(build(make), rule)
        loss = lambda out: F.cross_entropy(out, labels(7))  # noqa: E731
        for _ in range(3):
            one_pass(model, randn(7, 5), loss)
        assert rewire.verify(model, randn(7, 5), loss).ok


class Chosen(nn.Module):
    """Two of three rows go through a layer, and back to their places."""

    def __init__(self):
        super().__init__()
        self.below, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        rows = torch.tensor([2, 0])
        h = torch.tanh(self.inner(torch.tanh(self.below(x))[rows]))
        return self.head(h.new_zeros(len(x), 5).index_add(0, rows, h))


@pytest.mark.parametrize("below", ["bp", "fa", "kp", "dfa"])
def test_rows_chosen_of_a_layer_under_another_rule(below):
    """Layers that leave no trace of their own on the graph leave one here, in later passes too."""
    loss = lambda out: F.cross_entropy(out, labels(3))  # noqa: E731
    model = rewire.convert(build(Chosen), "dfa", layers={"below": below}, scale=0.3)
    for _ in range(4):
        (got,) = handed_back(model, randn(3, 5), loss, "inner")["inner"]
        wanted = rewire.output_error(model)[[2, 0]] @ rewire.feedback(model)["inner"]
        torch.testing.assert_close(got, wanted)
    assert rewire.verify(model, randn(3, 5), loss).ok


class Features(nn.Module):
    """Its forward gives features; the training loop applies the head."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return torch.tanh(self.two(torch.tanh(self.one(x))))


class Whole(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.head(self.model(x))


@pytest.mark.parametrize("rule", ["dfa", "fa", "usf"])
def test_a_head_that_the_training_loop_applies(rule):
    model = rewire.convert(Features(), rule)
    x = torch.randn(7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rewire.RewireWarning)
        for _ in range(4):
            model.head(model(x)).square().sum().backward()
    found = rewire.verify(Whole(model), x, lambda out: out.square().sum())
    assert found.ok, str(found)
    assert not any("NOT under" in row.note for row in rewire.summary(model).rows)
