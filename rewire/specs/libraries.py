"""Importing what need not be installed, with one line for whoever lacks it."""

from __future__ import annotations

import importlib
from typing import Any

from rewire.errors import InputError


def library(name: str) -> Any:
    """The module ``name``.

    Raises:
        InputError: if it is missing, or made for another build of torch.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise InputError(f"this needs {missing}, which cannot be imported ({error}): pip install {missing}") from error
    except RuntimeError as error:
        if "operator" not in str(error):
            raise
        raise InputError(
            f"{name} cannot be imported: {error}. The installed torchvision was made for another build of torch; "
            "install the two from the same index"
        ) from error
