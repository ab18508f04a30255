"""A model with its optimizer, made from a cell, and one step of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import rewire
from rewire.errors import InputError

from . import models
from .cell import Cell
from .data import Dataset
from .models import Net


@dataclass(slots=True)
class Trainer:
    """A model with its optimizer; :meth:`step` is the whole of what training does per batch."""

    net: Net
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler | None = None

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One update on samples x (N, ...) and labels y; returns the loss before it, a scalar."""
        self.optimizer.zero_grad(set_to_none=True)
        # For rules that project the targets in place of the error; the others never look.
        with rewire.targets(y):
            value = loss(self.net(x), y)
        value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return value.detach()


def loss(predictions: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of predictions (N, classes) for y (N,), or (N, ..., classes) for y (N, ...)."""
    if predictions.dim() > 2:
        predictions, y = predictions.flatten(0, -2), y.flatten()
    return F.cross_entropy(predictions, y)


def accuracy(net: Net, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Share of labels that are the largest prediction; leaves the mode as it was."""
    was_training = net.model.training
    net.model.eval()
    with torch.no_grad():
        parts = [slice(start, start + batch_size) for start in range(0, len(y), batch_size)]
        right = sum(int((net(x[part]).argmax(-1) == y[part]).sum()) for part in parts)
    net.model.train(was_training)
    return right / y.numel()


def steps_per_epoch(cell: Cell, data: Dataset) -> int:
    """Batches in an epoch; the last may be smaller."""
    return math.ceil(len(data.x_train) / cell.batch_size)


def converted(cell: Cell, data: Dataset) -> Net:
    """The model of ``cell``, freshly initialised from its seed, under its rule.

    The initial weights depend on the model and the seed alone, so all rules start from the same ones.
    """
    net = models.net(cell.model, data.shape, data.classes, cell.seed)
    # Backprop is the baseline: it stays plain PyTorch, with none of our code in its path.
    if not cell.plain:
        rewire.convert(
            net.model,
            cell.rule,
            layers=dict(cell.layers) or None,
            blocks=list(cell.blocks) or None,
            feedback=cell.feedback,
            skip=cell.skip,
            scale=cell.scale,
            seed=cell.seed,
        )
    return net


def make_optimizer(
    cell: Cell, parameters: list[Tensor], steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """The optimizer of ``cell`` and its schedule over ``steps`` updates.

    Fused: one pass over the parameters, where the default makes a dozen. On small models that is half of a step.
    """
    optimizer: torch.optim.Optimizer
    if cell.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=cell.lr, weight_decay=cell.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=cell.lr, momentum=cell.momentum, weight_decay=cell.weight_decay, fused=True
        )
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps) if cell.schedule == "cosine" else None


def make_trainer(cell: Cell, data: Dataset) -> Trainer:
    """The model of ``cell`` (:func:`converted`) with its optimizer.

    Raises:
        InputError: the model and the data do not go together.
        RewireError: the rule cannot be had on this model.
    """
    if data.y_train.dim() > 1 and ":" not in cell.model:
        raise InputError(f"{cell.data} has a label for every position, and {cell.model} gives one per sample")
    net = converted(cell, data)
    steps = cell.epochs * steps_per_epoch(cell, data)
    return Trainer(net, *make_optimizer(cell, list(net.model.parameters()), steps))
