"""Training one cell."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import rewire

from . import models
from .cell import Cell, Epoch, Result
from .data import Dataset, load


@dataclass(slots=True)
class Trainer:
    """A model with its optimizer; :meth:`step` is the whole of what training does per batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler | None = None

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One update on images (N, C, H, W) and labels (N,); returns the loss before it, a scalar."""
        self.optimizer.zero_grad(set_to_none=True)
        # For rules that project the targets in place of the error; the others never look.
        with rewire.targets(y):
            loss = F.cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return loss.detach()


def make_trainer(cell: Cell, data: Dataset) -> Trainer:
    """The model of ``cell``, freshly initialised from its seed and converted, with its optimizer.

    The initial weights depend on the model and the seed alone, so all rules start from the same ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model: nn.Module = models.build(cell.model, data.shape, data.classes)
    # Backprop is the baseline: it stays plain PyTorch, with none of our code in its path.
    if cell.rule != "bp":
        rewire.convert(model, cell.rule, seed=cell.seed)

    optimizer: torch.optim.Optimizer
    if cell.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=cell.lr, weight_decay=cell.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=cell.lr, momentum=cell.momentum, weight_decay=cell.weight_decay
        )
    schedule = None
    if cell.schedule == "cosine":
        batches = math.ceil(len(data.x_train) / cell.batch_size)
        schedule = CosineAnnealingLR(optimizer, T_max=cell.epochs * batches)
    return Trainer(model, optimizer, schedule)


def run_cell(cell: Cell, on_epoch: Callable[[Epoch], None] | None = None) -> Result:
    """Train ``cell`` and test it after every epoch.

    Depends on nothing but ``cell`` and leaves torch's global generator as it was. ``on_epoch`` is told
    of each epoch as it ends.
    """
    began = time.perf_counter()
    data = load(cell.data, cell.data_dir)
    trainer = make_trainer(cell, data)
    order = torch.Generator().manual_seed(cell.seed)
    history: list[Epoch] = []
    step_times: list[float] = []

    # Rules may draw noise while training; it too is a matter of the cell's seed, and of nobody else's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        for number in range(1, cell.epochs + 1):
            loss = _epoch(trainer, data, cell.batch_size, order, step_times)
            history.append(Epoch(number, loss, accuracy(trainer.model, data.x_test, data.y_test)))
            if on_epoch is not None:
                on_epoch(history[-1])
            if not math.isfinite(loss):
                break

    last = history[-1]
    return Result(
        cell=cell,
        accuracy=last.accuracy,
        final_loss=last.loss,
        step_ms=1e3 * statistics.median(step_times),
        seconds=time.perf_counter() - began,
        diverged=not math.isfinite(last.loss),
        history=tuple(history),
    )


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Share of images (N, C, H, W) whose largest output is their label (N,); leaves the mode as it was."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        parts = [slice(start, start + batch_size) for start in range(0, len(y), batch_size)]
        right = sum(int((model(x[part]).argmax(1) == y[part]).sum()) for part in parts)
    model.train(was_training)
    return right / len(y)


def _epoch(trainer: Trainer, data: Dataset, batch_size: int, order: torch.Generator, step_times: list[float]) -> float:
    """One pass over the training data; mean loss per image, or the first loss that is not finite."""
    total = 0.0
    shuffled = torch.randperm(len(data.x_train), generator=order)
    for start in range(0, len(shuffled), batch_size):
        batch = shuffled[start : start + batch_size]
        x, y = data.x_train[batch], data.y_train[batch]
        began = time.perf_counter()
        loss = float(trainer.step(x, y))
        step_times.append(time.perf_counter() - began)
        if not math.isfinite(loss):
            return loss
        total += loss * len(batch)
    return total / len(shuffled)
