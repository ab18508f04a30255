"""One call of an operation under local feedback that learns: where gradients go, and which weight is used backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rewire.layers.form import Form
from rewire.layers.kinds import BackwardWeight
from rewire.rules.base import LearnedLocal


class Follow(Function):
    """W, and what a rule keeps -> W; backward: W's gradient goes to W, and what the rule makes of it to the rest."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, rule: LearnedLocal, form: Form, names: tuple[str, ...], *kept: Tensor) -> Tensor:
        return weight.detach()  # inside a Function, an alias that is no view

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.rule, ctx.form, ctx.names, *kept = inputs
        ctx.set_materialize_grads(False)
        read = {name: t for name, t in zip(ctx.names, kept, strict=True) if name not in ctx.rule.trained}
        ctx.read = tuple(read)
        ctx.save_for_backward(*read.values())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * (4 + len(ctx.names))
        read = dict(zip(ctx.read, ctx.saved_tensors, strict=True))
        with apart(gradient.device):
            found = ctx.rule.follow(gradient, read, ctx.form)
        return (gradient, None, None, None, *(found.get(name) for name in ctx.names))


follow: Callable[..., Tensor] = Follow.apply


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Arithmetic that is no part of the model's: without gradients, in the dtypes it is given."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class Kept(BackwardWeight):
    """The backward weight of one call, made of what was kept when the forward ran."""

    keep = False
    lasting = False

    def __init__(self, rule: LearnedLocal, form: Form, kept: dict[str, Tensor], weight: Tensor | None) -> None:
        self.rule, self.form, self.kept, self.weight = rule, form, kept, weight

    def _made(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        with apart(device):
            return self.rule.feedback(self.kept, self.form).detach().to(device=device, dtype=dtype)

    def later(self, weight: Tensor) -> Callable[[], Tensor]:
        dtype, device = weight.dtype, weight.device
        versions = [self.kept[name]._version for name in self.rule.trained]

        def make() -> Tensor:
            if [self.kept[name]._version for name in self.rule.trained] != versions:
                raise RuntimeError(
                    f"feedback of shape {self.form.shape} that the backward pass needs was modified by an in-place "
                    "operation. Run backward before stepping the optimizer"
                )
            return self._made(dtype, device)

        return make

    def random(self, weight: Tensor) -> Tensor:
        return self._made(weight.dtype, weight.device)

    def combine(self, weight: Tensor | None, random: Tensor | None) -> Tensor:
        assert random is not None
        return random

    def stand_in(self, weight: Tensor) -> Tensor:
        return weight if self.weight is None else self.weight
