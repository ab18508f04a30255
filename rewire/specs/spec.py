"""What a specification is, and what it builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Example(NamedTuple):
    """A model with random weights, and what one training pass of it needs.

    Attributes:
        model: in training mode, on the CPU.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        loss_fn: from the model's output to a scalar.
    """

    model: nn.Module
    inputs: Any
    loss_fn: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Spec:
    """A model that can be built any number of times.

    Attributes:
        text: as it was written, ``"torchvision:resnet18"``.
        source: ``"torchvision"``, ``"timm"``, ``"hf"`` or ``"python"``.
        make: builds it for a batch size.
    """

    text: str
    source: str
    make: Callable[[int], Example]

    def build(self, batch: int = 2, seed: int = 0) -> Example:
        """A new model and its inputs: the same ones for the same ``seed``. The global random state is left alone.

        Args:
            batch: number of samples (a Python factory that returns inputs decides for itself).

        Raises:
            InputError: if its library cannot be imported, or no inputs are found that it runs on.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            example = self.make(batch)
        example.model.train()
        return example
