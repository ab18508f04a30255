"""An optimizer that steps each parameter as soon as its gradient is complete."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from rewire.errors import ConversionError


class Stepper:
    """Applies an optimizer to some of its parameters at a time."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._group = {p: g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}

    def step(self, parameters: Iterable[Tensor]) -> None:
        """Step those that have a gradient, and drop it."""
        optimizer = self._optimizer
        chosen: dict[int, list[Tensor]] = {}
        for p in parameters:
            if p in self._group and p.grad is not None:
                chosen.setdefault(self._group[p], []).append(p)
        if not chosen:
            return
        groups = optimizer.param_groups
        everything = {g: groups[g]["params"] for g in chosen}
        try:
            for g, some in chosen.items():
                groups[g]["params"] = some
            optimizer.param_groups = [groups[g] for g in chosen]
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            for g, every in everything.items():
                groups[g]["params"] = every
        for some in chosen.values():
            for p in some:
                p.grad = None

    def rest(self) -> None:
        """Step all that still have a gradient."""
        self.step(list(self._group))
        torch.clear_autocast_cache()  # casts of parameters that have changed since


def check_optimizer(optimizer: object) -> None:
    """Refuse what cannot step parameters one by one."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise ConversionError(f"optimizer is a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConversionError("LBFGS needs all gradients at once: leave optimizer= out and step it yourself")
