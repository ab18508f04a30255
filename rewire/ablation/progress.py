"""How far the training of one cell is: what its files are made of, and what listeners hear."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rewire
from rewire.errors import RewireError

from . import files
from .cell import Cell, Epoch, finite
from .data import Dataset
from .models import Net, logits
from .random_state import put_back, state
from .trainer import loss

HISTORY = "history.jsonl"
_SAMPLES = 128  # that alignment is measured on
_STEP_TIMES = 1000


class Listener:
    """Told how training goes on, in the process that trains."""

    def began(self, history: Sequence[Epoch], alignment: Sequence[Mapping[str, Any]]) -> None:
        """Training begins, or goes on after what was done already."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A step is done: ``done`` of the ``total`` of all epochs."""

    def epoch(self, epoch: Epoch, alignment: Mapping[str, Any] | None) -> None:
        """An epoch is done, with the measurement made at its end, if one was."""


@dataclass
class Progress:
    """Of one cell.

    Attributes:
        epoch: number of the epoch under way, from 1.
        step: steps done in it.
        total: sum of the losses of the samples seen in it.
        order: state of the generator that shuffles, when the epoch began.
        epoch_seconds: spent in it.
        seconds: spent on training in all.
        step_times: in seconds.
    """

    order: Tensor
    epoch: int = 1
    step: int = 0
    total: float = 0.0
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    alignment: list[dict[str, Any]] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)

    def spent(self, seconds: float) -> None:
        """Count time."""
        self.epoch_seconds += seconds
        self.seconds += seconds

    def end_epoch(self, mean_loss: float, accuracy: float, order: Tensor) -> Epoch:
        """Note an epoch, and begin the next."""
        epoch = Epoch(self.epoch, mean_loss, accuracy, self.epoch_seconds)
        del self.step_times[:-_STEP_TIMES]  # a median needs no more, and checkpoints stay small
        self.history.append(epoch)
        self.epoch, self.step, self.total, self.epoch_seconds, self.order = self.epoch + 1, 0, 0.0, 0.0, order
        return epoch

    def last_alignment(self, epoch: int) -> dict[str, Any] | None:
        """What was measured at the end of ``epoch``."""
        return self.alignment[-1] if self.alignment and self.alignment[-1]["epoch"] == epoch else None


class History:
    """``history.jsonl`` of one cell: a line per epoch for whoever looks on. What counts is the checkpoint.

    Args:
        folder: of the cell; None: nothing is written.
        done: epochs that a checkpoint knows of: the file is made to agree.
    """

    def __init__(self, folder: Path | None, done: list[Epoch]) -> None:
        self.path = None if folder is None else folder / HISTORY
        if self.path is not None:
            text = "".join(f"{_line(epoch)}\n" for epoch in done)
            files.replace(self.path, lambda file: file.write(text.encode()))

    def add(self, epoch: Epoch) -> None:
        """One more line."""
        if self.path is not None:
            with files.storing(self.path), self.path.open("a") as file:
                file.write(f"{_line(epoch)}\n")


def _line(epoch: Epoch) -> str:
    return json.dumps(finite(asdict(epoch)))


def measured_after(cell: Cell) -> frozenset[int]:
    """The epochs after which alignment is measured: evenly spread, the last among them."""
    count = min(cell.alignments, cell.epochs)
    return frozenset(round(cell.epochs * (i + 1) / count) for i in range(count))


def measure(net: Net, data: Dataset, epoch: int, step: int) -> dict[str, Any] | None:
    """What :func:`rewire.alignment` says of ``net`` on some training samples; None where there is no such function.

    Training goes on as if nobody had looked. What cannot be measured is no reason for a run to fail: it is noted.
    """
    alignment = getattr(rewire, "alignment", None)
    if alignment is None:
        return None
    pick = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))[:_SAMPLES]
    x, y = data.x_train[pick], data.y_train[pick]
    before = state()
    try:
        with rewire.targets(y):
            found = alignment(net.model, net.feed(x), lambda outputs: loss(logits(outputs), y)).record()
    except RewireError as error:
        found = {"gamma": None, "flags": [f"not measurable: {error}"], "layers": {}}
    finally:
        put_back(before)
    record: dict[str, Any] = finite({"epoch": epoch, "step": step, **found})
    return record
