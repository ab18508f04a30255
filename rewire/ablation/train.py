"""Training one cell, from the beginning or from its checkpoint."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, models, random_state
from .cell import Cell, Result
from .data import Dataset, load
from .memory import peak_mb, reset_peak
from .models import Net
from .progress import History, Listener, Progress, measure, measured_after
from .timing import step_ratio
from .trainer import Trainer, accuracy, make_optimizer, make_trainer, steps_per_epoch

EVERY = 30.0  # seconds between checkpoints


def run_cell(
    cell: Cell, folder: Path | None = None, listener: Listener | None = None, *, every: float = EVERY
) -> Result:
    """Train ``cell`` and test it after every epoch.

    Depends on nothing but ``cell`` and leaves global random state as it was.

    Args:
        folder: for checkpoints and history; if it holds a checkpoint, training goes on there. None: none are kept.
        listener: told of each step and epoch.
        every: seconds between checkpoints; one is written at the end in any case.

    Raises:
        RewireError: the rule and the model do not go together.
        StorageError: the disk does not take a checkpoint.
    """
    data = load(cell.data, cell.data_dir)
    reset_peak()
    with random_state.seeded(cell.seed):
        run = _Run(cell, data, folder, listener, every)
        run.train()
    last = run.progress.history[-1]
    return Result(
        cell=cell,
        status="done" if math.isfinite(last.loss) else "diverged",
        accuracy=last.accuracy,
        final_loss=last.loss,
        history=tuple(run.progress.history),
        alignment=tuple(run.progress.alignment),
        step_ms=1e3 * statistics.median(run.progress.step_times),
        memory_mb=peak_mb(),
        step_ratio=step_ratio(cell),
        seconds=run.progress.seconds,
    )


class _Run:
    def __init__(self, cell: Cell, data: Dataset, folder: Path | None, listener: Listener | None, every: float) -> None:
        self.cell, self.data, self.listener, self.every = cell, data, listener or Listener(), every
        self.path = None if folder is None else folder / checkpoint.NAME
        self.order = torch.Generator().manual_seed(cell.seed)
        # A fresh worker has not imported a model of the current directory yet, and a pickle cannot by itself.
        models.check(cell.model)
        kept = None if self.path is None else checkpoint.load(self.path)
        if kept is None or not checkpoint.is_of(kept["cell"], cell):
            self.trainer = make_trainer(cell, data)
            self.progress = Progress(self.order.get_state())
        else:
            self.trainer = _trainer_from(kept, cell, data)
            self.progress = kept["progress"]
            self.order.set_state(self.progress.order)
            random_state.put_back(kept["random"])
        self.history = History(folder, self.progress.history)
        self.saved = time.perf_counter()

    def train(self) -> None:
        """Every epoch that is still to be done."""
        progress, wanted = self.progress, measured_after(self.cell)
        self.listener.began(progress.history, progress.alignment)
        while progress.epoch <= self.cell.epochs and not self._diverged():
            number = progress.epoch
            mean = self._epoch()
            began = time.perf_counter()
            test = accuracy(self.trainer.net, self.data.x_test, self.data.y_test)
            progress.spent(time.perf_counter() - began)
            if number in wanted and math.isfinite(mean) and not self.cell.plain:
                steps = number * steps_per_epoch(self.cell, self.data)
                found = measure(self.trainer.net, self.data, number, steps)
                if found is not None:
                    progress.alignment.append(found)
            epoch = progress.end_epoch(mean, test, self.order.get_state())
            self.history.add(epoch)
            if progress.epoch > self.cell.epochs or self._diverged():
                self._save()
            self.listener.epoch(epoch, progress.last_alignment(number))

    def _diverged(self) -> bool:
        return bool(self.progress.history) and not math.isfinite(self.progress.history[-1].loss)

    def _epoch(self) -> float:
        """The rest of one pass over the training data: mean loss per sample, or the first that is not finite."""
        progress, data, size = self.progress, self.data, self.cell.batch_size
        shuffled = torch.randperm(len(data.x_train), generator=self.order)
        steps = steps_per_epoch(self.cell, data)
        for start in range(progress.step * size, len(shuffled), size):
            batch = shuffled[start : start + size]
            x, y = data.x_train[batch], data.y_train[batch]
            began = time.perf_counter()
            value = float(self.trainer.step(x, y))
            took = time.perf_counter() - began
            progress.step_times.append(took)
            progress.spent(took)
            if not math.isfinite(value):
                return value
            progress.total += value * len(batch)
            progress.step += 1
            self.listener.step((progress.epoch - 1) * steps + progress.step, self.cell.epochs * steps, value)
            if time.perf_counter() - self.saved >= self.every:
                self._save()
        return progress.total / len(shuffled)

    def _save(self) -> None:
        """Between steps only: what is kept is exactly what the next step starts from."""
        if self.path is None:
            return
        trainer = self.trainer
        kept = {
            "cell": self.cell.config(),
            "progress": self.progress,
            "net": trainer.net,
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": None if trainer.schedule is None else trainer.schedule.state_dict(),
            "random": random_state.state(),
        }
        if not checkpoint.save(self.path, kept):
            self.path = None
        self.saved = time.perf_counter()


def _trainer_from(kept: dict[str, Any], cell: Cell, data: Dataset) -> Trainer:
    """The trainer that a checkpoint holds."""
    net: Net = kept["net"]
    steps = cell.epochs * steps_per_epoch(cell, data)
    optimizer, schedule = make_optimizer(cell, list(net.model.parameters()), steps)
    optimizer.load_state_dict(kept["optimizer"])
    if schedule is not None:
        schedule.load_state_dict(kept["schedule"])
    return Trainer(net, optimizer, schedule)
