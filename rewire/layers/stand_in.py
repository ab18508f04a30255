"""Modules that stand for the layer they wrap, such as a layer with low-rank adapters beside it.

An adapter library puts a module of its own in a layer's place, with the layer and a few small ones inside. For the
model around it nothing must change, so the wrapper shows the layer's weight and bias as its own. That is what it is
known by here, whichever library it comes from: such a wrapper is one layer, with a forward of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewire.layers.kinds import Kind
from rewire.layers.own_forward import OwnForward


class StandIn(OwnForward):
    """A wrapper around a layer like ``base``, run through its own forward.

    A direct rule feeds the wrapper back at its input, with exact backprop among the modules inside. A local rule
    exchanges the wrapped layer's weight; what is beside it hands back its own exact share.

    Args:
        base: kind of the wrapped layer.
        path: its name within the wrapper.
    """

    whole = True

    def __init__(self, base: Kind, path: str) -> None:
        super().__init__(base)
        self.path = path
        self.parameter = base.parameter
        self.title = f"{base.title}, wrapped"

    def own(self, module: nn.Module) -> nn.Parameter | None:
        weight = getattr(module, self.parameter, None)
        return weight if isinstance(weight, nn.Parameter) else None

    def look(self, module: nn.Module) -> Tensor:
        return self.weight(module).detach()


def wrapped_by(module: nn.Module, kind_of: Any) -> tuple[str, nn.Module] | None:
    """Name and module of the layer that ``module`` stands for, or None if it stands for none.

    It shows the layer's weight and bias as its own without owning them, and holds parameters beside them: what holds
    none, such as a compiled or sharded layer, needs no treatment of its own.
    """
    if isinstance(module, torch.jit.ScriptModule):  # whose parts are not modules of Python
        return None
    if {"weight", "bias"} & {*module._parameters, *module._buffers, *module.__dict__} or not module._modules:
        return None
    weight = _shown(module, "weight")
    if not isinstance(weight, nn.Parameter):
        return None
    for path, inner in module.named_modules():
        if inner is module or inner._parameters.get("weight") is not weight or kind_of(inner) is None:
            continue
        mine = {*inner.parameters()}
        if _shown(module, "bias") is inner._parameters.get("bias") and any(p not in mine for p in module.parameters()):
            return path, inner
    return None


def _shown(module: nn.Module, name: str) -> object:
    try:
        return getattr(module, name, None)
    except Exception:  # a property of somebody's own may do anything
        return None
