"""Train models under several rules and seeds, side by side.

One file per idea. :mod:`.cell` says what is trained and :mod:`.grid` lists the cells; :mod:`.models` and :mod:`.data`
say with what. :mod:`.train` trains one cell and :mod:`.together` several seeds at once, from :mod:`.checkpoint` to
checkpoint. :mod:`.work` makes results of whatever happens; :mod:`.here`, :mod:`.workers` and :mod:`.on_ray` do it.
:mod:`.folder` keeps it, :mod:`.runner` runs a grid, and :mod:`.report` prints the table.
"""

from .cell import Cell, Epoch, Result
from .data import Dataset, load
from .files import StorageError
from .folder import RunFolder, load_results, open_run
from .grid import Grid, from_toml, read
from .inputs import InputError
from .runner import How, check, run_grid
from .train import run_cell

__all__ = [
    "Cell",
    "Dataset",
    "Epoch",
    "Grid",
    "How",
    "InputError",
    "Result",
    "RunFolder",
    "StorageError",
    "check",
    "from_toml",
    "load",
    "load_results",
    "open_run",
    "read",
    "run_cell",
    "run_grid",
]
