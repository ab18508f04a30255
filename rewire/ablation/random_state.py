"""Random numbers of a cell: its own, whatever ran before it, and put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = tuple[Any, Any, Any]


def state() -> State:
    """Of the global generators of torch, NumPy and Python: a model may use any of them."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def put_back(kept: State) -> None:
    """Set the global generators to what :func:`state` said."""
    torch.set_rng_state(kept[0])
    np.random.set_state(kept[1])
    random.setstate(kept[2])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators start from ``seed`` inside, and are afterwards as before."""
    before = state()
    try:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        put_back(before)
