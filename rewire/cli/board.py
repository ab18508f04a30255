"""Logging to TensorBoard: ``pip install 'rewire[tensorboard]'``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewire.ablation.cell import Epoch
from rewire.ablation.progress import Listener
from rewire.errors import InputError

STEPS = "steps"  # the folder in ours that TensorBoard shows as a run of its own


class Board(Listener):
    """Loss of every step, in a folder of its own; loss, accuracy and alignment of every epoch, which is their step.

    What was logged after the checkpoint that training goes on from is trained, and logged, again. TensorBoard forgets
    all of a folder from one step number on, so what counts steps and what counts epochs cannot be in one folder.

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
        self.epochs: Any = None
        self.steps: Any = None

    def began(self, history: Sequence[Epoch], alignment: Sequence[Mapping[str, Any]]) -> None:
        self.epochs = self.make(str(self.folder), purge_step=len(history) + 1)

    def step(self, done: int, total: int, loss: float) -> None:
        if self.steps is None:  # only the first step says where in an epoch training goes on
            self.steps = self.make(str(self.folder / STEPS), purge_step=done)
        self.steps.add_scalar("loss/step", loss, done)

    def epoch(self, epoch: Epoch, alignment: Mapping[str, Any] | None) -> None:
        self.epochs.add_scalar("loss/epoch", epoch.loss, epoch.epoch)
        self.epochs.add_scalar("accuracy/test", epoch.accuracy, epoch.epoch)
        if alignment is None:
            return
        values = {"gamma": alignment.get("gamma")}
        for name, layer in alignment.get("layers", {}).items():
            values |= {f"{name}/{what}": value for what, value in layer.items()}
        for name, value in values.items():
            if isinstance(value, int | float):
                self.epochs.add_scalar(f"alignment/{name}", value, epoch.epoch)

    def close(self) -> None:
        """Write out what is left."""
        for writer in (self.epochs, self.steps):
            if writer is not None:
                writer.close()
