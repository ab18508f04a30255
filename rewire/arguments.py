"""Arguments that several public calls take, checked with the same words."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from rewire.errors import ConversionError, PassError


def check_model(model: object, call: str) -> None:
    """Raise unless ``model`` is a module."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ConversionError(f"{model.__name__} is a class: {call} needs an instance, {model.__name__}(...)")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(
            f"{call} needs a torch.nn.Module, and a ScriptModule's layers run in TorchScript alone: give "
            "it the module that was scripted"
        )
    if not isinstance(model, nn.Module):
        raise ConversionError(f"{call} needs a torch.nn.Module, not {type(model).__name__}")


def check_loss(loss: object) -> None:
    """Raise unless ``loss_fn`` gave one number that a backward can start from."""
    if not isinstance(loss, Tensor):
        raise PassError(f"loss_fn has to return a scalar tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise PassError(f"loss_fn has to return a scalar, not a tensor of shape {tuple(loss.shape)}")


def path_of(path: object, call: str) -> Path:
    """``path`` as a Path to a file."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConversionError(f"{call}: a path is needed, not {type(path).__name__}")
    found = Path(path)
    if not found.name or "\0" in str(found):
        raise ConversionError(f"{call}: {os.fspath(path)!r} is no name of a file")
    return found
