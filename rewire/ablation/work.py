"""A piece of work: one cell, or seeds trained together. What a worker is given, does and gives back.

Whatever goes wrong with a cell becomes its result; only a disk that takes no more ends the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from . import files
from .cell import Cell, Result
from .folder import CELLS
from .progress import Listener
from .together import NotTogether, run_together
from .train import EVERY, run_cell

_QUIET = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Unit:
    """Cells to be trained by one worker, one after the other or together.

    Attributes:
        cells: one, or several that differ in their seed alone.
        folder: of the run; None: nothing is kept on the way.
        every: seconds between checkpoints.
    """

    cells: tuple[Cell, ...]
    folder: Path | None = None
    every: float = EVERY

    def of(self, cell: Cell) -> Path | None:
        """The folder of a cell."""
        return None if self.folder is None else self.folder / CELLS / cell.id

    @property
    def label(self) -> str:
        """For people."""
        first = self.cells[0].label
        return first if len(self.cells) == 1 else f"{first} to {self.cells[-1].seed}"


@dataclass(frozen=True)
class Outcome:
    """Results of a unit, in its cells' order, and what is worth saying once."""

    unit: Unit
    results: tuple[Result, ...]
    notes: tuple[str, ...] = ()


def do(unit: Unit, listener: Listener | None = None) -> Outcome:
    """Train the cells of ``unit``.

    Raises:
        StorageError: the disk takes no more.
    """
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        results = _locked(unit, notes, listener)
    notes += [str(each.message) for each in caught if not issubclass(each.category, _QUIET)]
    return Outcome(unit, tuple(results), tuple(dict.fromkeys(notes)))


def failed(unit: Unit, reason: str) -> Outcome:
    """The outcome of a unit that something ended."""
    return Outcome(unit, tuple(Result(cell, "failed", error=reason) for cell in unit.cells))


def _locked(unit: Unit, notes: list[str], listener: Listener | None) -> list[Result]:
    folder = unit.of(unit.cells[0])
    if folder is None:
        return _done(unit, notes, listener)
    with files.storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # A worker may live on for a moment when its run was killed: two must not write one checkpoint.
    with FileLock(folder / "lock", timeout=60):
        return _done(unit, notes, listener)


def _done(unit: Unit, notes: list[str], listener: Listener | None) -> list[Result]:
    if len(unit.cells) > 1:
        try:
            return run_together(unit.cells, [unit.of(cell) for cell in unit.cells], every=unit.every)
        except NotTogether as error:
            notes.append(f"{unit.cells[0].model} under {unit.cells[0].rule} is trained one seed by one: {error}")
        except files.StorageError:
            raise
        except (Exception, SystemExit) as error:
            notes.append(f"{unit.label} failed together ({_said(error)}), so the seeds are trained one by one")
    return [_one(unit, cell, listener) for cell in unit.cells]


def _one(unit: Unit, cell: Cell, listener: Listener | None) -> Result:
    try:
        return run_cell(cell, unit.of(cell), listener, every=unit.every)
    except files.StorageError:
        raise
    except (Exception, SystemExit) as error:  # a model may fail in any way, or think that it is the whole program
        return Result(cell, "failed", error=_said(error))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def groups_of(cells: Sequence[Cell], most: int) -> list[tuple[Cell, ...]]:
    """Cells in groups that differ in their seed alone, each of at most ``most``, in order; one by one if that is 0."""
    if most < 2:
        return [(cell,) for cell in cells]
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(replace(cell, seed=0).id, []).append(cell)  # which keeps the order of layers
    return [tuple(group[i : i + most]) for group in found.values() for i in range(0, len(group), most)]
