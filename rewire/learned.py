"""Feedback that learns is a part of its layer: Parameters and buffers whose names begin with ``rewire_``.

They are saved and loaded with everything else of the model. A plain checkpoint loads all the same (the feedback is then
as it was), and :func:`strip` takes them off again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "rewire_"


def names(module: nn.Module) -> list[str]:
    """Names of the module's own learned feedback."""
    return [name for name in (*module._parameters, *module._buffers) if name.startswith(PREFIX)]


def strip(module: nn.Module) -> dict[str, Tensor | None]:
    """Take learned feedback off ``module``.

    Returns:
        What was taken, for :func:`put_back`.
    """
    taken: dict[str, Tensor | None] = {}
    for name in names(module):
        taken[name] = module._parameters[name] if name in module._parameters else module._buffers[name]
        delattr(module, name)
    return taken


def put_back(module: nn.Module, taken: dict[str, Tensor | None]) -> None:
    """Undo :func:`strip`."""
    for name, tensor in taken.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)


def load(module: nn.Module, parent: Any, tags: list[str], state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """``_load_from_state_dict`` of a layer whose feedback learns.

    What is made in training only (feedback of direct rules has the shape that a pass asks for) is made when a
    checkpoint has it. A checkpoint without any feedback changes none.

    Args:
        parent: the layer's own class.
        tags: how names begin that the layer's rules use; none for rules that do not learn.
        rest: further arguments of ``_load_from_state_dict``: metadata, strict, missing keys, unexpected keys, errors.
    """
    there = [key[len(prefix) :] for key in state_dict if key.startswith(prefix + PREFIX)]
    fitting = [name for name in there if "." not in name and any(name.startswith(tag) for tag in tags)]
    like = next((p for p in module.parameters(recurse=False)), None)
    for name in fitting:
        if name not in module._buffers and name not in module._parameters:
            value = state_dict[prefix + name]
            module.register_buffer(name, torch.empty_like(value, device=value.device if like is None else like.device))
    missing: list[str] = rest[2]
    before = len(missing)
    parent._load_from_state_dict(module, state_dict, prefix, *rest)
    if not there:
        ours = {prefix + name for name in names(module)}
        missing[before:] = [key for key in missing[before:] if key not in ours]
