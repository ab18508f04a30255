"""Other libraries on the same models, as their authors use them, and no library at all: what there is to gain.

*By hand* is dfa for a chain of layers, by the one autograd function that it takes at least: the products of the rule,
and nothing that finds layers, routes errors or checks that they arrive. A library can hardly be faster in eager mode.
In other models each layer is cut from the graph and hands back the same numbers in every step. Nothing is learned so,
but it tells how long a step takes in which e B costs nothing.

Both libraries are optional: what is not there is not timed.

BioTorch (Sanfiz and Akrout 2021) replaces Linear and Conv2d layers by its own:

    pip install --no-deps --target peers biotorch

TinyDFA (Launay et al. 2020) is not on PyPI. Its package is the folder ``TinyDFA/tinydfa`` of
github.com/lightonai/dfa-scales-to-modern-deep-learning: copy it into ``peers`` too. It is a module to be put after each
layer by hand, and one after the output; here every Linear and Conv but the first gets one in front, which is the place
where rewire feeds back.

    PYTHONPATH=peers make bench
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from models import Case, loss_of
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

RULES = {"hand": ("dfa",), "biotorch": ("fa", "frsf", "brsf", "dfa"), "tinydfa": ("dfa",)}


def names() -> list[str]:
    """All contenders of this file."""
    return [f"{library}:{rule}" for library, rules in RULES.items() for rule in rules]


def installed(library: str) -> bool:
    return library == "hand" or importlib.util.find_spec(library) is not None


def loss_under(library: str, rule: str, model: nn.Module, case: Case) -> Loss:
    """A function of (inputs, targets) whose result's backward is the library's.

    Args:
        model: changed in place, or taken apart.

    Raises:
        Exception: whatever the library raises on a model that it does not know.
    """
    if library == "hand":
        return _by_hand(model, case) if case.chain else _for_nothing(model)
    return _biotorch(rule, model, case) if library == "biotorch" else _tinydfa(model, case)


class _Feedback(torch.autograd.Function):
    """Identity on the output y; backward: e to y, and e B to each layer's input."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, feedback: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.feedback = feedback
        return y.detach()

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        return e, None, *(e @ B for B in ctx.feedback)


def _by_hand(model: nn.Module, case: Case) -> Loss:
    hidden = [m for m in model if isinstance(m, nn.Linear)][1:]
    return chain_loss(model, [torch.randn(case.classes, m.in_features).mul_(0.05).to(m.weight) for m in hidden])


def chain_loss(model: nn.Module, feedback: list[Tensor]) -> Loss:
    """dfa of a chain that begins with a linear layer, B of all others given."""
    first, *others = model

    def loss(x: Tensor, y: Tensor) -> Tensor:
        h = first(x)
        inputs = []
        for m in others:
            if isinstance(m, nn.Linear):
                inputs.append(h)
                h = h.detach()
            h = m(h)
        return loss_of(_Feedback.apply(h, feedback, *inputs), y)

    return loss


class _Same(torch.autograd.Function):
    """x, its gradient -> ticket; backward: that gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor, None]:
        return ctx.gradient, None


class _Wait(torch.autograd.Function):
    """Identity on y; tickets wait for its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *tickets: Tensor) -> Tensor:
        ctx.tickets = len(tickets)
        ctx.set_materialize_grads(False)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        return e, *(None,) * ctx.tickets


def _for_nothing(model: nn.Module) -> Loss:
    tickets: list[Tensor] = []

    def cut(layer: nn.Module) -> None:
        forward: Callable[[Tensor], Tensor] = layer.forward
        gradients: dict[torch.Size, Tensor] = {}

        def apart(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return forward(x)
            if x.shape not in gradients:
                gradients[x.shape] = torch.randn_like(x).mul_(1e-3).detach()
            tickets.append(_Same.apply(x, gradients[x.shape]))
            return forward(x.detach())

        layer.forward = apart  # type: ignore[method-assign]

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            cut(module)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        tickets.clear()
        return loss_of(_Wait.apply(model(x), *tickets), y)

    return loss


def _biotorch(rule: str, model: nn.Module, case: Case) -> Loss:
    from biotorch.module.biomodule import BioModule

    device = next(model.parameters()).device
    converted = BioModule(model, mode=rule, copy_weights=True, output_dim=case.classes).to(device)
    if rule != "dfa":
        return lambda x, y: loss_of(converted(x), y)
    # It wants the targets in the forward, and differentiates the loss once more for e.
    return lambda x, y: loss_of(converted(x, targets=y, loss_function=loss_of), y)


def _tinydfa(model: nn.Module, case: Case) -> Loss:
    from tinydfa import DFA, DFALayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    inside = (0, 1) if case.tokens else (0,)
    points = []
    for name, layer in layers[1:]:
        parent, _, attribute = name.rpartition(".")
        points.append(DFALayer(name, batch_dims=inside))
        setattr(model.get_submodule(parent), attribute, nn.Sequential(points[-1], layer))
    top = DFA(points, batch_dims=inside)

    return lambda x, y: loss_of(top(model(x)), y)
