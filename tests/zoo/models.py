"""Which models to try: names, by library. What is done with them does not depend on the name."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import tests.torchvision_stub  # noqa: F401

LARGEST = 100_000_000

# One tiny model of each: every kind of architecture the library has.
TRANSFORMERS = Path(__file__).with_name("transformers.txt").read_text().split()


def every(cache: Path) -> list[str]:
    """Specifications of all models to try.

    Args:
        cache: file that remembers which variant of each of timm's files is the smallest, which takes minutes to find.
    """
    return [*torchvision(), *timm(cache), *(f"hf:{name}" for name in TRANSFORMERS)]


def torchvision() -> list[str]:
    """All of torchvision's models below :data:`LARGEST` parameters that can be trained."""
    from torchvision.models import get_model_builder, get_model_weights, list_models

    found = []
    for name in list_models():
        # Quantized ones are for inference only.
        if get_model_builder(name).__module__.split(".")[2] == "quantization":
            continue
        if min(weights.meta["num_params"] for weights in get_model_weights(name)) < LARGEST:
            found.append(f"torchvision:{name}")
    return found


def timm(cache: Path) -> list[str]:
    """The smallest model of each of timm's files."""
    import timm

    if cache.exists():
        known = json.loads(cache.read_text())
        if known["version"] == timm.__version__:
            return [f"timm:{name}" for name in known["smallest"].values()]
    smallest = {}
    for file in timm.list_modules():
        counts = {}
        for name in timm.list_models(module=file):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except (RuntimeError, NotImplementedError):  # reads values while it is made
                model = timm.create_model(name)
            counts[name] = sum(p.numel() for p in model.parameters())
        if counts:
            smallest[file] = min(counts, key=lambda name: counts[name])
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"version": timm.__version__, "smallest": smallest}, indent=1) + "\n")
    return [f"timm:{name}" for name in smallest.values()]
