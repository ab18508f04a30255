"""What training needs to go on exactly where it stopped, on disk.

A checkpoint holds the model itself, not its state alone: a converted model knows its output layers and
measured scales, and rules that learn have more. A file is replaced as a whole (:mod:`.files`), so there is always
one to go on from, and going on gives the same numbers to the last bit as never having stopped.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewire.errors import RewireWarning

from . import files
from .cell import Cell

NAME = "checkpoint.pt"


def save(path: Path, state: Mapping[str, Any]) -> bool:
    """Write ``state``; whether that was possible: a model may refuse to be pickled, and is then trained in one go.

    Raises:
        StorageError: the disk does not take it.
    """
    # Into memory first: what goes wrong there is the model's doing, and what goes wrong afterwards the disk's.
    pickled = io.BytesIO()
    try:
        torch.save(dict(state), pickled)
    except Exception as error:  # a model may refuse in any way; parametrized ones raise a RuntimeError
        warnings.warn(f"no checkpoints of a model that cannot be pickled: {error}", RewireWarning, stacklevel=2)
        return False
    files.replace(path, lambda file: file.write(pickled.getbuffer()))
    return True


def load(path: Path) -> dict[str, Any] | None:
    """What was saved last, or None if there is nothing that can be read.

    Nothing is lost with a file that cannot: the cell starts again and gives the same numbers.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=False)
    except Exception as error:  # made by another version of something, which may fail in any way
        warnings.warn(
            f"{path} cannot be read ({type(error).__name__}: {error}); its cell starts again",
            RewireWarning,
            stacklevel=2,
        )
        return None
    return state


def is_of(config: Mapping[str, Any], cell: Cell) -> bool:
    """Whether ``config``, as a checkpoint has it, is that of ``cell``, wherever the data lay and lie."""
    return {**config, "data_dir": None} == {**cell.config(), "data_dir": None}
