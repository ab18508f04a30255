"""The folder of a run: what was asked for, what came out, and what is needed to go on.

::

    run.json        the grid, complete, with the environment and the command that started it
    results.jsonl   one line per finished cell, appended as it finishes
    cells/ID/       checkpoint.pt and history.jsonl of each cell
    lock            held while a process works on the folder

A folder is worked on by one process at a time. It may be given again with the same grid, or with one that has all of
its cells and more; anything else is refused, so that no folder ever mixes two experiments.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rewire.errors import InputError

from . import files
from .cell import Cell, Result
from .environment import environment
from .grid import BASELINE, Grid, differences, read

VERSION = 1
RUN, RESULTS, CELLS, LOCK = "run.json", "results.jsonl", "cells", "lock"
_OURS = {LOCK, f".{LOCK}", f".{RUN}.new", CELLS}  # what a run that was stopped at once may leave


class RunFolder:
    """One run on disk. Made by :func:`open_run`.

    Attributes:
        path: the folder.
        grid: as ``run.json`` has it.
        results: of finished cells, in the order they finished.
    """

    def __init__(self, path: Path, grid: Grid, results: list[Result]) -> None:
        self.path = path
        self.grid = grid
        self.results = results

    def append(self, result: Result) -> None:
        """Keep a result; it is on disk when this returns.

        Raises:
            StorageError: it cannot be written; the file is as it was.
        """
        files.append(self.path / RESULTS, json.dumps(result.record(), allow_nan=False))
        self.results.append(result)

    def pending(self) -> list[Cell]:
        """Cells of the grid without a result, in its order."""
        done = {result.cell.id for result in self.results}
        return [cell for cell in self.grid.cells() if cell.id not in done]

    def forget_failed(self) -> None:
        """Drop the results of cells that failed, so that they are tried again."""
        kept = [result for result in self.results if result.status != "failed"]
        if len(kept) < len(self.results):
            text = "".join(json.dumps(result.record(), allow_nan=False) + "\n" for result in kept)
            files.replace(self.path / RESULTS, lambda file: file.write(text.encode()))
            self.results = kept

    def cell(self, cell: Cell) -> Path:
        """The folder of one cell."""
        return self.path / CELLS / cell.id


def new_folder(out: Path) -> Path:
    """A path in ``out`` named after date and time that does not exist yet. Nothing is made."""
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    # Two runs may start in the same second.
    return next(p for p in (out / f"{stamp}{s}" for s in ("", *(f"-{n}" for n in range(2, 10**6)))) if not p.exists())


def check(path: Path, grid: Grid) -> None:
    """Raise an :class:`InputError` if ``path`` cannot be, or become, the folder of a run of ``grid``. Makes nothing."""
    if path.is_dir():
        if (path / RUN).exists():
            _extended(path, load_grid(path), grid)
        elif any(other.name not in _OURS for other in path.iterdir()):
            raise InputError(f"{path} exists, and is not the folder of a run: name another with --out")
        return
    above = path
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise InputError(f"cannot write to {path}: {above} is a file")
    if not os.access(above, os.W_OK):
        raise InputError(f"cannot write to {path}: no permission to make files in {above}")


@contextmanager
def open_run(path: Path, grid: Grid, command: str) -> Iterator[RunFolder]:
    """The folder of a run of ``grid``, new or to be gone on with, held by this process until the end.

    Args:
        command: what was asked for, to be kept.

    Raises:
        InputError: it is the folder of another grid, or of something else, or another process works on it.
        StorageError: it cannot be written to.
    """
    check(path, grid)
    _made(path)
    with _held(path):
        run = path / RUN
        if not run.exists():
            about = {
                "version": VERSION,
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
                "command": command,
                "grid": grid.config(),
                "environment": environment(grid.threads),
                "baseline": BASELINE,
            }
            _write(run, about)
        elif _extended(path, load_grid(path), grid):
            _write(run, {**_load(path), "grid": grid.config(), "command": command})
        yield RunFolder(path, grid, load_results(path, repair=True))


def load_grid(path: Path) -> Grid:
    """The grid of the run in ``path``.

    Raises:
        InputError: there is no run, or it cannot be read.
    """
    grid = _load(path).get("grid", {})
    if not isinstance(grid, dict):
        raise InputError(f"{path / RUN} has no grid")
    return read(grid, str(path / RUN))


def load_results(path: Path, *, repair: bool = False) -> list[Result]:
    """Results of the run in ``path``. A last line that a kill cut off does not count: its cell is not finished.

    Args:
        repair: take such a line out of the file.

    Raises:
        InputError: another line cannot be read, or there are two of one cell.
    """
    file = path / RESULTS
    if not file.exists():
        return []
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        with files.storing(file):
            os.truncate(file, len(whole))
    found: dict[str, Result] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            result = Result.from_record(record)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}, line {number}, cannot be read: {type(error).__name__}: {error}") from error
        if record["id"] != result.cell.id:
            raise InputError(f"{file}, line {number}: cell {record['id']} is of another version of rewire")
        if result.cell.id in found:
            raise InputError(f"{file}, line {number}: a second result of cell {result.cell.id}")
        found[result.cell.id] = result
    return list(found.values())


def _load(path: Path) -> dict[str, Any]:
    run = path / RUN
    if not run.exists():
        raise InputError(f"{path} is not the folder of a run: it has no {RUN}")
    try:
        about: Any = json.loads(run.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run}: {error}") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise InputError(f"{run} was not written by this version of rewire")
    return about


def _write(run: Path, about: dict[str, Any]) -> None:
    text = json.dumps(about, indent=2) + "\n"
    files.replace(run, lambda file: file.write(text.encode()))


def _extended(path: Path, theirs: Grid, ours: Grid) -> bool:
    """Whether ``ours`` has all cells of ``theirs`` and more. The same cells asked for in another way count as the same.

    Raises:
        InputError: it lacks some, or numbers would depend on something else.
    """
    if theirs.threads != ours.threads or theirs.together != ours.together:
        raise InputError(f"{path} holds another run: {differences(ours.config(), theirs.config())}")
    there, here = ({cell.id: cell for cell in grid.cells()} for grid in (theirs, ours))
    if not there.keys() <= here.keys():
        raise InputError(
            f"{path} holds another run: {differences(ours.config(), theirs.config())}. Name another folder with --out, "
            f"or go on with it as it is, rewire ablate --resume {path}"
        )
    return there.keys() < here.keys()


def _made(path: Path) -> None:
    """Make the folder of a run. A place where none can be made was a wrong request; a full disk was not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise files.StorageError(f"cannot write to {path}: {error.strerror}") from error
        raise InputError(f"cannot write to {path}: {error.strerror}") from error


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """The lock is the system's: it is gone with the process that had it, however that ended."""
    try:
        lock = FileLock(path / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is working on {path}: wait for it, or name another folder") from error
    except OSError as error:
        raise files.StorageError(f"cannot write to {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
