"""Comparing a converted nn.Sequential with the NumPy reference: shared by the tests of the rules.

Two independent questions, because gradients alone cannot answer both:

- :func:`check_pass`: do the gradients follow from the feedback the model says it used?
- :func:`check_feedback`: is that feedback what the rule's definition says?
"""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import torch
from torch import nn

import rewire

from ..reference import networks

TOL = 1e-10
SCALE = 0.3
DEFINED = ("fa", "usf", "brsf", "frsf")  # local rules with a feedback that has a definition of its own

LOSSES = {
    "cross_entropy": (nn.functional.cross_entropy, networks.cross_entropy),
    "mse": (nn.functional.mse_loss, networks.mse),
}


def numpy(tensors):
    """Copies, as float64 arrays."""
    return {name: t.detach().cpu().double().numpy().copy() for name, t in tensors.items()}


def parameters(model):
    return numpy(dict(model.named_parameters()))


def used_feedback(model):
    return numpy(rewire.feedback(model))


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def cnn():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 5, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(30, 4),
    ).double()


NETS = {"mlp": (mlp, networks.mlp, (6, 5)), "cnn": (cnn, networks.cnn, (6, 4, 5, 7))}


class Problem:
    """A fresh model with its reference, data and loss."""

    def __init__(self, net="mlp", loss="cross_entropy", seed=0):
        generator = torch.Generator().manual_seed(seed)
        make, reference, shape = NETS[net]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = make()
        self.network = reference()
        self.x = torch.randn(shape, dtype=torch.float64, generator=generator)
        self.labels = torch.randint(4, (shape[0],), generator=generator)
        self.hot = nn.functional.one_hot(self.labels, 4).double()
        if loss == "cross_entropy":
            self.target = self.labels
        else:
            self.target = torch.randn(shape[0], 4, dtype=torch.float64, generator=generator)
        self.torch_loss, self.numpy_loss = LOSSES[loss]

    def reference(self, rule, feedback=None, params=None):
        """The reference's pass on the model's present weights."""
        return self.network.run(
            self.x.detach().numpy(),
            parameters(self.model) if params is None else params,
            self.numpy_loss,
            self.target.numpy(),
            rule,
            feedback,
            labels=self.labels.numpy(),
        )


def run(problem, targets=None):
    """One training pass of the model from zero gradients; returns the loss."""
    problem.model.zero_grad()
    problem.x.grad = None
    with contextlib.nullcontext() if targets is None else rewire.targets(targets):
        loss = problem.torch_loss(problem.model(problem.x), problem.target)
        loss.backward()
    return loss


def assert_close(ours, expected, what, tol=TOL):
    assert ours is not None, f"{what}: nothing there"
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
    assert ours.shape == expected.shape, f"{what}: {ours.shape}, expected {expected.shape}"
    worst = np.max(np.abs(ours - expected), initial=0.0)
    assert worst <= tol, f"{what}: off by {worst:.3g}"


def check_gradients(problem, expected):
    """The gradients in the model are the ones in ``expected``."""
    names = [name for name, _ in problem.model.named_parameters()]
    assert set(names) == set(expected.grads)
    for name, p in problem.model.named_parameters():
        assert_close(p.grad, expected.grads[name], f"gradient of {name}")


def check_pass(problem, rule, targets=None):
    """Run one pass; its gradients are those of ``rule`` with the feedback the model used. Returns both."""
    loss = run(problem, targets)
    feedback = used_feedback(problem.model)
    missing = [name for name in problem.network.layers[1:] if name not in feedback]
    assert rule in ("bp", "shallow") or not missing, f"no feedback for {missing}"
    expected = problem.reference(rule, feedback)
    assert abs(loss.item() - expected.loss) <= TOL
    check_gradients(problem, expected)
    if problem.x.requires_grad:
        assert_close(problem.x.grad, expected.x, "gradient of the input")
    return expected, feedback


def change_weights(model, seed=7):
    """A large step, so that many signs change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=generator) * 0.3)


def random_tensors(problem, scale, seed):
    """R of every layer above the first: what fa draws for the same seed, names, shapes and scale."""
    twin = copy.deepcopy(problem.model)
    rewire.convert(twin, "fa", scale=scale, seed=seed)
    problem.torch_loss(twin(problem.x), problem.target).backward()
    return used_feedback(twin)


def check_feedback(rule, problem, feedback, R, scale=SCALE, previous=None):
    """The local rule's definition, on the weights the model has now.

    ``R``: the random tensors for this seed. ``previous``: the feedback of an earlier pass, made when the
    weights were others.
    """
    for name in problem.network.layers[1:]:
        B, W = feedback[name], parameters(problem.model)[f"{name}.weight"]
        assert B.shape == W.shape
        if rule == "fa":
            assert_close(B, R[name], f"{name}: R", tol=0)
            assert abs(np.corrcoef(B.ravel(), W.ravel())[0, 1]) < 0.5, f"{name}: B follows W"
            assert (B < 0).any() and (B > 0).any()
            if previous is not None:
                assert_close(B, previous[name], f"{name}: fixed B", tol=0)
        elif rule == "usf":
            assert_close(B, scale * np.sign(W), f"{name}: s sign(W)", tol=1e-15)
        elif rule == "frsf":
            assert_close(B, np.abs(R[name]) * np.sign(W), f"{name}: |R| sign(W)", tol=1e-15)
            if previous is not None:
                assert_close(np.abs(B), np.abs(previous[name]), f"{name}: fixed magnitudes", tol=0)
        elif rule == "brsf":
            assert (np.sign(B) == np.sign(W)).all(), f"{name}: signs"
            spread = np.sqrt((B**2).mean())
            assert 0.4 * scale < spread < 1.8 * scale, f"{name}: RMS {spread}, scale {scale}"
            assert np.abs(B).std() > 0.2 * scale, f"{name}: magnitudes are not random"
            if previous is not None:
                assert not np.isclose(np.abs(B), np.abs(previous[name])).any(), f"{name}: not redrawn"
        else:
            raise ValueError(rule)


def check_rule(problem, rule, convert_with=None, *, seed=3, **options):
    """All of it: convert a fresh problem (with ``convert_with`` if that is to be tried in place of the
    rule's own name), and check gradients and feedback over three passes and a change of the weights."""
    targets = problem.labels if rule == "drtp" else None
    R = random_tensors(problem, SCALE, seed) if rule in DEFINED else None
    rewire.convert(problem.model, convert_with or rule, scale=SCALE, seed=seed, **options)
    previous = None
    for step in range(3):  # a float scale: the very first pass follows the rule
        if step == 2:
            change_weights(problem.model)
        _, feedback = check_pass(problem, rule, targets)
        if rule in DEFINED:
            check_feedback(rule, problem, feedback, R, previous=previous)
        elif rule != "bp" and previous is not None:
            assert feedback.keys() == previous.keys()
            for name, B in previous.items():
                assert_close(feedback[name], B, f"{name}: fixed B", tol=0)
        previous = feedback
