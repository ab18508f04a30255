"""Logging to TensorBoard: ``pip install 'rewire[tensorboard]'``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewire.ablation.cell import Epoch
from rewire.ablation.progress import Listener
from rewire.errors import InputError


class Board(Listener):
    """Loss of every step; loss, accuracy and alignment of every epoch, which counts as the step of these.

    Args:
        folder: for the event files.

    Raises:
        InputError: TensorBoard cannot be imported.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard needs TensorBoard: pip install 'rewire[tensorboard]'") from error
        self.make = SummaryWriter
        self.folder = folder
        self.writer: Any = None

    def began(self, history: Sequence[Epoch], alignment: Sequence[Mapping[str, Any]]) -> None:
        # What was logged after the checkpoint that training goes on from is trained, and logged, again.
        self.writer = self.make(str(self.folder), purge_step=len(history) + 1 if history else None)

    def step(self, done: int, total: int, loss: float) -> None:
        self.writer.add_scalar("loss/step", loss, done)

    def epoch(self, epoch: Epoch, alignment: Mapping[str, Any] | None) -> None:
        self.writer.add_scalar("loss/epoch", epoch.loss, epoch.epoch)
        self.writer.add_scalar("accuracy/test", epoch.accuracy, epoch.epoch)
        if alignment is None:
            return
        values = {"gamma": alignment.get("gamma")}
        for name, layer in alignment.get("layers", {}).items():
            values |= {f"{name}/{what}": value for what, value in layer.items()}
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"alignment/{name}", value, epoch.epoch)

    def close(self) -> None:
        """Write out what is left."""
        if self.writer is not None:
            self.writer.close()
