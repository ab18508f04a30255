"""Results on disk: ``results.jsonl`` with everything, ``results.csv`` without the history."""

from __future__ import annotations

import csv
import json
import math
import platform
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .cell import Result
from .inputs import InputError


def record(result: Result) -> dict[str, Any]:
    """``result`` flat and ready for JSON: the cell's fields first, then what came out.

    Numbers that are not finite become None, since JSON has no word for them.
    """
    flat = asdict(result)
    cell = flat.pop("cell")
    cell["data_dir"] = None if cell["data_dir"] is None else str(cell["data_dir"])
    flat["history"] = [{key: _finite(value) for key, value in epoch.items()} for epoch in flat.pop("history")]
    return {key: _finite(value) for key, value in (cell | flat).items()}


class Writer:
    """Appends results to a new folder ``<out>/<date and time>/`` as they come.

    Each row is on disk when :meth:`append` returns: an interrupted run keeps what it finished.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self.folder = _new_folder(out)
        self._jsonl = self.folder / "results.jsonl"
        self._csv = self.folder / "results.csv"
        # Step times mean little without the machine they were taken on.
        about = {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        (self.folder / "run.json").write_text(json.dumps(about, indent=2) + "\n")

    def append(self, result: Result) -> None:
        """Add one row to both files."""
        row = record(result)
        with self._jsonl.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        del row["history"]
        with self._csv.open("a", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(row))
            if file.tell() == 0:
                table.writeheader()
            table.writerow(row)


def _new_folder(out: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    # Two runs may start in the same second.
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = out / f"{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot write to {out}: {error.strerror}") from error
        return folder
    raise InputError(f"cannot write to {out}: too many runs called {stamp}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
