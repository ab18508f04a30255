"""The references themselves: with B = W they are ordinary backprop, as torch's autograd computes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from . import networks
from .layers import describe

TOL = 1e-10


def close(a, b, tol=TOL):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    assert np.max(np.abs(a - b), initial=0.0) <= tol


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear, tokens": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 2, 7)),
    "conv1d same, even kernel": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 2, 7)),
    "conv1d same, dilated": (lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=3), (2, 2, 7)),
    "conv1d valid": (lambda: nn.Conv1d(2, 3, 4, padding="valid", stride=2), (2, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 2, 6, 5)),
    "conv2d per-dim": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2), bias=False),
        (2, 2, 6, 5),
    ),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=1, dilation=(2, 1, 1)), (2, 2, 4, 3, 3)),
    **{
        f"conv{n}d {mode}{'' if padding == 2 else ' ' + str(padding)}": (
            lambda n=n, mode=mode, padding=padding: getattr(nn, f"Conv{n}d")(
                2, 2, 2, padding=padding, padding_mode=mode, dilation=2
            ),
            (2, 2, *(4, 5, 3)[:n]),
        )
        for n in (1, 2, 3)
        for mode in ("circular", "reflect", "replicate")
        for padding in (2, "same")
    },
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 2, 4)),
    "conv_transpose1d all": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, output_padding=2, groups=2, dilation=2),
        (2, 4, 4),
    ),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2),
        (2, 2, 3, 4),
    ),
    "conv_transpose3d": (
        lambda: nn.ConvTranspose3d(2, 2, 2, stride=2, padding=(0, 1, 0), dilation=(1, 2, 1), bias=False),
        (1, 2, 2, 3, 2),
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layer(case):
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    module = make().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = module(x)
    delta = torch.randn_like(y)
    y.backward(delta)

    layer = describe(module)
    W = module.weight.detach().numpy()
    b = None if module.bias is None else module.bias.detach().numpy()
    close(layer.forward(x.detach().numpy(), W, b), y.detach())
    handed, dW, db = layer.backward(x.detach().numpy(), delta.numpy(), W)
    close(handed, x.grad)
    close(dW, module.weight.grad)
    if b is not None:
        close(db, module.bias.grad)

    # Another weight on the way back: what is handed on changes with it, ∂W and ∂b do not.
    B = torch.randn_like(module.weight)
    handed_B, dW_B, db_B = layer.backward(x.detach().numpy(), delta.numpy(), B.numpy())
    close(dW_B, dW, tol=0)
    close(db_B, db, tol=0)
    with torch.no_grad():
        module.weight.copy_(B)
    (expected,) = torch.autograd.grad(module(x), x, delta)
    close(handed_B, expected)


def torch_mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def torch_cnn():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 5, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(5 * 2 * 3, 4),
    ).double()


NETWORKS = {
    "mlp": (torch_mlp, networks.mlp, (6, 5)),
    "cnn": (torch_cnn, networks.cnn, (6, 4, 5, 7)),
}
LOSSES = {
    "cross_entropy": (nn.functional.cross_entropy, networks.cross_entropy),
    "mse": (nn.functional.mse_loss, networks.mse),
    "sum_of_squares": (lambda y, t: (y**2).sum(), networks.sum_of_squares),
}


def setup(net, loss):
    make, reference, shape = NETWORKS[net]
    torch.manual_seed(1)
    model = make()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(4, (shape[0],)) if loss == "cross_entropy" else torch.randn(shape[0], 4).double()
    params = {k: p.detach().numpy().copy() for k, p in model.named_parameters()}
    return model, reference(), x, target, params


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", NETWORKS)
def test_network_with_B_equal_W_is_backprop(net, loss):
    model, network, x, target, params = setup(net, loss)
    y = model(x)
    y.retain_grad()
    value = LOSSES[loss][0](y, target)
    value.backward()
    weights = {name: params[f"{name}.weight"] for name in network.layers}
    for rule, feedback in (("bp", None), ("fa", weights)):
        ours = network.run(x.detach().numpy(), params, LOSSES[loss][1], target.numpy(), rule, feedback)
        assert abs(ours.loss - value.item()) < 1e-12
        close(ours.y, y.detach())
        close(ours.e, y.grad)
        close(ours.x, x.grad)
        assert set(ours.grads) == set(params)
        for name, p in model.named_parameters():
            close(ours.grads[name], p.grad)
    assert [n for n, _ in networks.mirror(model).ops] == [n for n, _ in network.ops]


def test_direct_rules_on_the_mlp_written_out():
    """The published formulas, line by line, with matrices."""
    _, network, x, target, p = setup("mlp", "cross_entropy")
    rng = np.random.default_rng(0)
    B = {"2": rng.normal(size=(4, 7)), "4": rng.normal(size=(4, 6))}
    x0 = x.detach().numpy()
    h1 = np.tanh(x0 @ p["0.weight"].T + p["0.bias"])
    h2 = np.tanh(h1 @ p["2.weight"].T + p["2.bias"])
    logits = h2 @ p["4.weight"].T + p["4.bias"]
    soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    hot = np.eye(4)[target.numpy()]
    e = (soft - hot) / len(x0)
    for rule, signal in {"dfa": e, "sdfa": np.sign(e), "drtp": hot, "shallow": 0 * e}.items():
        d2, d1 = (signal @ B["4"]) * (1 - h2**2), (signal @ B["2"]) * (1 - h1**2)
        ours = network.run(x0, p, networks.cross_entropy, target.numpy(), rule, B)
        for name, delta, below in (("0", d1, x0), ("2", d2, h1), ("4", e, h2)):
            close(ours.grads[f"{name}.weight"], delta.T @ below)
            close(ours.grads[f"{name}.bias"], delta.sum(0))


def test_channel_feedback_is_the_same_at_every_position():
    B = np.random.default_rng(0).normal(size=(3, 2))
    e = np.random.default_rng(1).normal(size=(4, 3))
    handed = networks.direct_feedback(e, B, (4, 2, 3, 5))
    for n in range(4):
        for c in range(2):
            expected = sum(e[n, k] * B[k, c] for k in range(3))
            close(handed[n, c], np.full((3, 5), expected))
    with pytest.raises(AssertionError):
        networks.direct_feedback(e, B, (4, 3, 3, 5))
