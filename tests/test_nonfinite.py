"""``on_nonfinite=``: gradients that are not finite, errors of zero, feedback that explodes."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewire
from rewire import guard
from rewire.errors import ConversionError, PassError, RewireWarning

RULES = ("bp", "fa", "usf", "brsf", "dfa", "shallow")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed=1):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(5, 6, generator=numbers), torch.randint(3, (5,), generator=numbers)


def backward(model, factor=1.0, seed=1):
    x, y = batch(seed)
    (F.cross_entropy(model(x), y) * factor).backward()


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(a, b):
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


def settled(rule, mode, **options):
    """A model after two ordinary passes."""
    model = rewire.convert(net(), rule, on_nonfinite=mode, **options)
    for seed in (1, 2):
        backward(model, seed=seed)
    model.zero_grad()
    return model


class Break(torch.autograd.Function):
    """Identity whose gradient is what is asked for, times ``factor``."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


class Breaks(nn.Module):
    factor = 1.0

    def forward(self, x):
        return Break.apply(x, self.factor)


# -- off ---------------------------------------------------------------------------------------------------


def test_by_default_nobody_looks_and_nothing_is_dropped():
    model = settled("dfa", None)
    assert model[2]._rewire.steady == "direct"  # the short way through a call
    y = model[2](model[1](model[0](batch()[0])))
    assert model[2]._rewire.wiring.guard is None and y.grad_fn is not None
    backward(model, float("nan"))
    assert all(g.isnan().any() for g in grads(model))


@pytest.mark.parametrize("mode", [*guard.MODES, None])
@pytest.mark.parametrize("rule", RULES)
def test_finite_passes_have_the_gradients_of_an_unwatched_model(rule, mode):
    watched, other = settled(rule, mode), settled(rule, None)
    backward(watched)
    backward(other)
    assert same(grads(watched), grads(other))


@pytest.mark.parametrize("mode", ["ignore", "", 3, True, ["skip"], "skipp"])
def test_other_modes_are_refused(mode):
    model = net()
    with pytest.raises(ConversionError, match="on_nonfinite is"):
        rewire.convert(model, on_nonfinite=mode)
    assert type(model[0]) is nn.Linear


# -- an output error that is not finite --------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_raise_names_the_layer_before_any_parameter_gets_it(rule, factor):
    model = settled(rule, "raise")
    with pytest.raises(PassError, match="layer '4': the output error is not finite"):
        backward(model, factor)
    assert grads(model) == [None] * 6
    backward(model)  # and the next pass is as good as any
    assert all(g is not None and g.isfinite().all() for g in grads(model)[2:])


@pytest.mark.parametrize("rule", RULES)
def test_skip_leaves_every_gradient_and_every_parameter_as_it_was(rule):
    model = settled(rule, "skip")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.warns(RewireWarning, match=r"layer '4': the output error is not finite \(15 of 15 numbers"):
        backward(model, float("nan"))
    assert grads(model) == [None] * 6
    optimizer.step()
    assert str([model.state_dict(), optimizer.state_dict()]) == str(before)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_skip_in_accumulation_drops_that_micro_batch_alone(rule):
    model, other = settled(rule, "skip"), settled(rule, "skip")
    for seed, factor in ((1, 1.0), (2, float("inf")), (3, 1.0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backward(model, factor, seed)
        if factor == 1.0:
            backward(other, 1.0, seed)
    assert same(grads(model), grads(other))


def test_skip_while_a_graph_is_used_twice():
    """The error of the first backward is not fed back in the second one."""
    model = settled("dfa", "skip")
    x, y = batch()
    broken = nn.Sequential(*model, Breaks())
    loss = F.cross_entropy(broken(x), y)
    loss.backward(retain_graph=True)
    model.zero_grad()
    # The factor was noted in the forward; so break the loss instead.
    with pytest.warns(RewireWarning, match="not finite"):
        torch.autograd.backward(loss, torch.tensor(float("nan")))
    assert grads(model) == [None] * 6


def test_skip_leaves_no_error_of_an_earlier_backward_behind():
    """The first backward ends before it has come to the layers below, which the second must not feed from it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 80))
    rewire.convert(model, "dfa", on_nonfinite="skip")
    for seed in (1, 2):
        backward(model, seed=seed)
    model.zero_grad()
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    torch.autograd.grad(loss, model[4].weight, retain_graph=True)
    with pytest.warns(RewireWarning, match="not finite"):
        torch.autograd.backward(loss, torch.tensor(float("nan")))
    assert grads(model) == [None] * 6


def test_warn_says_it_once_by_name_and_changes_nothing():
    model, other = settled("dfa", "warn"), settled("dfa", None)
    with pytest.warns(RewireWarning) as said:
        backward(model, float("nan"))
        backward(model, float("nan"))
    assert len([w for w in said if "'4'" in str(w.message)]) == 1
    for _ in range(2):
        backward(other, float("nan"))
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(grads(model), grads(other), strict=True))


def test_a_first_pass_that_is_not_finite_is_noticed_too():
    model = rewire.convert(net(), "dfa", on_nonfinite="raise")
    with pytest.raises(PassError, match=r"layer '4'.* is not finite"):
        backward(model, float("nan"))


def test_several_outputs_are_named_each():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return self.a(h), self.b(h)

    torch.manual_seed(0)
    model = rewire.convert(Two(), "dfa", on_nonfinite="skip")
    x, y = batch()

    def run(fa, fb):
        a, b = model(x)
        (F.cross_entropy(a, y) * fa + F.cross_entropy(b, y) * fb).backward()

    run(1.0, 1.0)
    run(1.0, 1.0)
    model.zero_grad()
    with pytest.warns(RewireWarning, match="layer 'b'"):
        run(1.0, float("nan"))
    assert model.b.weight.grad is None and model.a.weight.grad.isfinite().all()
    both = [p.grad.clone() for p in model.body.parameters()]
    model.zero_grad()
    x2, _ = batch()
    a, _ = model(x2)
    F.cross_entropy(a, y).backward()
    assert same(both, [p.grad for p in model.body.parameters()])  # what a alone brings


# -- inside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "dfa"])
def test_a_gradient_that_breaks_inside_is_dropped_where_it_breaks(rule):
    torch.manual_seed(0)
    middle = Breaks()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), middle, nn.Tanh(), nn.Linear(8, 3))
    rewire.convert(model, rule, on_nonfinite="skip")
    for seed in (1, 2):
        backward(model, seed=seed)
    model.zero_grad()
    backward(model)
    fine = grads(model)
    model.zero_grad()
    middle.factor = float("nan")
    with pytest.warns(RewireWarning, match="layer '2': the gradient at its output is not finite"):
        backward(model)
    found = grads(model)
    assert same(found[4:], fine[4:])  # above: as ever
    assert found[2:4] == [None, None]
    # Below: a direct rule feeds the first layer from e, which is fine; a local one has nothing to go on with.
    assert same(found[:2], fine[:2]) if rule == "dfa" else found[:2] == [None, None]


# -- zero ----------------------------------------------------------------------------------------------------


def test_an_error_of_zero_is_named():
    model = settled("dfa", "raise")
    with pytest.raises(PassError, match="layer '4': the output error is all zeros"):
        backward(model, 0.0)
    model = settled("fa", "skip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(RewireWarning, match="all zeros"):
        backward(model, 0.0)
    optimizer.step()  # not even weight decay
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tiny_errors_are_not_zero_and_large_ones_not_infinite():
    for factor in (1e-30, 1e25):
        model = rewire.convert(net(), "dfa", on_nonfinite="raise", scale=0.1, output="4")
        for _ in range(3):
            backward(model, factor)


# -- explosion ---------------------------------------------------------------------------------------------


def test_exploding_feedback_is_named_with_its_size():
    torch.manual_seed(0)
    middle = Breaks()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), middle, nn.Tanh(), nn.Linear(8, 3))
    rewire.convert(model, "fa", on_nonfinite="raise")
    for seed in range(guard.RECORDED + 2):
        backward(model, seed=seed)
    middle.factor = 1e3  # not more than ever before: some of it is smaller than the largest
    backward(model, seed=50)
    middle.factor = 1e6
    with pytest.raises(PassError, match="layer '2': the gradient at its output is exploding: root mean square"):
        backward(model)


def test_an_exploding_error_is_named():
    model = rewire.convert(net(), "dfa", on_nonfinite="raise")
    for seed in range(guard.RECORDED + 2):
        backward(model, seed=seed)
    backward(model, 100.0)
    with pytest.raises(PassError, match="layer '4': the output error is exploding"):
        backward(model, 1e5)


def test_a_loss_scale_is_no_explosion_of_layers():
    """Only e has grown: named is the output layer, whatever came of it elsewhere."""
    model = rewire.convert(net(), "fa", on_nonfinite="warn")
    for seed in range(guard.RECORDED + 2):
        backward(model, seed=seed)
    with pytest.warns(RewireWarning) as said:
        backward(model, 1e6)
    assert ["'4'" in str(w.message) for w in said] == [True]


def test_what_starts_at_zero_may_grow():
    model = net()
    nn.init.zeros_(model[4].weight)
    rewire.convert(model, "bp", on_nonfinite="raise")
    for seed in range(guard.RECORDED + 2):
        backward(model, seed=seed)
    nn.init.normal_(model[4].weight)
    backward(model)


# -- scalers, and what is never anything else ------------------------------------------------------------------


def test_a_layer_that_is_always_skipped_is_an_error():
    model = settled("dfa", "skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(guard.PATIENCE - 1):
            backward(model, float("inf"))
        with pytest.raises(PassError, match=r"(?s)layer '4'.*gradient scaler has to see"):
            backward(model, float("inf"))


def test_a_good_pass_in_between_is_enough():
    model = settled("dfa", "skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(2 * guard.PATIENCE):
            backward(model, float("inf") if i % (guard.PATIENCE - 1) else 1.0)


@pytest.mark.parametrize("mode", [None, "warn"])
def test_a_gradient_scaler_sees_what_overflows_and_skips_by_itself(mode):
    model = rewire.convert(net(), "dfa", on_nonfinite=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skipped = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(6):
            x, y = batch(i)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (float("inf") if i == 3 else 1.0)
            scaler.scale(loss).backward()
            before, was = copy.deepcopy(model.state_dict()), scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < was:
                skipped += 1
                assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert skipped == 1


# -- together with the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_attention_convolutions_and_weights_used_by_others(rule):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.attention = nn.Conv1d(1, 8, 3, padding=1), nn.MultiheadAttention(8, 2, batch_first=True)
            self.used, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.conv(x.unsqueeze(1))).transpose(1, 2)
            h = h + self.attention(h, h, h, need_weights=False)[0]
            return self.head(torch.tanh(F.linear(h, self.used.weight)).mean(1))

    torch.manual_seed(0)
    models = [rewire.convert(Model(), rule, on_nonfinite=mode) for mode in (None, "skip")]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        rewire.convert(model, rule, on_nonfinite=model.head._rewire.wiring.guard and "skip")
        for _ in range(3):
            model.zero_grad()
            backward(model)
    assert same(grads(models[0]), grads(models[1]))
    models[1].zero_grad()
    with pytest.warns(RewireWarning, match="'head'"):
        backward(models[1], float("nan"))
    assert all(g is None for g in grads(models[1]))


def test_streamed_passes_drop_it_at_every_layer():
    model = rewire.convert(net(), "dfa", skip="cut", on_nonfinite="skip")
    x, y = batch()
    for factor in (1.0, 1.0, float("nan")):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rewire.backward_streamed(model, x, lambda out, f=factor: F.cross_entropy(out, y) * f)
    assert all(g is None for g in grads(model))


def test_streamed_passes_name_the_output_layer():
    model = rewire.convert(net(), "dfa", skip="cut", on_nonfinite="raise")
    x, y = batch()
    for _ in range(2):
        rewire.backward_streamed(model, x, lambda out: F.cross_entropy(out, y))
    with pytest.raises(PassError, match="layer '4': the output error is not finite"):
        rewire.backward_streamed(model, x, lambda out: F.cross_entropy(out, y) * math.nan)


def test_compiled_models_are_watched_outside_of_the_graph():
    model = settled("dfa", "raise")
    compiled = torch.compile(model, backend="eager")
    x, y = batch()
    F.cross_entropy(compiled(x), y).backward()
    with pytest.raises(PassError, match="not finite"):
        (F.cross_entropy(compiled(x), y) * float("nan")).backward()


def test_verify_and_copies_of_a_watched_model():
    model = settled("dfa", "raise")
    x, y = batch()
    assert rewire.verify(model, x, lambda out: F.cross_entropy(out, y)).ok
    other = copy.deepcopy(model)
    with pytest.raises(PassError, match="not finite"):
        backward(other, float("nan"))


def test_a_config_keeps_the_mode_and_what_was_recorded():
    model = rewire.convert(net(), "dfa", on_nonfinite="raise")
    for seed in range(guard.RECORDED + 2):
        backward(model, seed=seed)
    other = rewire.load_config(net(), rewire.config(model))
    other.load_state_dict(model.state_dict())
    with pytest.raises(PassError, match="exploding"):
        backward(other, 1e6)


def test_what_is_skipped_leaves_walls_without_a_gradient():
    model = rewire.convert(net(), "dfa", skip="cut", on_nonfinite="skip")
    for seed in (1, 2):
        backward(model, seed=seed)
    model.zero_grad()
    with pytest.warns(RewireWarning, match="output error is not finite"):
        backward(model, factor=math.nan)
    assert all(g is None for g in grads(model))
    backward(model)
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads(model))
