"""What the short ways through a call leave at tensors: hooks, and weights that were exchanged."""

import copy

import pytest
import torch
from torch import nn

import rewire
from rewire import handback, steady
from rewire.errors import PassError
from rewire.rules.direct import DFA
from rewire.swap import state_of

from .plain import check, mlp, randn, rule_gradients, settled, weights

X = randn(6, 5)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def loss_of(y):
    return nn.functional.cross_entropy(y, LABELS)


def ready(rule, passes=4, **options):
    return settled(rewire.convert(mlp(), rule, **options), X, loss_of, passes)


def e_of(y):
    return (y.detach().softmax(-1) - nn.functional.one_hot(LABELS, 4)) / len(y)


# -- hooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_hooks_of_the_users_see_what_is_handed_back(rule):
    model = ready(rule)
    seen = []
    for name in ("0", "2", "4"):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, y, name=name: y.register_hook(lambda g: seen.append((name, g.clone()))) and None
        )
    y = model(X)
    loss_of(y).backward()
    assert [name for name, _ in seen] == ["4", "2", "0"]
    for name, delta in seen:  # the gradient of a bias is the sum of what arrives at the output
        torch.testing.assert_close(delta.sum(0), model.get_submodule(name).bias.grad)
    torch.testing.assert_close(seen[0][1], e_of(y))


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_hook_of_the_users_that_changes_a_gradient(rule):
    model = ready(rule)
    model[2].register_forward_hook(lambda m, args, y: y.register_hook(lambda g: 0 * g) and None)
    loss_of(model(X)).backward()
    assert not model[2].weight.grad.any() and model[4].weight.grad.any()
    assert model[0].weight.grad.any() == (rule == "dfa")


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_hooks_after_a_change_in_place_see_what_came_after_it(rule):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 4)).double()
    settled(rewire.convert(model, rule), X, loss_of, 4)
    seen = []
    h = model[0](X)
    before = h.grad_fn
    h = model[1](h)
    assert h.grad_fn is not before
    h.register_hook(lambda g: seen.append(g.clone()))
    loss_of(model[2](h)).backward()
    (after,) = seen
    torch.testing.assert_close(model[0].bias.grad, (after * (h > 0)).sum(0))
    assert not torch.equal(after, after * (h > 0))


def test_hooks_of_ours_are_gone_once_the_error_is_sure_to_come():
    model = ready("dfa")
    outputs = []
    model[2].register_forward_hook(lambda m, args, y: outputs.append(y) and None)
    y = model(X)
    assert not outputs[0]._backward_hooks
    loss_of(y).backward()
    with pytest.raises(PassError, match="layer '2' got a gradient, but no output error can reach it"):
        model[:3](X).sum().backward()


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_saving_what_layers_return_says_nothing_of_hooks(rule, tmp_path, recwarn):
    model = ready(rule)
    recwarn.clear()
    torch.save([model[:3](X), model(X)], tmp_path / "outputs.pt")
    assert not recwarn.list


def test_a_hook_of_the_users_beside_the_check():
    model = ready("dfa")
    h = model[:3](X)
    seen = []
    handle = h.register_hook(seen.append)
    with pytest.raises(PassError, match="no output error can reach it"):
        h.sum().backward()
    handle.remove()
    with pytest.raises(PassError, match="no output error can reach it"):
        model[:3](X).sum().backward()


# -- exchanged weights --------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """How many calls took the short way."""
    made = []
    plain = steady.swapped
    monkeypatch.setattr(steady, "swapped", lambda *args: made.append(args) or plain(*args))
    return made


@pytest.mark.parametrize("rule, often", [("fa", 2), ("frsf", 0), ("brsf", 0), ("usf", 0)])
def test_small_layers_with_fixed_feedback_take_the_short_way(taken, rule, often):
    model = ready(rule)
    taken.clear()
    loss_of(model(X)).backward()
    assert len(taken) == often  # where W is read in the backward, none does


def test_feedback_from_another_seed():
    model = ready("fa")
    before = rewire.feedback(model)["4"].clone()
    for m in model:
        if isinstance(m, nn.Linear):
            state_of(m).wiring.seed = 7
            state_of(m).forget_feedback()
    y = model(X)
    loss_of(y).backward()
    B = rewire.feedback(model)
    assert not torch.equal(B["4"], before)
    check(model, rule_gradients("fa", weights(model), X, e_of(y), B))


@pytest.mark.parametrize("copies", [False, True])
def test_the_gradients_are_those_of_the_rule(copies):
    model = ready("fa")
    for _ in range(3):
        model = copy.deepcopy(model) if copies else model
        model.zero_grad()
        y = model(X)
        loss_of(y).backward()
        check(model, rule_gradients("fa", weights(model), X, e_of(y), rewire.feedback(model)))
        torch.testing.assert_close(y, mlp_of(model)(X), rtol=0, atol=0)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad)


def mlp_of(model):
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    return plain


def test_after_a_change_of_dtype():
    model = ready("fa").float()
    y = model(X.float())
    loss_of(y).backward()
    B = rewire.feedback(model)
    assert B["4"].dtype is torch.float32
    single = rule_gradients("fa", weights(model), X.float(), e_of(y), B)
    check(model, single, tol=1e-5)


def test_feedback_changed_in_place_is_what_is_used():
    model = ready("fa")
    with torch.no_grad():
        rewire.feedback(model)["4"].mul_(-3)
    y = model(X)
    loss_of(y).backward()
    check(model, rule_gradients("fa", weights(model), X, e_of(y), rewire.feedback(model)))


def test_the_weight_may_not_change_before_the_backward():
    """As under backprop: no gradient without a word for another weight than the forward's."""
    model = ready("fa")
    loss = loss_of(model(X))
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_twice_through_one_graph():
    model = ready("fa")
    loss = loss_of(model(X))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters(frozen):
    model = ready("fa")
    getattr(model[2], frozen).requires_grad_(False)
    y = model(X)
    loss_of(y).backward()
    expected = rule_gradients("fa", weights(model), X, e_of(y), rewire.feedback(model))
    del expected[f"2.{frozen}"]
    check(model, expected)


# -- the same feedback at all positions ----------------------------------------------------------------------


class Tokens(nn.Module):
    """(N, T, 5), or (T, N, 5), to (N, 4): what is fed back is read by a norm, an activation, and neither."""

    def __init__(self, sequence_first=False):
        super().__init__()
        self.along = 0 if sequence_first else 1
        self.stem, self.norm = nn.Linear(5, 6), nn.LayerNorm(6)
        self.a, self.b, self.c, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.norm(self.stem(x))
        h = self.b(nn.functional.gelu(self.a(h)))
        h = self.c(h * 2.0)
        return self.head(h.mean(self.along))


def by_hand(model, x, y):
    """Gradients of the layers below ``b`` and ``c``, from the equation, sample by sample and position by position."""
    B = {name: b.detach() for name, b in rewire.feedback(model).items()}
    with torch.no_grad():
        e = (model(x).softmax(-1) - nn.functional.one_hot(y, 4)) / len(y)
        z = model.a(model.norm(model.stem(x)))
        h = model.b(nn.functional.gelu(z))
    slope = torch.autograd.functional.jvp(nn.functional.gelu, z, torch.ones_like(z))[1]
    a, b = torch.zeros_like(model.a.bias), torch.zeros_like(model.b.bias)
    for first in range(x.shape[0]):
        for second in range(x.shape[1]):
            sample = second if model.along == 0 else first
            a += (e[sample] @ B["b"]) * slope[first, second]
            b += 2 * (e[sample] @ B["c"])
    assert h.shape[:2] == x.shape[:2]
    torch.testing.assert_close(model.a.bias.grad, a)
    torch.testing.assert_close(model.b.bias.grad, b)


def tokens_step(model, samples, positions, seed=0):
    shape = (positions, samples, 5) if model.along == 0 else (samples, positions, 5)
    x, y = randn(*shape, seed=seed), torch.arange(samples) % 4
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return x, y


@pytest.mark.parametrize("sequence_first", [False, True])
def test_the_same_feedback_at_all_positions(sequence_first, monkeypatch):
    rule = DFA(layout="sequence_first") if sequence_first else DFA(layout="batch_first")
    model = rewire.convert(Tokens(sequence_first).double(), rule)
    made = []
    plain = steady.port
    monkeypatch.setattr(steady, "port", lambda *args: made.append(args[1][0].name) or plain(*args))
    tokens_step(model, 6, 3)  # backprop, to measure scales
    for samples, positions in [(6, 3), (6, 3), (4, 4), (6, 3), (3, 6), (6, 6), (2, 6), (6, 1)]:
        made.clear()
        by_hand(model, *tokens_step(model, samples, positions, seed=samples))
    if not sequence_first:  # what reads the feedback of a and b may be given it unwritten, of c not
        tokens_step(model, 6, 3)
        assert made[-1:] == ["c"] and set(made) == {"c"}


def test_an_output_that_no_error_reaches():
    model = rewire.convert(Tokens().double(), DFA(layout="batch_first"))
    for _ in range(3):
        x, _ = tokens_step(model, 6, 3)
    h = model.a(model.norm(model.stem(x)))
    with pytest.raises(PassError, match="layer 'a' got a gradient, but no output error can reach it"):
        h.sum().backward()


class Grouped(nn.Sequential):
    """Rows are averaged by groups in front of the last layer."""

    group = 1

    def forward(self, x):
        for layer in list(self)[:-1]:
            x = layer(x)
        return self[-1](x.unflatten(0, (-1, self.group)).mean(1))


def test_rows_that_come_to_be_more_than_there_are_errors():
    model = settled(rewire.convert(Grouped(*mlp()), "dfa"), X, loss_of, 4)
    model.group, x = 2, randn(12, 5)
    check_first(model, model(x), x, lambda e: e.repeat_interleave(2, 0))


def test_an_output_layer_that_gets_more_classes():
    model = ready("dfa")
    model[4].weight, model[4].bias = nn.Parameter(randn(6, 6)), nn.Parameter(randn(6))
    check_first(model, model(X), X, lambda e: e)


def check_first(model, y, x, rows):
    """The first layer's gradient after a step, ``rows`` being what the errors at y are to the rows of x."""
    model.zero_grad()
    loss_of(y).backward()
    e = (y.detach().softmax(-1) - nn.functional.one_hot(LABELS, y.shape[1])) / len(y)
    a = model[1](model[0](x)).detach()
    expected = ((rows(e) @ rewire.feedback(model)["2"]) * (1 - a**2)).T @ x
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_what_the_join_makes_is_counted_once_for_each_layer():
    model = rewire.convert(Tokens().double(), DFA(layout="batch_first"))
    for samples, positions in [(6, 3), (6, 3), (5, 3), (4, 2), (6, 3)]:
        tokens_step(model, samples, positions)
    wiring = state_of(model.a).wiring
    assert wiring.held == sum(layer.in_features for layer in (model.a, model.b, model.c, model.head))


def test_frozen_layers_between():
    model = rewire.convert(Tokens().double(), DFA(layout="batch_first"))
    for _ in range(3):
        tokens_step(model, 6, 3)
    for layer in (model.b, model.c):
        layer.requires_grad_(False)
    x, y = tokens_step(model, 6, 3)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if name.startswith(("a.", "stem."))}
    for layer in (model.b, model.c):
        layer.requires_grad_(True)
    tokens_step(model, 6, 3)
    by_hand(model, x, y)
    for name, g in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, g)


# -- an output layer of tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "brsf", "dfa"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_layer_of_tokens_runs_once_a_pass(monkeypatch, rule, bias):
    torch.manual_seed(0)
    model = rewire.convert(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=bias)), rule)
    x = randn(4, 7, 5).float()
    for _ in range(3):
        model(x).sum().backward()
    before = state_of(model[2]).draws
    runs = []
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: runs.append(self) or plain(self, x))
    y = model(x)
    assert [id(m) for m in runs] == [id(model[0]), id(model[2])]
    assert state_of(model[2]).draws - before == (rule == "brsf")
    assert not y._is_view()
    y.mul_(2).sum().backward()
    if rule != "bp":
        torch.testing.assert_close(rewire.output_error(model), torch.full_like(y, 2))


# -- hidden layers of tokens, whose output is a view of what the operation made ---------------------------------------


class Viewed(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.inplace, self.lost = inplace, False

    def forward(self, x):
        h = torch.tanh(self.first(x))
        y = self.middle(h)
        self.seen = y
        y = y.tanh_() if self.inplace else torch.tanh(y)
        return y if self.lost else self.head(y.mean(1))


@pytest.fixture(params=[0, 2**16], ids=["aliases", "views"])
def viewed(request, monkeypatch):
    monkeypatch.setattr(steady, "_VIEWED", request.param)
    return request.param > 0


@pytest.mark.parametrize("inplace", [True, False])
def test_tokens(viewed, inplace):
    torch.manual_seed(0)
    x = randn(6, 3, 5)
    model = settled(rewire.convert(Viewed(inplace).double(), "dfa", scale=0.5), x, loss_of, 3)
    model.zero_grad()
    seen = []
    out = model(x)
    tokens = x.new_ones(6, 3, 6)
    plain = nn.functional.linear(
        tokens, model.middle.weight, model.middle.bias
    )  # torch 2.13 returns a view, 2.15 does not
    assert model.middle(tokens)._is_view() is (viewed and plain._is_view())
    if not inplace:
        model.seen.register_hook(seen.append)
    loss_of(out).backward()
    B, e = rewire.feedback(model), e_of(out)
    with torch.no_grad():
        h = torch.tanh(nn.Linear.forward(model.first, x))
        y = torch.tanh(nn.Linear.forward(model.middle, h))
    deltas = {"first": (e @ B["middle"])[:, None] * (1 - h**2), "middle": (e @ B["head"])[:, None] / 3 * (1 - y**2)}
    for (name, delta), below in zip(deltas.items(), (x, h), strict=True):
        torch.testing.assert_close(model.get_submodule(name).weight.grad, torch.einsum("nto,nti->oi", delta, below))
    if not inplace:
        torch.testing.assert_close(seen[0], deltas["middle"])


@pytest.mark.parametrize("inplace", [True, False])
def test_tokens_that_no_error_reaches(viewed, inplace):
    x = randn(6, 3, 5)
    model = settled(rewire.convert(Viewed(inplace).double(), "dfa"), x, loss_of, 3)
    model.lost = True
    with pytest.raises(PassError, match="layer 'middle' got a gradient"):
        model(x).sum().backward()


# -- many outputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [0, 2**18], ids=["ports", "held"])
def test_more_outputs_than_features(monkeypatch, held):
    monkeypatch.setattr(handback, "_HELD", held)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 100)).double()
    settled(rewire.convert(model, "dfa", scale=0.5), X, lambda y: y.square().sum(), 3)
    model.zero_grad()
    out = model(X)
    out.square().sum().backward()
    B, e = rewire.feedback(model), 2 * out.detach()
    with torch.no_grad():
        h = [X, model[:2](X), model[:4](X)]
    for i, above in ((0, "2"), (2, "4")):
        delta = e @ B[above] * (1 - h[i // 2 + 1] ** 2)
        torch.testing.assert_close(model[i].weight.grad, delta.T @ h[i // 2])


@pytest.mark.parametrize("rules", [("dfa", "sdfa"), ("sdfa", "dfa")])
def test_two_rules_of_one_error(rules):
    """Each layer is handed what its own rule makes of e, also where the join makes it for all."""
    model = ready("dfa", layers=dict(zip(("2", "4"), rules, strict=True)), scale=0.5)
    y = model(X)
    loss_of(y).backward()
    B = rewire.feedback(model)
    with torch.no_grad():
        h = [X, model[:2](X), model[:4](X)]
    signal = {"dfa": e_of(y), "sdfa": e_of(y).sign()}
    for i, (above, rule) in enumerate(zip(("2", "4"), rules, strict=True)):
        delta = signal[rule] @ B[above] * (1 - h[i + 1] ** 2)
        torch.testing.assert_close(model[2 * i].weight.grad, delta.T @ h[i])


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
def test_feedback_in_use_after_passes_of_another_dtype(other):
    """What is shown, and may be changed in place, is what the newest pass used."""
    torch.manual_seed(0)
    model = rewire.convert(mlp(), "dfa")
    x = torch.randn(6, 5)

    def gradient(dtype):
        model.to(dtype).zero_grad()
        model(x.to(dtype)).square().sum().backward()
        return model[0].weight.grad.clone()

    for dtype in (torch.float32, torch.float32, other, torch.float32):
        before = gradient(dtype)
        found = rewire.feedback(model)
        assert {B.dtype for B in found.values()} == {dtype}
    found["2"].zero_()
    assert before.any() and not gradient(torch.float32).any()


# -- second derivatives ---------------------------------------------------------------------------------------


class Local(torch.autograd.Function):
    """x Wᵀ + b, which hands back δ B, of which B is a constant."""

    @staticmethod
    def forward(ctx, x, W, b, B):
        ctx.save_for_backward(x, B)
        return x @ W.T + b

    @staticmethod
    def backward(ctx, delta):
        x, B = ctx.saved_tensors
        return delta @ B, delta.T @ x, delta.sum(0), None


def penalised(call, parameters):
    """Gradients of a loss with a penalty on the gradient of its input."""
    x = X.clone().requires_grad_()
    loss = loss_of(call(x))
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(loss + 50 * g.square().sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("passes", [0, 1, 4])
@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "brsf", "kp", "wm"])
def test_second_derivatives_are_refused_where_they_would_be_wrong(rule, passes, dims):
    model = ready(rule, passes)
    for _ in range(passes):  # layers whose input has never needed a gradient are not on the shortest way
        loss_of(model(X.clone().requires_grad_())).backward()
    parameters = [model[i].weight for i in (0, 2, 4)]

    def call(x):
        return model(x) if dims == 2 else model(x.unflatten(0, (2, 3))).flatten(0, 1)

    with pytest.raises(PassError, match=r"create_graph=True.*saved_tensors_hooks"):
        penalised(call, parameters)
    # ... and what they are within such hooks, which is what the message says to write.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        ours = penalised(call, parameters)
    loss_of(model(X)).backward()
    if rule in ("fa", "kp"):  # others make B of W, or draw it
        Bs = rewire.feedback(model)

        def by_hand(x):
            for i in (0, 2, 4):
                x = Local.apply(x, model[i].weight, model[i].bias, Bs[str(i)])
                x = x if i == 4 else torch.tanh(x)
            return x

        for a, b in zip(ours, penalised(by_hand, parameters), strict=True):
            torch.testing.assert_close(a, b)


def test_direct_rules_have_second_derivatives():
    """The gradient of x is e B, a function of y alone: the penalty on it is one more loss, with an error of its own."""
    model = ready("dfa")
    for _ in range(2):
        loss_of(model(X.clone().requires_grad_())).backward()
    ours = penalised(model, [model[i].weight for i in (0, 2, 4)])
    B = rewire.feedback(model)
    y = model(X).detach().requires_grad_()
    e = (y.softmax(-1) - nn.functional.one_hot(LABELS, 4)) / len(y)
    (error,) = torch.autograd.grad(loss_of(y) + 50 * (e @ B["0"]).square().sum(), y)
    expected = rule_gradients("dfa", weights(model), X, error, B)
    for i, g in zip((0, 2, 4), ours, strict=True):
        torch.testing.assert_close(g, expected[f"{i}.weight"])


# -- what somebody else has made of the layer, or of the pass -------------------------------------------------


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "brsf", "dfa"])
def test_a_weight_of_another_shape(rule):
    """Structured pruning puts a smaller one in its place: feedback is made anew for it."""
    model = ready(rule)
    keep = torch.arange(5)  # of the 7 units between the first two layers
    first, second = model[0], model[2]
    first.weight, first.bias = nn.Parameter(first.weight[keep].detach()), nn.Parameter(first.bias[keep].detach())
    second.weight = nn.Parameter(second.weight[:, keep].detach())
    fresh = copy.deepcopy(model)  # a copy has no feedback yet, of whatever shape
    for _ in range(2):
        for each in (fresh, model):
            each.zero_grad()
            y = each(X)
            loss_of(y).backward()
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        if rule in ("fa", "dfa"):
            check(model, rule_gradients(rule, weights(model), X, e_of(y), rewire.feedback(model)))


@pytest.mark.parametrize("rule", ["bp", "fa", "dfa"])
def test_many_gradients_at_a_time(rule):
    """``jacobian(vectorize=True)`` and ``is_grads_batched`` work as without conversion."""
    torch.autograd.functional.jacobian(ready(rule), X[:1], vectorize=True)  # a first look at what x's gradient is
    model = ready(rule, scale=0.3)
    with torch.enable_grad():
        one = torch.autograd.functional.jacobian(model, X[:1])
        all_ = torch.autograd.functional.jacobian(model, X[:1], vectorize=True)
    torch.testing.assert_close(all_, one)


LOOKS = {
    "state_dict": nn.Module.state_dict,
    "summary": rewire.summary,
    "scales": rewire.scales,
    "feedback": rewire.feedback,
    "config": rewire.config,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("rule", ["fa", "dfa", "kp", "ldfa", "wm(every=1)", "dkp", "grape", "fitted(every=2)"])
def test_a_look_in_inference_mode(rule, look):
    """What layers have learned is worked out when somebody asks: it has to last."""
    model, twin = (rewire.convert(mlp(), rule) for _ in range(2))
    for step in range(6):
        for each in (model, twin):
            loss_of(each(X)).backward()
            if each is model and step in (0, 3):
                with torch.inference_mode():
                    LOOKS[look](model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class CutOff(nn.Linear):
    """What it returns is a leaf: the graph ends there, by its own forward."""

    def forward(self, x):
        return super().forward(x).detach().requires_grad_()


@pytest.mark.parametrize("rule", ["dfa", "shallow"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_layer_that_cuts_itself_off(rule, at):
    plain = mlp()
    plain[at].__class__ = CutOff
    model = rewire.convert(copy.deepcopy(plain), rule)
    for each in (plain, settled(model, X, loss_of, 4)):
        each.zero_grad()
        loss_of(each(X)).backward()
    assert model[at].weight.grad is None
    assert torch.equal(model[4].weight.grad, plain[4].weight.grad)
