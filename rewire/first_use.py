"""What rules and structures of somebody's own make, looked at when it is first used.

A wrong shape or dtype would be an error of PyTorch's further down, which names neither rule nor layer, or none at all.
Later uses are not looked at: they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewire.errors import PassError

if TYPE_CHECKING:
    from rewire.rules.base import DirectRule, LocalRule
    from rewire.structures import Structure

_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


def backward_weight(
    rule: LocalRule, layer: str, shape: torch.Size, weight: Tensor | None, random: Tensor | None, scale: float
) -> Tensor:
    """:meth:`LocalRule.backward_weight`, looked at.

    Args:
        layer: its name, for messages.
        shape: of its weight.

    Raises:
        PassError: if what is made is no tensor of the weight's shape and dtype, or W or R was changed on the way.
    """
    who = f"layer {layer}: {type(rule).__name__}.backward_weight"
    before = _versions(weight, random)
    made: object = rule.backward_weight(weight, random, scale)
    if not isinstance(made, Tensor):
        raise PassError(f"{who} returned {_what(made)}, not a tensor of its weight's shape {tuple(shape)}")
    if made.shape != shape:
        raise PassError(f"{who} returned a tensor of shape {tuple(made.shape)}, and its weight has {tuple(shape)}")
    like = random if weight is None else weight
    if like is not None and made.dtype is not like.dtype:
        raise PassError(
            f"{who} returned a tensor of {made.dtype}, and its weight, of shape {tuple(shape)}, is of {like.dtype} here"
        )
    if _versions(weight, random) != before:
        raise PassError(f"{who} changes the weight or R that it is given, in place: compute a new tensor instead")
    return made


def signal(rule: DirectRule, layer: str, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
    """:meth:`DirectRule.signal`, looked at.

    The number of features may be another one (a sketch of e): B then has so many rows.

    Args:
        layer: name of the output layer, for messages.

    Raises:
        PassError: if what is made is no tensor of e's dtype and, but for the features, shape; if e was changed on the
            way; or if a rule that needs targets fails without.
    """
    who = f"output layer {layer}: {type(rule).__name__}.signal"
    hint = ""
    if rule.needs_targets and targets is None:
        hint = "; it needs targets, and none were given: run the forward within `with rewire.targets(y):`"
    before = _versions(error)
    try:
        made: object = rule.signal(error, targets, axis)
    except PassError:
        raise
    except Exception as problem:
        if not hint:
            raise
        raise PassError(f"{who} failed ({type(problem).__name__}: {problem}){hint}") from problem
    if not isinstance(made, Tensor):
        raise PassError(f"{who} returned {_what(made)}, not a tensor of the error's shape {tuple(error.shape)}{hint}")
    if made.dim() != error.dim() or _without(made, axis) != _without(error, axis):
        raise PassError(
            f"{who} returned a tensor of shape {tuple(made.shape)}, and the output error has {tuple(error.shape)}: "
            f"only the number of features, dimension {axis}, may be another{hint}"
        )
    if made.dtype is not error.dtype:
        raise PassError(
            f"{who} returned a tensor of {made.dtype}, and the output error, of shape {tuple(error.shape)}, is of "
            f"{error.dtype}{hint}"
        )
    if _versions(error) != before:
        raise PassError(f"{who} changes the error that it is given, in place: compute a new tensor instead")
    return made


def shape_of_B(structure: Structure, method: str, layer: str, made: object, needed: tuple[int, ...]) -> None:
    """Look at the tensor that a structure made.

    Raises:
        PassError: if it is none, or of another shape than ``needed``.
    """
    who = f"layer {layer}: {type(structure).__name__}.{method}"
    if not isinstance(made, Tensor):
        raise PassError(f"{who} returned {_what(made)}, not a tensor of shape {tuple(needed)} or a Feedback")
    if made.shape != needed:
        raise PassError(f"{who} returned a tensor of shape {tuple(made.shape)}, and B has {tuple(needed)} here")


def _what(made: object) -> str:
    return "None" if made is None else f"a {type(made).__name__}"


def _without(t: Tensor, axis: int) -> list[int]:
    return [size for i, size in enumerate(t.shape) if i != axis % t.dim()]


def _versions(*tensors: Tensor | None) -> list[int]:
    """Counts of changes in place, where PyTorch counts them."""
    if _transforming():
        return []
    return [t._version for t in tensors if t is not None and not t.is_inference()]
