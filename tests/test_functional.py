"""Functional twins, and torch.func on them and on converted models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

import rewire
import rewire.functional as RF

CONV = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
# name: (x, W, features out, keyword arguments)
CASES = {
    "linear": [((5, 4), (3, 4), 3, {}), ((2, 5, 4), (3, 4), 3, {})],
    "conv1d": [
        ((3, 4, 7), (6, 2, 3), 6, CONV),
        ((3, 2, 7), (3, 2, 3), 3, {}),
        ((3, 2, 7), (3, 2, 3), 3, {"padding": "same"}),
    ],
    "conv2d": [
        ((3, 4, 5, 6), (6, 2, 3, 2), 6, CONV),
        ((3, 2, 5, 6), (3, 2, 3, 2), 3, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
        ((3, 2, 5, 6), (3, 2, 3, 2), 3, {"padding": "same", "dilation": 2}),
        ((3, 2, 5, 6), (3, 2, 3, 2), 3, {"padding": "valid"}),
    ],
    "conv3d": [((2, 4, 3, 4, 5), (6, 2, 2, 3, 2), 6, CONV)],
    "conv_transpose1d": [
        ((3, 4, 5), (4, 3, 3), 6, {**CONV, "output_padding": 1}),
        ((3, 2, 5), (2, 3, 3), 3, {}),
    ],
    "conv_transpose2d": [
        ((3, 4, 3, 4), (4, 3, 3, 2), 6, {**CONV, "output_padding": (1, 0)}),
        ((3, 2, 3, 4), (2, 3, 2, 2), 3, {"stride": (1, 2), "dilation": (2, 1)}),
    ],
    "conv_transpose3d": [((2, 4, 2, 3, 2), (4, 3, 2, 2, 3), 6, {**CONV, "output_padding": 1})],
}
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]
IDS = [f"{name}-{i}" for name, cases in CASES.items() for i in range(len(cases))]
FUNCTIONS = pytest.mark.parametrize(("name", "x_shape", "w_shape", "out", "options"), FLAT, ids=IDS)


def tensors(x_shape, w_shape, out):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=g)

    return randn(*x_shape), randn(*w_shape), randn(*w_shape), randn(out)


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def expected_gradients(name, x, W, B, b, options, delta_of):
    """Gradients for x, W and b from two ordinary calls: ∂W, ∂b with W, what x gets with B."""
    plain = getattr(F, name)
    x1, W1 = x.clone().requires_grad_(), W.clone().requires_grad_()
    b1 = None if b is None else b.clone().requires_grad_()
    y = plain(x1, W1, b1, **options)
    delta = delta_of(y.detach())
    gW, *gb = torch.autograd.grad(y, [W1] if b is None else [W1, b1], delta)
    x2 = x.clone().requires_grad_()
    (gx,) = torch.autograd.grad(plain(x2, B, None, **options), x2, delta)
    return gx, gW, *gb


def delta_of(y):
    return torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)


@FUNCTIONS
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(name, x_shape, w_shape, out, options, bias):
    x, W, B, b = tensors(x_shape, w_shape, out)
    b = b if bias else None
    expected = expected_gradients(name, x, W, B, b, options, delta_of)
    leaves = [t.requires_grad_() for t in (x, W, B, b) if t is not None]
    y = getattr(RF, name)(x, W, B, b, **options)
    assert torch.equal(y, getattr(F, name)(x, W, b, **options))
    y.backward(delta_of(y))
    close(x.grad, expected[0])
    close(W.grad, expected[1])
    if bias:
        close(b.grad, expected[2])
    assert B.grad is None
    assert len(leaves) == 3 + bias


@FUNCTIONS
def test_only_what_is_asked_for(name, x_shape, w_shape, out, options):
    for wanted in ("x", "W", "b"):
        x, W, B, b = tensors(x_shape, w_shape, out)
        gx, gW, gb = expected_gradients(name, x, W, B, b, options, delta_of)
        {"x": x, "W": W, "b": b}[wanted].requires_grad_()
        y = getattr(RF, name)(x, W, B, b, **options)
        y.backward(delta_of(y))
        close({"x": x, "W": W, "b": b}[wanted].grad, {"x": gx, "W": gW, "b": gb}[wanted])
        assert [t.grad is not None for t in (x, W, B, b)].count(True) == 1


@FUNCTIONS
def test_with_B_equal_W_is_the_ordinary_function(name, x_shape, w_shape, out, options):
    x, W, _, b = tensors(x_shape, w_shape, out)
    x.requires_grad_(), W.requires_grad_(), b.requires_grad_()
    ours = getattr(RF, name)(x, W, W.detach(), b, **options)
    plain = getattr(F, name)(x, W, b, **options)
    delta = delta_of(plain)
    for a, e in zip(
        torch.autograd.grad(ours, (x, W, b), delta), torch.autograd.grad(plain, (x, W, b), delta), strict=True
    ):
        close(a, e)


@FUNCTIONS
def test_func_grad(name, x_shape, w_shape, out, options):
    x, W, B, b = tensors(x_shape, w_shape, out)

    def loss(x, W, b, B):
        y = getattr(RF, name)(x, W, B, b, **options)
        return (y * delta_of(y)).sum()

    gx, gW, gb, gB = grad(loss, argnums=(0, 1, 2, 3))(x, W, b, B)
    for ours, expected in zip((gx, gW, gb), expected_gradients(name, x, W, B, b, options, delta_of), strict=True):
        close(ours, expected)
    assert not gB.any()


@FUNCTIONS
def test_vmap_of_the_forward(name, x_shape, w_shape, out, options):
    _, W, B, b = tensors(x_shape, w_shape, out)
    xs = torch.randn(3, *x_shape, dtype=torch.float64)
    Ws = torch.randn(3, *w_shape, dtype=torch.float64)
    call = getattr(RF, name)
    close(
        vmap(lambda x: call(x, W, B, b, **options))(xs),
        torch.stack([call(x, W, B, b, **options) for x in xs]),
    )
    close(
        vmap(lambda x, W: call(x, W, B, b, **options))(xs, Ws),
        torch.stack([call(x, W, B, b, **options) for x, W in zip(xs, Ws, strict=True)]),
    )


def stacked(trees):
    return tuple(torch.stack(parts) for parts in zip(*trees, strict=True))


@FUNCTIONS
def test_per_sample_gradients(name, x_shape, w_shape, out, options):
    x, W, B, b = tensors(x_shape, w_shape, out)

    def loss(x, W, b):
        y = getattr(RF, name)(x[None], W, B, b, **options)
        return (y**2 * delta_of(y)).sum()

    one = grad(loss, argnums=(0, 1, 2))
    ours = vmap(one, in_dims=(0, None, None))(x, W, b)
    for a, e in zip(ours, stacked([one(sample, W, b) for sample in x]), strict=True):
        close(a, e)
    for sample, gx, gW, gb in zip(x, *ours, strict=True):
        expected = expected_gradients(name, sample[None], W, B, b, options, lambda y: 2 * y * delta_of(y))
        for a, e in zip((gx[None], gW, gb), expected, strict=True):
            close(a, e)


@FUNCTIONS
@pytest.mark.parametrize("stack_B", [False, True], ids=["shared B", "stacked B"])
def test_vmap_over_stacked_weights(name, x_shape, w_shape, out, options, stack_B):
    x, _, B, _ = tensors(x_shape, w_shape, out)
    g = torch.Generator().manual_seed(3)
    Ws, Bs, bs = (torch.randn(3, *shape, dtype=torch.float64, generator=g) for shape in (w_shape, w_shape, (out,)))
    Bs = Bs if stack_B else B

    def loss(W, B, b):
        y = getattr(RF, name)(x, W, B, b, **options)
        return (y**2).sum()

    def with_input(x, W, B, b):
        y = getattr(RF, name)(x, W, B, b, **options)
        return (y**2).sum()

    dims = (0, 0 if stack_B else None, 0)
    ours = vmap(grad(loss, argnums=(0, 2)), in_dims=dims)(Ws, Bs, bs)
    rows = [(Ws[i], Bs[i] if stack_B else B, bs[i]) for i in range(3)]
    for a, e in zip(ours, stacked([grad(loss, argnums=(0, 2))(*row) for row in rows]), strict=True):
        close(a, e)
    gx = vmap(grad(with_input), in_dims=(None, *dims))(x, Ws, Bs, bs)
    for row, got in zip(rows, gx, strict=True):
        close(got, expected_gradients(name, x, *row, options, lambda y: 2 * y)[0])


def test_a_network_of_functions_trains_under_grad():
    """Two FA layers written with torch.func, against the formulas."""
    g = torch.Generator().manual_seed(0)
    x, W1, W2, B2, t = (
        torch.randn(s, dtype=torch.float64, generator=g) for s in ((6, 5), (7, 5), (3, 7), (3, 7), (6, 3))
    )

    def loss(params):
        h = torch.tanh(RF.linear(x, params["W1"], torch.zeros_like(W1)))
        return ((RF.linear(h, params["W2"], B2) - t) ** 2).sum()

    grads = grad(loss)({"W1": W1, "W2": W2})
    h = torch.tanh(x @ W1.T)
    delta = 2 * (h @ W2.T - t)
    close(grads["W2"], delta.T @ h)
    close(grads["W1"], ((delta @ B2) * (1 - h**2)).T @ x)


@FUNCTIONS
def test_an_input_without_a_batch_dimension(name, x_shape, w_shape, out, options):
    x, W, B, b = tensors(x_shape, w_shape, out)
    x = x[0] if name != "linear" else x.reshape(-1, x_shape[-1])[0]
    expected = expected_gradients(name, x, W, B, b, options, delta_of)
    x.requires_grad_(), W.requires_grad_(), b.requires_grad_()
    y = getattr(RF, name)(x, W, B, b, **options)
    assert torch.equal(y, getattr(F, name)(x, W, b, **options))
    y.backward(delta_of(y))
    for t, e in zip((x, W, b), expected, strict=True):
        close(t.grad, e)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose2d"])
def test_a_feedback_of_the_wrong_shape_is_refused(name):
    x_shape, w_shape, out, options = CASES[name][0]
    x, W, B, b = tensors(x_shape, w_shape, out)
    with pytest.raises(rewire.RewireError, match="shape"):
        getattr(RF, name)(x.requires_grad_(), W, B[:-1], b, **options).sum().backward()


# -- converted models -------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))


def cnn():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 4),
    )


MODELS = {"mlp": (mlp, (6, 5)), "cnn": (cnn, (6, 4, 5, 7))}
BY_MODEL = pytest.mark.parametrize("net", MODELS)
BY_RULE = pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "dfa", "sdfa", "shallow"])
BY_SCALE = pytest.mark.parametrize("scale", [0.3, "auto"])


def converted(net, rule, scale=0.3, seed=0):
    """A converted model after one ordinary training pass, its data, and a functional loss."""
    make, shape = MODELS[net]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        x = torch.randn(shape, dtype=torch.float64)
        y = torch.randint(4, (shape[0],))
    rewire.convert(model, rule, scale=scale)
    F.cross_entropy(model(x), y).backward()
    model.zero_grad()

    def loss(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    return model, x, y, loss


def detached(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backward_gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same(ours, expected):
    assert ours.keys() == expected.keys()
    for name in expected:
        close(ours[name], expected[name], tol=1e-11)


def sliced(tree, i):
    return {name: t[i] for name, t in tree.items()}


@BY_MODEL
@BY_RULE
@BY_SCALE
def test_converted_grad(net, rule, scale):
    model, x, y, loss = converted(net, rule, scale)
    same(grad(loss)(detached(model), x, y), backward_gradients(model, x, y))


@BY_MODEL
@BY_RULE
def test_converted_grad_is_not_backprop(net, rule):
    model, x, y, loss = converted(net, rule)
    plain = rewire.restore(copy.deepcopy(model))
    exact = backward_gradients(plain, x, y)
    ours = grad(loss)(detached(model), x, y)
    assert not torch.allclose(ours["0.weight"], exact["0.weight"], rtol=1e-3, atol=1e-8)


@BY_MODEL
@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
@BY_SCALE
def test_local_rules_need_no_ordinary_pass_first(net, rule, scale):
    used, x, y, _ = converted(net, rule, scale)
    expected = backward_gradients(used, x, y)
    fresh = rewire.restore(copy.deepcopy(used))
    rewire.convert(fresh, rule, scale=scale)
    fresh.zero_grad(set_to_none=True)

    def loss(params):
        return F.cross_entropy(functional_call(fresh, params, (x,)), y)

    same(grad(loss)(detached(fresh)), expected)


@BY_MODEL
@BY_RULE
@BY_SCALE
def test_converted_grad_of_the_input(net, rule, scale):
    model, x, y, loss = converted(net, rule, scale)
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()  # with scale="auto" the first layer is only now measured
    x.grad = None
    F.cross_entropy(model(x), y).backward()
    expected = x.grad.clone()
    close(grad(loss, argnums=1)(detached(model), x.detach(), y), expected)


@BY_MODEL
@BY_RULE
@BY_SCALE
def test_converted_per_sample_gradients(net, rule, scale):
    model, x, y, loss = converted(net, rule, scale)

    def one(params, x, y):
        return loss(params, x[None], y[None])

    ours = vmap(grad(one), in_dims=(None, 0, 0))(detached(model), x, y)
    for i in range(len(x)):
        same(sliced(ours, i), backward_gradients(model, x[i : i + 1], y[i : i + 1]))


@BY_MODEL
@BY_RULE
@BY_SCALE
def test_converted_stacked_models(net, rule, scale):
    """Many weights at once, one shared feedback."""
    model, x, y, loss = converted(net, rule, scale)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        others = [MODELS[net][0]().double() for _ in range(3)]
    params, _ = stack_module_state(others)
    params = {name: p.detach() for name, p in params.items()}
    ours = vmap(grad(loss), in_dims=(0, None, None))(params, x, y)
    for i, other in enumerate(others):
        model.load_state_dict(other.state_dict())
        same(sliced(ours, i), backward_gradients(model, x, y))


@BY_MODEL
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_converted_stacked_models_with_data_of_their_own(net, rule):
    model, x, y, loss = converted(net, rule)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        others = [MODELS[net][0]().double() for _ in range(3)]
        xs = torch.randn(3, *x.shape, dtype=torch.float64)
    ys = torch.stack([y, y.flip(0), (y + 1) % 4])
    params, _ = stack_module_state(others)
    params = {name: p.detach() for name, p in params.items()}
    ours = vmap(grad(loss))(params, xs, ys)
    for i, other in enumerate(others):
        model.load_state_dict(other.state_dict())
        same(sliced(ours, i), backward_gradients(model, xs[i], ys[i]))


@BY_MODEL
@BY_SCALE
def test_converted_drtp_with_targets(net, scale):
    model, x, y, loss = converted(net, "drtp", scale)
    params = detached(model)

    def told(params, x, y):
        with rewire.targets(y):
            return loss(params, x, y)

    same(grad(told)(params, x, y), backward_gradients(model, x, y))
    ours = vmap(grad(lambda p, x, y: told(p, x[None], y[None])), in_dims=(None, 0, 0))(params, x, y)
    for i in range(len(x)):
        same(sliced(ours, i), backward_gradients(model, x[i : i + 1], y[i : i + 1]))


@BY_MODEL
def test_converted_brsf_draws_once_a_pass(net):
    """A copy that trains the ordinary way draws the same numbers; all samples of a vmap share theirs."""
    model, x, y, loss = converted(net, "brsf")
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    same(grad(loss)(detached(model), x, y), backward_gradients(twin, x, y))
    ours = vmap(grad(lambda p, x, y: loss(p, x[None], y[None])), in_dims=(None, 0, 0))(detached(model), x, y)
    backward_gradients(other, x, y)
    for i in range(len(x)):
        second = copy.deepcopy(other)
        same(sliced(ours, i), backward_gradients(second, x[i : i + 1], y[i : i + 1]))


@BY_MODEL
@BY_RULE
def test_transforms_leave_the_model_as_it_was(net, rule):
    """Neither weights, nor gradients, nor the next ordinary pass change."""
    model, x, y, loss = converted(net, rule)
    before, weights = backward_gradients(model, x, y), detached(model)
    model.zero_grad()
    grad(loss)(detached(model), x, y)
    vmap(grad(lambda p, x, y: loss(p, x[None], y[None])), in_dims=(None, 0, 0))(detached(model), x, y)
    assert all(p.grad is None for p in model.parameters())
    same(detached(model), weights)
    same(backward_gradients(model, x, y), before)


@BY_MODEL
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_converted_forward_under_vmap(net, rule):
    model, x, _, _ = converted(net, rule)
    params = detached(model)
    ours = vmap(lambda x: functional_call(model, params, (x[None],))[0])(x)
    close(ours, model(x).detach())


@pytest.mark.parametrize("rule", ["dfa", "sdfa", "shallow", "fitted"])
def test_forward_mode_derivatives_are_refused(rule):
    """A layer cut off from its input has none: zero would be wrong."""
    torch.manual_seed(0)
    model = rewire.convert(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), rule)
    x = torch.randn(4, 5)
    for _ in range(3):
        model(x).square().sum().backward()
    for run in (lambda: torch.func.jvp(model, (x,), (x,)), lambda: torch.func.jacfwd(model)(x)):
        with pytest.raises(rewire.PassError, match="forward-mode"):
            run()
    with rewire.use_rule(model, "bp"):
        assert torch.func.jvp(model, (x,), (x,))[1].any()


@pytest.mark.parametrize("rule", ["dfa", "kp", "dkp", "grape", "fitted(every=2)", "switch(first=bp, then=dfa, at=3)"])
def test_a_transform_right_after_a_training_step(rule):
    """What that has shown is taken in then, outside of the transform."""
    torch.manual_seed(0)
    model = rewire.convert(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), rule)
    twin = copy.deepcopy(model)
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    for _ in range(5):
        for each in (model, twin):
            each.zero_grad()
            torch.nn.functional.cross_entropy(each(x), y).backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p, x, y):
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, p, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    twin.zero_grad()
    torch.nn.functional.cross_entropy(twin(x), y).backward()
    twin.zero_grad()
    for i in range(8):
        torch.nn.functional.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).backward()
    if rule in ("dfa", "kp"):
        for name, p in twin.named_parameters():
            if "rewire" not in name:
                torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-4, atol=1e-6)
    assert all(g.isfinite().all() for g in each.values())


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "dfa"])
def test_a_traced_gradient_is_the_rules(rule):
    """``make_fx`` sees operations, and would not see that an operation was given other numbers to keep."""
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    rewire.convert(model, rule, scale=0.3)
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])

    def grads(params, x):
        loss = torch.nn.functional.cross_entropy(torch.func.functional_call(model, params, (x,)), y)
        return torch.autograd.grad(loss, list(params.values()))

    params = dict(model.named_parameters())
    for _ in range(3):
        wanted = grads(params, x)
    traced = make_fx(grads)(params, x)
    for ours, theirs in zip(traced(params, x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
