"""What one cell of an ablation is, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import data, models
from .inputs import InputError, one_of, positive

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run, complete: equal cells give equal numbers on the same machine and thread count.

    Raises:
        InputError: a name is unknown or a number cannot be.
    """

    model: str
    rule: str
    seed: int
    data: str = "digits"
    data_dir: Path | None = None
    epochs: int = 15
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float = 2e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        # rewire.rules is asked here, not at import, so that rules registered later count.
        from rewire import ConversionError, rules
        from rewire.rules import resolve

        one_of("model", self.model, models.names())
        try:
            resolve(self.rule)  # with its options, if it has any
        except ConversionError as problem:
            one_of("rule", self.rule.partition("(")[0], rules())
            raise InputError(str(problem)) from None
        one_of("data set", self.data, data.names())
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("schedule", self.schedule, SCHEDULES)
        positive("seed", self.seed, zero=True)
        positive("epochs", self.epochs)
        positive("batch size", self.batch_size)
        positive("learning rate", self.lr)
        positive("momentum", self.momentum, zero=True)
        positive("weight decay", self.weight_decay, zero=True)
        if self.momentum and self.optimizer != "sgd":
            raise InputError("momentum belongs to --optimizer sgd; adam has its own")


@dataclass(frozen=True, slots=True)
class Epoch:
    """Mean training loss over one epoch, and test accuracy (0 to 1) at its end."""

    epoch: int
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a cell gave.

    ``final_loss`` is the mean training loss of the last epoch, ``accuracy`` the test accuracy after it
    (0 to 1), ``step_ms`` the median training step. ``step_ratio`` is the step time against backprop's,
    measured apart from training (see :mod:`.timing`) and the same for every seed. ``diverged`` says that
    the loss stopped being finite, which ends the run early.
    """

    cell: Cell
    accuracy: float
    final_loss: float
    step_ms: float
    seconds: float
    diverged: bool
    history: tuple[Epoch, ...]
    step_ratio: float | None = None
