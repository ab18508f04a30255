"""A loss for whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rewire.errors import InputError

# What transformers models return beside their predictions.
_INTERNAL = ("hidden_state", "attentions", "past_key_values", "model_output")


def default_loss(outputs: Any, seed: int = 0) -> Tensor:
    """A scalar that depends on every prediction in ``outputs``.

    The ``loss`` that a model computed itself, if it did; the sum of a dict of losses (scalars in training, as
    torchvision's detectors return); else the mean of squares against fixed random targets, averaged over all
    floating tensors in any nesting of tuples, lists, dicts and output objects. Intermediate states that
    transformers models return beside their predictions count only where there is nothing else.

    Raises:
        InputError: if no floating tensor in ``outputs`` requires a gradient.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(own, Tensor) and own.dim() == 0 and own.requires_grad:
        return own
    found = _floating(outputs)
    if isinstance(outputs, Mapping):
        predictions = {k: v for k, v in outputs.items() if not any(word in str(k) for word in _INTERNAL)}
        found = _floating(predictions) or found
    if not found:
        raise InputError(
            f"the model returned {type(outputs).__name__} without a floating tensor that requires a gradient"
        )
    if all(y.dim() == 0 for y in found):
        return torch.stack(found).sum()
    random = torch.Generator().manual_seed(seed)
    parts = [(y - torch.randn(y.shape, generator=random).to(y)).square().mean() for y in found]
    return torch.stack([part.float() for part in parts]).mean()


def _floating(outputs: Any) -> list[Tensor]:
    return [
        y
        for y in tree_leaves(outputs)
        if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad and y.numel()
    ]
