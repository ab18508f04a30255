"""Train models under several rules and seeds, side by side.

One file per step: :mod:`.cell` says what is trained, :mod:`.models` and :mod:`.data` with what,
:mod:`.train` does it for one cell, :mod:`.timing` compares step times, :mod:`.runner` walks the grid,
:mod:`.results` writes files and :mod:`.report` prints the table.
"""

from .cell import Cell, Epoch, Result
from .data import Dataset, load
from .inputs import InputError
from .runner import check, grid, run_grid
from .train import run_cell

__all__ = [
    "Cell",
    "Dataset",
    "Epoch",
    "InputError",
    "Result",
    "check",
    "grid",
    "load",
    "run_cell",
    "run_grid",
]
