"""What is alive: to test that a pass leaves nothing behind."""

import contextlib
import gc

import torch
from torch.autograd.graph import Node


def counts():
    """Live tensors, graph nodes that Python has seen, and library objects, by type."""
    found = {}
    for thing in gc.get_objects():
        kind = type(thing)
        # A leaf's node lives as long as the leaf, and is wrapped anew whenever it is looked at.
        seen = issubclass(kind, (torch.Tensor, Node)) and kind.__name__ != "AccumulateGrad"
        if seen or str(kind.__module__).startswith("rewire."):
            found[kind.__qualname__] = found.get(kind.__qualname__, 0) + 1
    return found


def left_by(once, times=5, collect=False):
    """Of what there are more after calling ``once`` than before, and how many.

    Args:
        collect: run the garbage collector first; otherwise nothing may wait for it.
    """
    once()
    with no_gc():
        before = counts()
        for _ in range(times):
            once()
        if collect:
            gc.collect()
        return {kind: n - before.get(kind, 0) for kind, n in counts().items() if n > before.get(kind, 0)}


@contextlib.contextmanager
def no_gc():
    """Nothing may wait for the next collection."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
