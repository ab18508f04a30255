"""Units done in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .progress import Listener
from .work import Outcome, Unit, do


def outcomes(units: Sequence[Unit], *, threads: int, listener: Listener | None = None) -> Iterator[Outcome | None]:
    """The outcome of each unit as it is done; torch's threads are put back afterwards.

    Raises:
        StorageError: the disk takes no more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for unit in units:
            yield do(unit, listener)
    finally:
        torch.set_num_threads(before)
