"""``torchvision:NAME``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewire.errors import InputError, nearest
from rewire.specs.attempts import first_that_works, try_out
from rewire.specs.libraries import library
from rewire.specs.losses import default_loss
from rewire.specs.spec import Example

_CLASSES = 10
_SIZES = (64, 96, 128, 224, 300)
_TOLD: dict[str, Callable[[int], dict[str, int]]] = {
    "vision_transformer": lambda size: {"image_size": size},
    "detection": lambda size: {"min_size": 2 * size, "max_size": 2 * size},
}


def prepare(name: str) -> Callable[[int], Example]:
    """Check ``name``; called for a batch size, the result builds the model."""
    models = library("torchvision").models
    names = models.list_models()
    if name not in names:
        raise InputError(f"torchvision has no model {name!r}{nearest(name, names)}")
    builder = models.get_model_builder(name)
    return lambda batch: first_that_works(name, _attempts(builder, batch))


def _attempts(builder: Any, batch: int) -> Iterator[Callable[[], Example]]:
    kind = builder.__module__.split(".")[2]  # torchvision.models.<kind>...
    inputs: Callable[[int, int], Any] = {"detection": _detection, "video": _video, "optical_flow": _pair}.get(
        kind, _images
    )
    if kind == "quantization":
        raise InputError("torchvision's quantized models are for inference: they have no backward to change")
    none = {"weights": None}
    if kind in ("detection", "segmentation"):
        none["weights_backbone"] = None
    if kind == "optical_flow":
        yield partial(_build, builder, none, _pair, batch, 128)
        return
    for size in _SIZES:
        # Vision transformers and detectors, which would enlarge images, have to be told; most refuse the word.
        for told in (_TOLD[kind](size), {}) if kind in _TOLD else ({},):
            yield partial(_build, builder, none | {"num_classes": _CLASSES} | told, inputs, batch, size)
    yield partial(_build, builder, none | {"input_size": (224, 224)}, inputs, batch, 224)


def _build(builder: Any, options: dict[str, Any], inputs: Callable[[int, int], Any], batch: int, size: int) -> Example:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about default initialisation
        model = builder(**options)
    example = inputs(batch, size)
    try_out(model, example)
    return Example(model, example, default_loss)


def _images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size)


def _video(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, 16, size, size)


def _pair(batch: int, size: int) -> tuple[Tensor, Tensor]:
    return _images(batch, size), _images(batch, size)


def _detection(batch: int, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and, for each, one box with its class, mask and keypoints."""
    side = size / 2
    target = {
        "boxes": torch.tensor([[side / 4, side / 4, side, side]]),
        "labels": torch.ones(1, dtype=torch.long),
        "masks": torch.ones(1, size, size, dtype=torch.uint8),
        "keypoints": torch.tensor([[[side / 2, side / 2, 1.0]] * 17]),
    }
    return [torch.rand(3, size, size) for _ in range(batch)], [dict(target) for _ in range(batch)]
