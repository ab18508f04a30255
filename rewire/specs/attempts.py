"""Finding inputs by trying: sizes a model accepts are written nowhere that could be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from rewire.errors import InputError
from rewire.preview import call

T = TypeVar("T")


def first_that_works(what: str, attempts: Iterable[Callable[[], T]]) -> T:
    """The result of the first of ``attempts`` that does not raise.

    Raises:
        InputError: with the first attempt's message, if all raise; at once, if one raises an InputError.
    """
    first: Exception | None = None
    for attempt in attempts:
        try:
            return attempt()
        except InputError:
            raise
        except Exception as error:  # models refuse inputs in every way there is
            first = first or error
    raise InputError(
        f"{what} runs on none of the inputs tried (the first failed with {type(first).__name__}: {first}); write a "
        "function that returns (model, inputs) and give it as package.module:function"
    ) from first


def try_out(model: nn.Module, inputs: Any) -> None:
    """One forward in training mode; raises whatever the model does. Buffers and random state are put back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.train()
    try:
        # With gradients on: some models refuse only then.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            call(model, inputs)
    finally:
        for buffer, kept in buffers:
            if buffer.shape == kept.shape:
                buffer.detach().copy_(kept)
