"""What one cell of an ablation is, and what comes out of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rewire.errors import ConversionError, nearest
from rewire.rules.base import DirectRule, parts_of, resolve
from rewire.structures import resolve as resolve_structure

from . import data, models
from .inputs import InputError, one_of, positive

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine")
STATUSES = ("done", "diverged", "failed")


@dataclass(frozen=True)
class Cell:
    """One training run, complete: equal cells give equal numbers on the same machine and thread count.

    Attributes:
        layers: (pattern, rule) pairs, as ``convert(layers=)`` takes them; later ones win.
        alignments: how many times during training alignment is measured, the last time at the end; 0: never.

    Raises:
        InputError: a name is unknown or a number cannot be.
    """

    model: str
    rule: str
    seed: int
    data: str = "digits"
    data_dir: Path | None = None
    layers: tuple[tuple[str, str], ...] = ()
    blocks: tuple[str, ...] = ()
    feedback: str = "dense"
    skip: str = "keep"
    scale: str | float = "auto"
    optimizer: str = "adam"
    lr: float = 2e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    epochs: int = 15
    batch_size: int = 32
    alignments: int = 5

    def __post_init__(self) -> None:
        # The model first: a model of the user's own may come from a module that registers rules.
        models.check(self.model)
        for rule in (self.rule, *(rule for _, rule in self.layers)):
            _converts(resolve, rule)
        data.check(self.data)
        _converts(resolve_structure, self.feedback)
        one_of("skip", self.skip, ("keep", "cut"))
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("schedule", self.schedule, SCHEDULES)
        if not isinstance(self.scale, str):
            positive("scale", self.scale)
        elif self.scale != "auto":
            hint = nearest(self.scale.lower(), ("auto",))
            raise InputError(f"scale is 'auto' or a number above zero, not {self.scale!r}{hint}")
        positive("seed", self.seed, zero=True)
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2**63, got {self.seed}")
        positive("epochs", self.epochs)
        positive("batch size", self.batch_size)
        positive("learning rate", self.lr)
        positive("momentum", self.momentum, zero=True)
        positive("weight decay", self.weight_decay, zero=True)
        positive("alignments", self.alignments, zero=True)
        if self.momentum >= 1:
            raise InputError(f"momentum must be below 1, got {self.momentum:g}")
        if self.momentum and self.optimizer != "sgd":
            raise InputError("momentum belongs to --optimizer sgd; adam has its own")

    @property
    def plain(self) -> bool:
        """Backprop and nothing else: the model is not converted, and stays plain PyTorch."""
        return self.rule == "bp" and not self.layers and not self.blocks

    def canonical(self) -> Cell:
        """The same run without settings that do nothing, so that it is one cell however it was asked for."""
        if self.plain:
            return replace(self, feedback="dense", skip="keep", scale="auto", alignments=0)
        parts = [part for rule in (self.rule, *dict(self.layers).values()) for part in parts_of(resolve(rule))]
        direct = any(isinstance(part, DirectRule) for part in parts)  # only these have a structure, or cut skips
        return self if direct else replace(self, feedback="dense", skip="keep")

    def config(self) -> dict[str, Any]:
        """Everything :meth:`from_config` needs, ready for JSON."""
        found = asdict(self)
        found["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        found["layers"] = dict(self.layers)
        found["blocks"] = list(self.blocks)
        return found

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Cell:
        """The cell with this :meth:`config`.

        Raises:
            InputError: it is of another version of this library, or damaged.
        """
        known = {field.name for field in fields(cls)}
        try:
            values = {name: value for name, value in config.items() if name in known}
            folder = values.get("data_dir")
            return cls(
                **values
                | {
                    "data_dir": None if folder is None else Path(folder),
                    "layers": tuple(values.get("layers", {}).items()),
                    "blocks": tuple(values.get("blocks", ())),
                }
            )
        except (TypeError, AttributeError) as error:
            raise InputError(f"a cell cannot be read: {error}") from error

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits made of the configuration, the same everywhere.

        Where the data lie is left out, so that a run may move to another machine; what they are called is not.
        """
        config = {name: value for name, value in self.config().items() if name != "data_dir"}
        # The order of layers matters to convert, so pairs and not a dict.
        config["layers"] = [list(pair) for pair in self.layers]
        text = json.dumps(config, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def label(self) -> str:
        """For people: ``mlp dfa seed 0``."""
        changed = "".join(f" {pattern}={rule}" for pattern, rule in self.layers)
        return f"{self.model} {self.rule}{changed} seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Epoch:
    """Mean training loss over one epoch, and test accuracy (0 to 1) and time spent at its end."""

    epoch: int
    loss: float
    accuracy: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """What a cell gave.

    Attributes:
        status: ``"done"``; ``"diverged"``: the loss stopped being finite, which ends the run early; ``"failed"``: see
            ``error``.
        accuracy: test accuracy (0 to 1) after the last epoch.
        final_loss: mean training loss of the last epoch; not finite if it diverged.
        alignment: what :func:`rewire.alignment` said, with ``epoch`` and ``step``.
        step_ms: median training step; for seeds trained together, each one's share of it.
        step_ratio: step time against backprop's, measured apart from training (see :mod:`.timing`).
        memory_mb: the most memory its process had resident while training, in 10⁶ bytes, PyTorch itself included.
        seconds: of training, over all sessions.
    """

    cell: Cell
    status: str
    accuracy: float | None = None
    final_loss: float | None = None
    history: tuple[Epoch, ...] = ()
    alignment: tuple[Mapping[str, Any], ...] = ()
    step_ms: float | None = None
    step_ratio: float | None = None
    memory_mb: float | None = None
    seconds: float = 0.0
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """One line of ``results.jsonl``. Numbers that are not finite become None: JSON has no word for them."""
        found = {
            "id": self.cell.id,
            "cell": self.cell.config(),
            "status": self.status,
            "error": self.error,
            "accuracy": self.accuracy,
            "final_loss": self.final_loss,
            "history": [asdict(epoch) for epoch in self.history],
            "alignment": [dict(each) for each in self.alignment],
            "step_ms": self.step_ms,
            "step_ratio": self.step_ratio,
            "memory_mb": self.memory_mb,
            "seconds": self.seconds,
        }
        return {key: finite(value) for key, value in found.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Result:
        """The result that a line holds; a loss that was not finite comes back as nan."""
        history = tuple(
            Epoch(**{**epoch, "loss": math.nan if epoch["loss"] is None else epoch["loss"]})
            for epoch in record["history"]
        )
        names = ("status", "accuracy", "final_loss", "step_ms", "step_ratio", "memory_mb", "seconds", "error")
        return cls(
            cell=Cell.from_config(record["cell"]),
            history=history,
            alignment=tuple(record["alignment"]),
            **{name: record[name] for name in names},
        )

    @property
    def gamma(self) -> float | None:
        """Γ of the last measurement of alignment, if there is one."""
        return self.alignment[-1].get("gamma") if self.alignment else None


def finite(value: Any) -> Any:
    """``value`` with None in place of every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def _converts(check: Any, value: object) -> None:
    try:
        check(value)
    except ConversionError as error:
        raise InputError(str(error)) from error
