"""``package.module:factory``: a model of one's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewire.errors import InputError, nearest
from rewire.specs.attempts import first_that_works, try_out
from rewire.specs.losses import default_loss
from rewire.specs.spec import Example

_TOKENS = 11
_SIZES = (32, 64, 128, 224)


def prepare(module: str, name: str, hint: Callable[[], str]) -> Callable[[int], Example]:
    """Look ``module:name`` up; called for a batch size, the result builds.

    Args:
        hint: what else ``module`` could have meant, asked if there is no such module.
    """
    factory = find(module, name, hint)
    return lambda batch: _build(f"{module}:{name}", factory, batch)


def find(module: str, name: str, hint: Callable[[], str] = lambda: "", gives: str = "a model") -> Callable[[], Any]:
    """The function ``name`` of ``module``; calling it raises an :class:`InputError` if the function fails.

    Args:
        hint: what else ``module`` could have meant, asked if there is no such module.
        gives: what it should return, for messages.
    """
    with _current_directory():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise InputError(f"{module} cannot be imported: {error}") from error
            raise InputError(f"no source or module {module!r}{hint()}") from error
        except (Exception, SystemExit) as error:
            raise InputError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    factory: Any = found
    for part in name.split("."):
        if not hasattr(factory, part):
            options = [n for n in dir(factory) if callable(getattr(factory, n)) and not n.startswith("_")]
            raise InputError(f"{module} has no {name!r}{nearest(part, options)}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise InputError(f"{module}:{name} is {type(factory).__name__}, not a function that returns {gives}")

    def made() -> Any:
        with _current_directory():
            try:
                return factory()
            except (Exception, SystemExit) as error:  # a script's function may think that it is the whole program
                raise InputError(f"{module}:{name}() failed: {type(error).__name__}: {error}") from error

    return made


def _build(what: str, factory: Callable[[], Any], batch: int) -> Example:
    made = factory()
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise InputError(f"{what}() returned {type(made).__name__}, not a module, (module, inputs) or with a loss_fn")
    model = parts[0].train()
    loss_fn = parts[2] if len(parts) == 3 else default_loss
    return Example(model, parts[1] if len(parts) > 1 else _inputs(what, model, batch), loss_fn)


def _inputs(what: str, model: nn.Module, batch: int) -> Tensor:
    """Inputs that fit the first layer registered."""

    def attempt(x: Tensor) -> Tensor:
        try_out(model, x)
        return x

    candidates: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            candidates = [torch.randint(module.num_embeddings, (batch, _TOKENS))]
        elif isinstance(module, nn.Linear):
            candidates = [torch.randn(batch, *rest, module.in_features) for rest in ((), (_TOKENS,))]
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            dims = len(module.kernel_size)
            candidates = [torch.randn(batch, module.in_channels, *(size,) * dims) for size in _SIZES[: 5 - dims]]
        elif isinstance(module, nn.RNNBase):
            candidates = [torch.randn(batch, _TOKENS, module.input_size)]
        if candidates:
            break
    else:
        raise InputError(f"{what}() has no layer to guess inputs from: return (model, inputs)")
    return first_that_works(f"{what}()", [lambda x=x: attempt(x) for x in candidates])  # type: ignore[misc]


@contextmanager
def _current_directory() -> Iterator[None]:
    """Make the current directory importable, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
