"""Folders of results, read with patience: a run may have been killed, or come from an older version."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewire.errors import InputError

# What older versions wrote beside the cell's own fields, in one flat object.
_OUTCOME = {
    "id", "status", "error", "accuracy", "final_loss", "history", "alignment", "diverged",
    "step_ms", "step_ratio", "memory_mb", "seconds",
}  # fmt: skip
# What changes no number: how often alignment was looked at (never, under plain backprop), and where data lie.
NEUTRAL = ("alignments", "data_dir")
_LAYER_NUMBERS = (
    "weight_angle", "input_angle", "feedback_angle", "feedback_ratio",
    "activation_norm", "growth", "norm", "backprop_norm", "null_angle",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """One epoch: mean training loss, and test accuracy (0 to 1) at its end."""

    epoch: int
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer showed at one moment: angles in degrees, norms, None where not measurable."""

    rule: str
    note: str
    numbers: Mapping[str, float | None]

    @property
    def angle(self) -> float | None:
        """Between the rule's weight gradient and backprop's, in degrees."""
        return self.numbers["weight_angle"]


@dataclass(frozen=True, slots=True)
class Moment:
    """Alignment at one step of training."""

    epoch: float | None
    step: float | None
    gamma: float | None
    flags: tuple[str, ...]
    layers: Mapping[str, Layer]

    @property
    def when(self) -> tuple[float, float]:
        """To sort by: step, or epoch where no step is known."""
        return (
            math.inf if self.step is None else self.step,
            math.inf if self.epoch is None else self.epoch,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """One cell and what came out of it. ``status`` is ``done``, ``failed`` or ``diverged``."""

    cell: Mapping[str, Any]
    status: str
    error: str | None
    accuracy: float | None
    final_loss: float | None
    history: tuple[Point, ...]
    alignment: tuple[Moment, ...]
    step_ms: float | None
    step_ratio: float | None
    memory_mb: float | None
    seconds: float | None

    @property
    def rule(self) -> str:
        """As written in the request, options included."""
        return str(self.cell.get("rule", "?"))

    @property
    def seed(self) -> Any:
        """None where the file has none."""
        return self.cell.get("seed")


@dataclass(frozen=True, slots=True)
class Run:
    """One folder: what was asked for, and where."""

    folder: Path
    about: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def command(self) -> str | None:
        """The command line, if it was kept."""
        command = self.about.get("command")
        if isinstance(command, list):
            return " ".join(map(str, command))
        return None if command is None else str(command)


@dataclass(slots=True)
class Collected:
    """All runs merged. ``notes`` has what a reader should know about how that went, one sentence each."""

    runs: list[Run] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> str | None:
        """What the runs themselves name as baseline."""
        return next((str(run.about["baseline"]) for run in self.runs if run.about.get("baseline")), None)


def read(folders: Iterable[Path]) -> Collected:
    """The results in ``folders``, each written by ``rewire ablate``; what cannot be read is left out and noted.

    A cell that several lines or runs have counts once: a finished one before one that is not, and the last one
    of those.

    Raises:
        InputError: a folder has no results, or there is not one readable line in all of them.
    """
    collected = Collected()
    kept: dict[str, Outcome] = {}
    repeated = differing = 0
    for folder in dict.fromkeys(folders):
        lines = _lines(folder)
        collected.runs.append(_run(folder, collected.notes))
        for row in _rows(folder, lines, collected.notes):
            outcome = _outcome(row)
            key = _key(outcome.cell)
            before = kept.get(key)
            if before is not None:
                repeated += 1
                both = before.accuracy is not None and outcome.accuracy is not None
                differing += both and before.accuracy != outcome.accuracy
            if before is None or before.status != "done" or outcome.status == "done":
                kept[key] = outcome
    if not kept:
        raise InputError(f"no finished cell in {', '.join(str(run.folder) for run in collected.runs)}")
    if repeated:
        collected.notes.append(
            f"{count(repeated, 'result')} came more than once for the same cell; the last finished one counts"
            + (f". In {differing} of these cases the accuracy was another" if differing else "")
        )
    collected.outcomes = list(kept.values())
    unlike = [name for name, values in environments(collected.runs) if len(set(values)) > 1]
    if unlike:
        collected.notes.append(f"The runs were made in different environments ({', '.join(unlike)})")
    return collected


def environments(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each entry of the environment with its value in every run, as text; ``–`` where a run has none."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    return [(name, [_text(run.environment.get(name)) for run in runs]) for name in names]


def count(number: int, noun: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _lines(folder: Path) -> list[str]:
    try:
        # A line cut in the middle of a character is a torn line, not a reason to stop.
        return (folder / "results.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        below = sorted(file.parent for file in folder.glob("*/results.jsonl")) if folder.is_dir() else []
        hint = f"; runs in it: {' '.join(map(str, below[-3:]))}" if below else ""
        raise InputError(f"no results.jsonl in {folder}{hint}") from error


def _rows(folder: Path, lines: list[str], notes: list[str]) -> Iterable[dict[str, Any]]:
    last = max((number for number, line in enumerate(lines) if line.strip()), default=0)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        elif number == last and number == len(lines) - 1:
            notes.append(f"The last line of {folder.name}/results.jsonl is cut off (the run was stopped); left out")
        else:
            notes.append(f"Line {number + 1} of {folder.name}/results.jsonl cannot be read; left out")


def _run(folder: Path, notes: list[str]) -> Run:
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        notes.append(f"{folder.name} has no readable run.json: how it was made is not known")
        return Run(folder, {}, {})
    environment = about.get("environment")
    if not isinstance(environment, dict):
        rest = {"version", "started", "command", "grid", "environment", "baseline"}
        environment = {name: value for name, value in about.items() if name not in rest}
    return Run(folder, about, environment)


def _outcome(row: Mapping[str, Any]) -> Outcome:
    cell = row.get("cell")
    if not isinstance(cell, dict):
        cell = {name: value for name, value in row.items() if name not in _OUTCOME}
    status = row.get("status")
    if status not in ("done", "failed", "diverged"):
        status = "diverged" if row.get("diverged") else "failed" if row.get("error") else "done"
    error = row.get("error")
    return Outcome(
        cell=cell,
        status=status,
        error=None if error is None else str(error),
        accuracy=number(row.get("accuracy")),
        final_loss=number(row.get("final_loss")),
        history=tuple(
            Point(int(epoch), number(point.get("loss")), number(point.get("accuracy")))
            for point in _dicts(row.get("history"))
            if (epoch := number(point.get("epoch"))) is not None
        ),
        alignment=tuple(sorted((_moment(each) for each in _dicts(row.get("alignment"))), key=lambda each: each.when)),
        step_ms=number(row.get("step_ms")),
        step_ratio=number(row.get("step_ratio")),
        memory_mb=number(row.get("memory_mb")),
        seconds=number(row.get("seconds")),
    )


def _moment(row: Mapping[str, Any]) -> Moment:
    flags, layers = row.get("flags"), row.get("layers")
    return Moment(
        epoch=number(row.get("epoch")),
        step=number(row.get("step")),
        gamma=number(row.get("gamma")),
        flags=tuple(map(str, flags)) if isinstance(flags, list) else (),
        layers={
            str(name): Layer(
                str(layer.get("rule") or ""),
                str(layer.get("note") or ""),
                {key: number(layer.get(key)) for key in _LAYER_NUMBERS},
            )
            for name, layer in (layers.items() if isinstance(layers, dict) else ())
            if isinstance(layer, dict)
        },
    )


def number(value: Any) -> float | None:
    """``value`` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def canonical(value: Any) -> str:
    """The same text for settings that are the same in another order; that of layers matters, as later ones win."""
    if isinstance(value, Mapping) and isinstance(layers := value.get("layers"), Mapping):
        value = {**value, "layers": list(layers.items())}
    return json.dumps(value, sort_keys=True, default=str)


def _key(cell: Mapping[str, Any]) -> str:
    return canonical({name: cell[name] for name in cell if name not in NEUTRAL})


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
