"""What training needs to go on exactly where it stopped, on disk.

A checkpoint holds the model itself, not its state alone: a converted model knows its output layers and
measured scales, and rules that learn have more. A file is replaced as a whole (:mod:`.files`), so there is always
one to go on from, and going on gives the same numbers to the last bit as never having stopped.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewire.errors import RewireWarning

from . import files

NAME = "checkpoint.pt"


def save(path: Path, state: Mapping[str, Any]) -> bool:
    """Write ``state``; whether that was possible: a model may refuse to be pickled, and is then trained in one go.

    Raises:
        StorageError: the disk does not take it.
    """
    try:
        files.replace(path, lambda file: torch.save(dict(state), file))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        path.with_name(f".{path.name}.new").unlink(missing_ok=True)
        warnings.warn(f"no checkpoints of a model that cannot be pickled: {error}", RewireWarning, stacklevel=2)
        return False
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
