"""``verify`` must not be fooled: the library is broken on purpose, and verify must say so, naming the layer."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire import ask, edges, hosts, layer_feedback, local_weights, marks, rows, run, steady, swap, wiring
from rewire.feedback import standard_normal
from rewire.passes import OutputError
from rewire.routing import Route
from rewire.rules.direct import DFA, SDFA
from rewire.rules.local import FA, FRSF, USF
from rewire.state import LayerState

from .test_verify import X, Y, loss_of, made, mlp, statuses

BAD = {"dead", "unrouted", "wrong"}


def check(model, *names, inputs=X, loss=loss_of, status=BAD):
    """Not ok, and of these layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = rewire.verify(model, inputs, loss)
    assert not result.ok, str(result)
    for name in names:
        assert statuses(result)[name] in status, str(result)
    return result


@pytest.fixture(params=["fresh", "trained"])
def model(request):
    """Of any rule, fresh or trained; broken afterwards."""

    def build(rule, **options):
        model = made(mlp, rule, **options)
        for _ in range(3 * (request.param == "trained")):
            loss_of(model(X)).backward()
        return model

    return build


def every_call(monkeypatch, function):
    """Each call of each layer is ``function(plain, state, module, forward, args, kwargs)``."""
    plain = swap.run
    monkeypatch.setattr(swap, "run", lambda *call: function(plain, *call))
    for name, short in steady.STEADY.items():

        def watched(state, module, forward, fast, x, short=short):
            return function(
                lambda s, m, f, args, kwargs: short(s, m, f, fast if f is forward else f, args[0]),
                state,
                module,
                forward,
                (x,),
                {},
            )

        monkeypatch.setitem(steady.STEADY, name, watched)


# -- what is handed back -----------------------------------------------------------------------------------

TAMPER = {
    "a little too much": lambda g: g * (1 + 1e-9),
    "negated": lambda g: -g,
    "features turned round": lambda g: g.flip(1),
    "samples mixed": lambda g: g.roll(1, 0),
    "zeros": torch.zeros_like,
    "averaged over the batch": lambda g: g.mean(0, keepdim=True).expand_as(g),
}


@pytest.fixture
def ports(monkeypatch):
    """Feedback goes through ports, that of the output layer too; where it is small the join would make it."""
    monkeypatch.setattr(steady, "_autocast", lambda: True)


@pytest.mark.parametrize("how", TAMPER)
def test_a_port_that_hands_back_something_else(monkeypatch, ports, model, how):
    m = model("dfa")
    plain = LayerState.hand_back

    def broken(self, *args):
        fed = plain(self, *args)
        return TAMPER[how](fed) if fed is not None and self.name == "2" else fed

    monkeypatch.setattr(LayerState, "hand_back", broken)
    result = check(m, "2")
    assert statuses(result)["4"] == "live"


@pytest.mark.parametrize("how", TAMPER)
def test_a_join_that_hands_back_something_else(monkeypatch, how):
    m = made(mlp, "dfa")
    for _ in range(3):
        loss_of(m(X)).backward()
    plain, used = marks.join, []

    def broken(y, error, handed, *tensors):
        tensors = [*tensors]
        for i, (call, *_) in enumerate(handed, len(tensors) - len(handed)):
            if call.state.name == "2":
                used.append(call)
                tensors[i] = tensors[i].clone()
                tensors[i].register_hook(TAMPER[how])
        return plain(y, error, handed, *tensors)

    monkeypatch.setattr(marks, "join", broken)
    check(m, "2")
    assert used


@pytest.mark.parametrize("how", TAMPER)
def test_a_local_rule_that_hands_back_something_else(monkeypatch, model, how):
    m = model("fa")

    def broken(plain, state, module, forward, args, kwargs):
        if state.name == "2":
            x = args[0].clone()
            x.register_hook(TAMPER[how])
            args = (x,)
        return plain(state, module, forward, args, kwargs)

    every_call(monkeypatch, broken)
    check(m, "2")


@pytest.mark.parametrize("how", ["the weight", "its sign", "zeros", "transposed twice over"])
def test_another_weight_in_the_backward(monkeypatch, model, how):
    m = model("fa")
    plain = local_weights.LocalWeight.combine

    def broken(self, weight, random):
        B = plain(self, weight, random)
        if self.state.name != "2":
            return B
        return {
            "the weight": m[2].weight.detach(),
            "its sign": B.sign(),
            "zeros": B * 0,
            "transposed twice over": B.flip(0).flip(1),
        }[how]

    monkeypatch.setattr(local_weights.LocalWeight, "combine", broken)
    check(m, "2")


def test_a_port_that_hands_back_nothing(monkeypatch, ports, model):
    m = model("dfa")
    monkeypatch.setattr(LayerState, "hand_back", lambda self, *args: None)
    assert set(statuses(check(m, "2", "4")).values()) <= {"first layer", "unrouted", "wrong"}


def test_a_layer_left_out_of_the_pass(monkeypatch, model):
    """The walk from the output misses a layer: it hands back nothing, and nothing of the library's says otherwise."""
    m = model("dfa")
    plain = marks.upstream
    monkeypatch.setattr(marks, "upstream", lambda *a: [c for c in plain(*a) if c.state.name != "2"])
    monkeypatch.setattr(edges, "_refuse", lambda *args: None)
    check(m, "2")


# -- a rule that is silently not used -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fa", "usf", "brsf", "frsf", "dfa", "sdfa", "shallow"])
def test_a_rule_that_is_not_used_at_all(monkeypatch, model, rule):
    m = model(rule)
    every_call(monkeypatch, lambda plain, state, module, forward, args, kwargs: forward(module, *args, **kwargs))
    check(m, "4")


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_layer_that_got_its_old_class_back(model, rule):
    m = model(rule)
    m[4].__class__ = nn.Linear
    check(m, "4")


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_forward_that_bypasses_the_rule(model, rule):
    m = model(rule)
    m[2].forward = lambda x: F.linear(x, m[2].weight, m[2].bias)
    check(m, "2")


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
def test_a_backward_weight_that_is_the_weight(monkeypatch, model, rule):
    """Here the library's own formula is broken with it: feedback(model) shows W as well."""
    m = model(rule)
    for cls in (FA, USF, FRSF):
        monkeypatch.setattr(cls, "backward_weight", lambda self, weight, random, scale: weight)
        monkeypatch.setattr(cls, "uses_weight", True)
    check(m, "4", "2")


def test_random_feedback_of_ones(monkeypatch, model):
    m = model("fa")
    monkeypatch.setattr(layer_feedback, "standard_normal", lambda shape, **k: torch.ones(shape))
    check(m, "4", "2")


def test_random_feedback_without_its_scale(monkeypatch):
    m = made(mlp, "fa")
    monkeypatch.setattr(
        LayerState,
        "random",
        lambda self, rule, shape, dtype, device, draw=0: standard_normal(shape, seed=0, name=self.name).to(dtype),
    )
    check(m, "4", "2")


@pytest.mark.parametrize(
    ("cls", "rule", "signal"),
    [
        (DFA, "dfa", torch.sign),
        (DFA, "dfa", torch.zeros_like),
        (DFA, "dfa", lambda e: e.roll(1, 0)),
        (SDFA, "sdfa", lambda e: e),
    ],
)
def test_a_signal_that_is_not_the_rules(monkeypatch, cls, rule, signal):
    m = made(mlp, rule, scale=0.3)
    monkeypatch.setattr(cls, "signal", lambda self, error, targets, axis: signal(error))
    check(m, "4", "2")


def test_a_probe_that_never_stops_measuring(monkeypatch, model):
    """Exact backprop for ever, because layers are never settled."""
    monkeypatch.setattr(wiring, "settle_scales", lambda self: None)
    m = made(mlp, "dfa")
    for _ in range(3):
        loss_of(m(X)).backward()
    check(m, "4", "2")


def test_feedback_that_is_not_the_one_in_use(monkeypatch, model):
    m = model("dfa")
    plain = ask.dense_feedback
    monkeypatch.setattr(ask, "dense_feedback", lambda *of: {k: -v for k, v in plain(*of).items()})
    check(m, "4", "2")


# -- gradients of the layer's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_wrong_gradient_of_a_local_rules_own(monkeypatch, model, which):
    m = model("fa")

    def off(plain, state, module, *rest):
        y, parameter = plain(state, module, *rest), getattr(module, which)
        if state.name != "2" or not isinstance(state.rule, rewire.LocalRule):
            return y
        return y + 1e-6 * (parameter - parameter.detach()).sum()  # the value is the same

    every_call(monkeypatch, off)
    check(m, "2", status={"wrong"})


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_wrong_gradient_of_a_direct_rules_own(monkeypatch, model, which):
    m = model("dfa")

    def off(module, x):
        y, parameter = nn.Linear.forward(module, x), getattr(module, which)
        return y + 1e-6 * (parameter - parameter.detach()).sum() if y.shape[-1] == 6 else y

    def direct(plain, state, module, forward, args, kwargs):
        return plain(state, module, off if isinstance(state.rule, rewire.DirectRule) else forward, args, kwargs)

    every_call(monkeypatch, direct)
    check(m, "2", status={"wrong"})


def test_a_gradient_that_is_lost_between_layers(monkeypatch):
    """Not a layer's: the parameters of a norm."""

    def build():
        return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4))

    m = made(build, "dfa")
    forward = nn.LayerNorm.forward

    def once(self, x):
        rewired = any(type(n).__name__ == "Rewired" for n in ()) or x.grad_fn.metadata.get("rewire.call") is not None
        return forward(self, x) + (self.bias.sum() - self.bias.sum().detach() if rewired else 0)

    monkeypatch.setattr(nn.LayerNorm, "forward", once)
    result = check(m)
    assert "1.bias" in str(result)


def test_a_join_that_changes_the_output_error(monkeypatch, model):
    m = model("dfa")
    plain = edges.Join.backward

    def broken(ctx, gradient):
        first, *rest = plain(ctx, gradient)
        return (None if first is None else first * 2, *rest)

    monkeypatch.setattr(edges.Join, "backward", staticmethod(broken))
    check(m, "4")


def test_an_output_error_of_another_sample(monkeypatch, model):
    m = model("dfa")
    plain = OutputError.deliver
    monkeypatch.setattr(OutputError, "deliver", lambda self, g: plain(self, g.roll(1, 0)))
    check(m, "4", "2")


def test_a_route_to_other_rows(monkeypatch, ports, model):
    m = model("dfa")
    plain = Route.__call__
    monkeypatch.setattr(Route, "__call__", lambda self, s, B: plain(self, s, B).flip(0))
    check(m, "4", "2")


def test_a_skip_that_is_cut_without_being_asked(monkeypatch):
    m = made(_residual, "dfa")
    wall = edges.wall_at
    monkeypatch.setattr(run, "_wall", lambda state, rule, x: None if state.needs_scale(rule) else wall(x))
    monkeypatch.setattr(LayerState, "steady", property(lambda self: False, lambda self, value: None), raising=False)
    check(m)


def test_a_skip_that_is_kept_though_it_was_to_be_cut(monkeypatch):
    m = made(_residual, "dfa", skip="cut")
    monkeypatch.setattr(run, "_wall", lambda state, rule, x: None)
    check(m, "a")


def _residual():
    from .test_verify import Residual

    return Residual()


# -- samples ------------------------------------------------------------------------------------------------


class Siamese(nn.Module):
    """Both of a pair go through the body in one batch, one behind the other: row i belongs to sample i mod N."""

    def __init__(self, interleaved=False):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(12, 4)
        self.interleaved = interleaved

    def forward(self, x):
        both = torch.stack([x, x.flip(1)], 1).flatten(0, 1) if self.interleaved else torch.cat([x, x.flip(1)])
        h = torch.tanh(self.body(torch.tanh(self.first(both))))
        return self.head(h.reshape(len(x), -1) if self.interleaved else torch.cat(h.chunk(2), 1))


def test_feedback_of_other_samples_errors_is_wrong(monkeypatch):
    """2N rows may be pairs side by side or two batches; the shapes do not tell, but backprop does."""
    assert rewire.verify(made(lambda: Siamese(interleaved=True)), X, loss_of).ok
    assert rewire.verify(made(Siamese), X, loss_of).ok  # seen to be two batches
    monkeypatch.setattr(rows, "_note_stacks", lambda state, x: None)
    result = check(made(Siamese), "body")
    assert "other samples" in str(result.layers[1].note)
    assert rewire.verify(made(Siamese, "fa"), X, loss_of).ok


class Shuffled(nn.Module):
    """A permutation of the batch goes through the body."""

    def __init__(self):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        order = torch.tensor([3, 1, 0, 5, 2, 4])
        h = torch.tanh(self.body(torch.tanh(self.first(x))[order]))
        return self.head(torch.zeros_like(h).index_copy(0, order, h))


def test_rows_in_another_order_are_wrong(monkeypatch):
    assert rewire.verify(made(Shuffled), X, loss_of).ok  # the index is found, and followed
    monkeypatch.setattr(run, "note_rows", lambda state, x: None)
    monkeypatch.setattr("rewire.diagnose.watch.pick_of", lambda x, known: None)
    result = check(made(Shuffled), "body", status={"wrong"})
    assert statuses(result)["head"] == "live"
    assert rewire.verify(made(Shuffled, "fa"), X, loss_of).ok


class SequenceFirst(nn.Module):
    """(T, N, F) with T a multiple of N: by its shape alone it might be windows."""

    def __init__(self):
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(1, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x.t().repeat(2, 1)[:, :5].unsqueeze(-1).repeat(1, 1, 1)))
        h = torch.tanh(self.mid(h))
        return self.head(h.mean(0))


def test_sequences_read_the_wrong_way_round_are_wrong():
    x = X[:5]

    def loss(out):
        return F.cross_entropy(out, Y[:5])

    wrong = made(SequenceFirst, DFA(layout="batch_first"), layers={"head": "bp"})
    check(wrong, "mid", inputs=x, loss=loss, status={"wrong"})
    right = made(SequenceFirst, DFA(layout="sequence_first"), layers={"head": "bp"})
    assert rewire.verify(right, x, loss).ok


def test_an_index_that_cannot_be_followed_is_said():
    class Twisted(Shuffled):
        def forward(self, x):
            order = torch.tensor([3, 1, 0, 5, 2, 4])
            h = torch.tanh(self.first(x))
            h = torch.tanh(self.body(h[order] + h))  # two samples in each row
            return self.head(torch.zeros_like(h).index_copy(0, order, h))

    model = made(Twisted)
    with pytest.warns(rewire.RewireWarning, match="'body'.*picked from the batch"):
        loss_of(model(X)).backward()


# -- weights used directly ------------------------------------------------------------------------------------


def directly(use):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.used, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.last(torch.tanh(use(torch.tanh(self.first(x)), self.used)))

    return Net


USES = {
    "transposed": lambda x, layer: x @ layer.weight.t(),
    "property": lambda x, layer: x @ layer.weight.mT,
    "einsum": lambda x, layer: torch.einsum("bi,oi->bo", x, layer.weight),
    "addmm": lambda x, layer: torch.addmm(layer.bias, x, layer.weight.t()),
    "matmul": lambda x, layer: torch.matmul(x, layer.weight),
    "bmm": lambda x, layer: torch.bmm(x[None], layer.weight[None]).squeeze(0),
    "product": lambda x, layer: (x[:, None] * layer.weight).sum(-1),
    "slices": lambda x, layer: torch.cat([x @ layer.weight[:3].t(), x @ layer.weight[3:].t()], 1),
    "as a parameter of its own operation": lambda x, layer: Own.apply(x, layer.weight),
}


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight.t(), x.t() @ g


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("use", USES)
def test_a_weight_used_in_ways_that_are_not_known_is_dead_or_live(use, frozen, rule):
    m = made(directly(USES[use]), rule)
    m.used.requires_grad_(not frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = rewire.verify(m, X, loss_of)
    assert statuses(result)["used"] in {"dead", "live"}, str(result)
    assert result.ok == (statuses(result)["used"] == "live")


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("use", USES)
def test_a_layer_that_runs_and_is_bypassed_as_well_is_dead_or_live(use, rule):
    m = made(directly(lambda x, layer: layer(x) + USES[use](x, layer)), rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = rewire.verify(m, X, loss_of)
    assert statuses(result)["used"] in {"dead", "live"}, str(result)
    assert result.ok == (statuses(result)["used"] == "live")


class Auto(nn.Module):
    """The output is made with a hidden layer's weight, transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.code = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return F.linear(torch.tanh(self.code(torch.tanh(self.first(x)))), self.code.weight.t())


BLIND = {
    **{use: (directly(USES[use]), "used", loss_of) for use in USES},
    **{
        f"{use} as well": (directly(lambda x, layer, use=use: layer(x) + USES[use](x, layer)), "used", loss_of)
        for use in USES
    },
    "tied decoder": (Auto, "code", lambda out: (out - X).square().mean()),
}


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("use", BLIND)
def test_weights_used_directly_when_nobody_watches_for_it(monkeypatch, use, rule):
    """The watch for such uses is switched off: verify finds them on the graph, without it."""
    monkeypatch.setattr(hosts, "attach", lambda *args: None)
    monkeypatch.setattr(marks, "direct_uses", lambda *args: set())
    make, name, loss = BLIND[use]
    check(made(make, rule), name, loss=loss, status={"dead", "wrong"})
