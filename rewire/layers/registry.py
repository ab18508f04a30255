"""Which modules are layers, and of which kind."""

from __future__ import annotations

import torch
from torch import nn

from rewire.layers.convolution import convolution_kinds
from rewire.layers.kinds import Kind
from rewire.layers.linear import Linear, TransposedLinear
from rewire.layers.own_forward import OwnForward
from rewire.layers.stand_in import StandIn, wrapped_by

_kinds: dict[type[nn.Module], Kind] = {nn.Linear: Linear(), **convolution_kinds()}
# Classes of libraries that need not be installed, by qualified name.
_named_kinds: dict[str, Kind] = {"transformers.pytorch_utils.Conv1D": TransposedLinear()}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of layer ``module`` is, or None if it is none.

    A subclass is like its base as long as it runs its base's forward; with a forward of its own it is
    wrapped in :class:`~rewire.layers.own_forward.OwnForward`.
    """
    for cls in type(module).__mro__:
        kind = _kinds.get(cls) or _named_kinds.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind is not None:
            own = _overrides(module, cls, "forward") or _overrides(module, cls, "_conv_forward")
            return OwnForward(kind) if own else kind
    return None


def stand_in(module: nn.Module) -> tuple[StandIn, nn.Module] | None:
    """For a wrapper that stands for a layer inside it: its kind, and that layer."""
    if isinstance(module, nn.MultiheadAttention):
        return None
    found = wrapped_by(module, kind_of)
    if found is None:
        return None
    path, inner = found
    base = kind_of(inner)
    assert base is not None
    return StandIn(base.base if isinstance(base, OwnForward) else base, path), inner


def _overrides(module: nn.Module, cls: type, name: str) -> bool:
    return getattr(type(module), name, None) is not getattr(cls, name, None)


def why_not(module: nn.Module) -> str:
    """Why a module with parameters of its own is not a layer that a rule could change."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled to TorchScript: convert first, then script or compile"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "looks rows up: nothing to hand back"
    if isinstance(module, nn.RNNBase):
        return "recurrent kernel with its own backward inside"
    if isinstance(module, nn.MultiheadAttention):
        return "attention kernel uses its projections directly"
    if all(p.dim() <= 1 for p in module.parameters(recurse=False)):
        return "elementwise: keeps its true derivative"
    return f"{type(module).__name__} is not a known kind of layer"
