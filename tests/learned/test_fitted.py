"""`fitted` against its equations: an MLP trained in NumPy, and least squares on gradients of plain autograd."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.learning import glance

from ..plain import mlp, randn, seeded, weights

X, Y = randn(12, 5, seed=1), torch.arange(12) % 4
LR = 0.3


def ridged(S, ridge):
    d = np.diag(S)
    return S + np.diag(d * ridge + d.mean() * 1e-2 * ridge + np.finfo(np.float64).tiny)


def softmax_error(y, labels):
    p = np.exp(y - y.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    return p / len(labels)


def trained_by_hand(model, B, steps, *, every, decay, ridge, cap, context=None):
    """Steps of gradient descent on a tanh MLP, loops and products only; yields (weights, B, C) after each.

    Args:
        B: {layer: (n, features)}. context: {layer: P}, or None.
    """
    layers = [(name, W.numpy(), b.numpy()) for name, W, b in weights(model)]
    B, C, memory, first = dict(B), {}, {}, {}
    x, labels = X.numpy(), Y.numpy()
    for step in range(steps):
        inputs, a = [], x
        for k, (_, W, b) in enumerate(layers):
            inputs.append(a)
            a = a @ W.T + b
            if k < len(layers) - 1:
                a = np.tanh(a)
        e = softmax_error(a, labels)
        anchor = step % every == 0
        delta, grads, seen = e, {}, {}
        for k in reversed(range(len(layers))):
            name, W, _ = layers[k]
            grads[name] = delta.T @ inputs[k], delta.sum(0)
            if k == 0:
                break
            exact = delta @ W
            if anchor:
                seen[name] = exact, inputs[k]
                back = exact
            else:
                back = e @ B[name]
                if context is not None:
                    c = inputs[k] @ context[name]
                    for i in range(e.shape[1]):
                        for j in range(c.shape[1]):
                            back = back + (e[:, i] * c[:, j])[:, None] * C[name][i, j]
            delta = back * (1 - inputs[k] ** 2)
        layers = [(name, W - LR * grads[name][0], b - LR * grads[name][1]) for name, W, b in layers]
        for name, (G, x_l) in seen.items():
            phi = e
            if context is not None:
                c = np.concatenate([np.ones((len(e), 1)), x_l @ context[name]], 1)
                phi = np.stack([np.kron(e[i], c[i]) for i in range(len(e))])
            S, R = memory.get(name, (0, 0))
            memory[name] = S, R = decay * S + phi.T @ phi, decay * R + phi.T @ G
            fit = np.linalg.solve(ridged(S, ridge), R)
            norm = np.linalg.norm(fit)
            fit = fit * min(1, cap * first.setdefault(name, norm) / norm)
            if context is None:
                B[name] = fit
            else:
                fit = fit.reshape(e.shape[1], -1, fit.shape[1])
                B[name], C[name] = fit[:, 0], fit[:, 1:]
        yield layers, B, C


@pytest.mark.parametrize("cap", [10.0, 0.5])
@pytest.mark.parametrize("context", [0, 3])
def test_training_follows_the_equations(context, cap):
    model = mlp()
    rule = f"fitted(every=3, decay=0.7, ridge=0.05, cap={cap}, context={context})"
    rewire.convert(model, rule)
    P = None
    if context:
        states = {s.name: s for s in (m._rewire for m in model.modules() if "_rewire" in m.__dict__)}
        P = {name: glance(s, context, model.get_submodule(name).in_features).numpy() for name, s in states.items()}
    by_hand = trained_by_hand(model, {}, 11, every=3, decay=0.7, ridge=0.05, cap=cap, context=P)
    B: dict[str, np.ndarray] = {}
    C: dict[str, np.ndarray] = {}
    for layers, B, C in by_hand:  # noqa: B007
        model.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
        for (name, W, b), (ours, W_ours, b_ours) in zip(layers, weights(model), strict=True):
            assert name == ours
            np.testing.assert_allclose(W_ours, W, atol=1e-8, rtol=0)
            np.testing.assert_allclose(b_ours, b, atol=1e-8, rtol=0)
    for name, used in rewire.feedback(model).items():
        if name == "0":
            continue
        np.testing.assert_allclose(used, B[name], atol=1e-8, rtol=0)
        if context:
            C_ours = model.get_buffer(f"{name}.rewire_C")
            np.testing.assert_allclose(C_ours, C[name], atol=1e-8, rtol=0)


class Tokens(nn.Module):
    """(N, T, F) through two layers, mean over T, head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))).mean(1))


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))).mean((2, 3)))


def exact_gradients(model, x, y):
    """Plain autograd: e, and (input, its gradient) of each layer."""
    seen, hooks = {}, []
    for name in ("b", "head"):

        def note(module, args, out, name=name):
            args[0].retain_grad()
            seen[name] = args[0]
            if name == "head":
                out.retain_grad()
                seen["e"] = out

        hooks.append(model.get_submodule(name).register_forward_hook(note))
    F.cross_entropy(model(x), y).backward()
    for hook in hooks:
        hook.remove()
    return seen["e"].grad.numpy(), {n: (t.detach().numpy(), t.grad.numpy()) for n, t in seen.items() if n != "e"}


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("make", [Tokens, Convs])
def test_fit_and_feedback_over_positions(make, context):
    """Two anchors at the same weights; then what is handed back, position by position."""
    model = seeded(make)
    shape = (8, 3, 5) if make is Tokens else (8, 2, 7, 6)
    batches = [
        (randn(*shape, seed=s), torch.randint(4, (8,), generator=torch.Generator().manual_seed(s))) for s in (1, 2)
    ]
    plain = copy.deepcopy(model)
    rewire.convert(model, f"fitted(every=2, decay=0.5, ridge=0.1, context={context}, cap=0)")
    order = [batches[0], batches[1], batches[1], batches[0]]  # passes 0 and 2 are anchors
    for x, y in order:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    name, layer = "b", model.b
    S = R = T = Q = 0
    P = glance(layer._rewire, context, 7 if make is Tokens else 5).double().numpy() if context else None
    for x, y in (batches[0], batches[1]):
        e, seen = exact_gradients(copy.deepcopy(plain), x, y)
        x_l, G = seen[name]
        S, R, T, Q = (0.5 * t for t in (S, R, T, Q))
        if make is Tokens:
            for n in range(8):
                for t in range(3):
                    phi = e[n] if P is None else np.kron(e[n], np.concatenate([[1.0], x_l[n, t] @ P]))
                    S, R = S + np.outer(phi, phi), R + np.outer(phi, G[n, t])
        else:
            own_S, own_R = e.T @ e, e.T @ G.reshape(8, -1)
            S, R = S + own_S, R + own_R
            left = (G.reshape(8, -1) - e @ np.linalg.solve(ridged(own_S, 0.1), own_R)).reshape(G.shape)
            for n in range(8):
                for i in range(G.shape[2]):
                    for j in range(G.shape[3]):
                        if P is not None:
                            phi = np.kron(e[n], x_l[n, :, i, j] @ P)
                            T, Q = T + np.outer(phi, phi), Q + np.outer(phi, left[n, :, i, j])
    fit = np.linalg.solve(ridged(S, 0.1), R)
    B = rewire.feedback(model)["b"].flatten(1)
    if make is Tokens and context:
        fit = fit.reshape(4, 1 + context, 7)
        np.testing.assert_allclose(B, fit[:, 0], atol=1e-10)
        C = fit[:, 1:]
    else:
        np.testing.assert_allclose(B, fit, atol=1e-10)
        C = np.linalg.solve(ridged(T, 0.1), Q).reshape(4, context, 5) if context else None
    # The last pass was fed back: the gradient of layer a follows from what b handed back.
    x, y = batches[0]
    e, seen = exact_gradients(copy.deepcopy(plain), x, y)
    x_l, G = seen[name]
    back = np.zeros_like(G)
    for n in range(8):
        if make is Tokens:
            for t in range(3):
                back[n, t] = e[n] @ B.numpy()
                if context:
                    back[n, t] += np.einsum("i,j,ijf->f", e[n], x_l[n, t] @ P, C)
        else:
            back[n] = (e[n] @ B.numpy()).reshape(G.shape[1:])
            for i in range(G.shape[2]):
                for j in range(G.shape[3]):
                    if context:
                        back[n, :, i, j] += np.einsum("i,j,ijf->f", e[n], x_l[n, :, i, j] @ P, C)
    x_l = torch.from_numpy(x_l)
    a = copy.deepcopy(plain.a)
    a(x).backward(torch.from_numpy(back) * (1 - x_l**2))
    np.testing.assert_allclose(model.a.weight.grad, a.weight.grad, atol=1e-10)


def trained(model, steps):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("rule", ["fitted", "fitted(context=2, every=4)", "fitted(probe=20, every=6)"])
@pytest.mark.parametrize("after", [1, 3, 7, 10])
def test_a_state_dict_resumes_to_the_bit(rule, after):
    model = trained(rewire.convert(mlp(), rule), after)
    other = rewire.convert(mlp(seed=5), rule)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    copied = copy.deepcopy(model)
    for _ in range(8):
        gradients = []
        for each in (model, other, copied):
            each.zero_grad()
            F.cross_entropy(each(X), Y).backward()
            gradients.append([p.grad for p in each.parameters()])
            with torch.no_grad():
                for p in each.parameters():
                    p -= 0.1 * p.grad
        for later in gradients[1:]:
            assert all(torch.equal(a, b) for a, b in zip(gradients[0], later, strict=True))


def test_plain_checkpoints_load_and_restore_leaves_nothing():
    plain = mlp()
    state = plain.state_dict()
    model = trained(rewire.convert(mlp(seed=3), "fitted"), 7)
    assert "2.rewire_B" in model.state_dict()
    before = model.get_buffer("2.rewire_B").clone()
    model.load_state_dict(state)
    assert torch.equal(model.get_buffer("2.rewire_B"), before)
    rewire.restore(model)
    assert list(model.state_dict()) == list(state)
    assert model(X).equal(plain(X))


def test_converting_again_takes_the_learned_feedback_off_and_a_failure_puts_it_back():
    model = trained(rewire.convert(mlp(), "fitted"), 7)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(rewire.ConversionError):
        rewire.convert(model, "fitted", layers={"nothing": "bp"})
    assert list(model.state_dict()) == list(kept)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    rewire.convert(model, "dfa")
    assert not any("rewire" in key for key in model.state_dict())


def test_probe_takes_as_many_passes_as_it_needs():
    model = rewire.convert(mlp(), "fitted(probe=30, every=10)")  # 12 samples a pass: three passes
    reference = copy.deepcopy(rewire.restore(copy.deepcopy(model)))
    exact = []
    for _ in range(13):
        for each in (model, reference):
            each.zero_grad()
            F.cross_entropy(each(X), Y).backward()
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        exact.append(all(torch.allclose(a.grad, b.grad, atol=1e-12) for a, b in pairs))
    assert [i for i, same in enumerate(exact) if same] == [0, 1, 2, 10, 11, 12]


def test_a_pass_that_is_not_finite_teaches_nothing():
    model = trained(rewire.convert(mlp(), "fitted(every=2)"), 3)
    before = model.get_buffer("2.rewire_B").clone()
    with pytest.warns(rewire.RewireWarning, match="not finite"):
        for scale in (1.0, float("inf"), 1.0):
            model.zero_grad()
            (F.cross_entropy(model(X), Y) * scale).backward()
            if scale != 1.0:
                model.zero_grad()
        model(X)
    assert model.get_buffer("2.rewire_B").isfinite().all()
    assert before.isfinite().all()


def test_an_output_that_starts_at_zero_is_no_cap_for_good():
    """Its first anchor shows gradients of zero, and the first fit is zero."""
    norms = {}
    for cap in (0, 1e6, 1.0):
        model = mlp()
        nn.init.zeros_(model[4].weight)
        rewire.convert(model, f"fitted(every=2, cap={cap})", scale=0.3, output="4")
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        norms[cap] = []
        for _ in range(9):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            norms[cap].append(float(rewire.feedback(model)["4"].norm()))
    assert norms[0][0] == 0 and norms[0][-1] > norms[0][2] > 0
    assert norms[1e6] == norms[0]
    assert norms[1.0][2] == norms[0][2] and max(norms[1.0]) <= norms[0][2] * (1 + 1e-12)


def test_many_outputs_are_sketched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 40)).double()
    rewire.convert(model, "fitted(sketch=8, every=3)")
    x, y = randn(20, 6), torch.arange(20)
    for _ in range(5):
        F.cross_entropy(model(x), y).backward()
    B = rewire.feedback(model)["2"]
    assert B.shape == (8, 9)
    out = model(x)
    F.cross_entropy(out, y)
    with torch.no_grad():
        e = (out.softmax(1) - F.one_hot(y, 40)) / 20
    from rewire.rules.fitted import Fitted

    summed = Fitted(sketch=8).signal(e, None, 1)
    lengths = (summed**2).sum() / (e**2).sum()
    assert 0.5 < float(lengths) < 2  # lengths are kept on average
    one = torch.zeros(1, 40, dtype=torch.float64)
    one[0, 7] = 2.0
    assert (Fitted(sketch=8).signal(one, None, 1).abs().sort().values[0, -2:] == torch.tensor([0.0, 2.0])).all()


@pytest.mark.parametrize("option", ["every=0", "every=1.5", "decay=2", "ridge=-1", "probe=0", "context=-1", "cap='x'"])
def test_wrong_options(option):
    with pytest.raises(rewire.ConversionError, match=r"fitted: .* not"):
        rewire.convert(mlp(), f"fitted({option})")


@pytest.mark.parametrize("rule", ["fitted", "fitted(context=2)"])
def test_verify_proves_it_and_disturbs_nothing(rule):
    model = trained(rewire.convert(mlp(), rule), 4)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        assert rewire.verify(model, X, lambda out: F.cross_entropy(out, Y)).ok
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_nothing_is_learned_in_eval_without_gradients():
    model = trained(rewire.convert(mlp(), "fitted"), 4)
    passes = model.get_buffer("2.rewire_passes")
    model.state_dict()
    before = passes.clone()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(7):
            model(X)
    model.state_dict()
    assert torch.equal(passes, before)


def test_fit_by_forward_mode_comes_near_the_jacobian_without_a_backward():
    """A linear network: every sample's Jacobian is the product of the weights above."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()
    rewire.convert(model, "fitted(by='jvp', every=1)", seed=1)
    x, y = randn(32, 6), torch.arange(32) % 3
    for _ in range(60):  # weights stay as they are: each layer's B settles
        F.cross_entropy(model(x), y).backward()
    model(x)
    W2, W3 = model[1].weight.detach(), model[2].weight.detach()
    B = rewire.feedback(model)
    torch.testing.assert_close(B["2"], W3, atol=0.05, rtol=0)
    torch.testing.assert_close(B["1"], W3 @ W2, atol=0.05, rtol=0)


def test_forward_mode_fits_no_context():
    with pytest.raises(rewire.ConversionError, match="no context"):
        rewire.convert(mlp(), "fitted(by='jvp', context=2)")
