"""``timm:NAME``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from rewire.errors import InputError, nearest
from rewire.specs.attempts import first_that_works, try_out
from rewire.specs.libraries import library
from rewire.specs.losses import default_loss
from rewire.specs.spec import Example

_CLASSES = 10
_SIZES = (64, 96, 128, 160, 192, 224, 256)


def prepare(name: str) -> Callable[[int], Example]:
    """Check ``name``; called for a batch size, the result builds the model."""
    timm = library("timm")
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    return lambda batch: first_that_works(name, _attempts(timm, name, batch))


def _attempts(timm: Any, name: str, batch: int) -> Iterator[Callable[[], Example]]:
    """The smallest resolution first: told to models that want to know, then tried on one that does not."""
    config = timm.get_pretrained_cfg(name)
    channels, *native = (3, 224, 224) if config is None else config.input_size
    sizes = [size for size in _SIZES if size < native[0]]
    create = partial(timm.create_model, name, pretrained=False, num_classes=_CLASSES)
    for size in sizes:
        yield lambda size=size: _example(create(img_size=size), (batch, channels, size, size))  # type: ignore[misc]
    untold = cache(create)
    if config is None or not config.fixed_input_size:
        for size in sizes:
            yield lambda size=size: _example(untold(), (batch, channels, size, size))  # type: ignore[misc]
    yield lambda: _example(untold(), (batch, channels, *native))


def _example(model: nn.Module, shape: tuple[int, ...]) -> Example:
    x = torch.randn(shape)
    try_out(model, x)
    return Example(model, x, default_loss)
