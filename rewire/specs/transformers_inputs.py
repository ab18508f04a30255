"""Inputs of transformers models, by the names of their forward's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

_LENGTHS = (11, 16, 64)
_MAIN = ("input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values")


def candidates(cls: Any, config: Any, batch: int) -> Iterator[dict[str, Any]]:
    """Inputs to try for ``cls(config)``, best first: with labels, so that the loss is computed inside forward."""
    parameters = inspect.signature(cls.forward).parameters
    needed = [
        name
        for name, p in parameters.items()
        if name != "self" and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    main = getattr(cls, "main_input_name", "input_ids")
    wanted = list(dict.fromkeys([*needed, *([main] if main in parameters else [])]))
    if not any(name in _MAIN for name in wanted):
        wanted += [name for name in _MAIN if name in parameters][:1]
    towers = {"text_config": "input_ids", "vision_config": "pixel_values", "image_config": "pixel_values"}
    given = [name for part, name in towers.items() if hasattr(config, part)]
    wanted += [name for name in dict.fromkeys(given) if name in parameters and name not in wanted]
    wanted += [name for name in ("bbox",) if name in parameters and name not in wanted]
    decodes = "decoder_input_ids" in parameters and "decoder_input_ids" not in wanted
    for length in _LENGTHS:
        options = {name: _values(name, config, batch, length) for name in wanted}
        for chosen in product(*options.values()):
            inputs = dict(zip(options, chosen, strict=True))
            if "labels" in parameters:
                for labels in _labels(cls, config, batch, inputs, length):
                    yield inputs | {"labels": labels}
                    if decodes:
                        yield inputs | {"labels": labels, "decoder_input_ids": labels}
            if decodes:
                yield inputs | {"decoder_input_ids": _ids(config, batch, length)}
            yield inputs


def _find(config: Any, *names: str, default: Any) -> Any:
    """The first of ``names`` that the configuration, or a part of it, has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "model_type"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _ids(config: Any, batch: int, length: int) -> Tensor:
    """Token ids without special ones, which stand at the end of a tiny vocabulary, and at its start in others."""
    vocabulary = _find(config, "vocab_size", default=100)
    return torch.randint(min(5, vocabulary - 1), max(vocabulary // 2, 6), (batch, length))


def _images(config: Any, batch: int) -> list[Tensor]:
    size = _find(config, "image_size", "img_size", "input_size", default=64)
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    channels = _find(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = _find(config, "num_frames", default=0)
    images = [torch.randn(batch, channels, *sides)]
    if frames:
        images.insert(0, torch.randn(batch, frames, channels, *sides))
    if sides != (224, 224):
        images.append(torch.randn(batch, channels, 224, 224))
    return images


def _sound(config: Any, batch: int) -> list[Tensor]:
    """Spectrograms, time first or last, and raw samples."""
    mel = _find(config, "num_mel_bins", "input_feat_per_channel", "feature_size", default=16)
    frames = _find(config, "max_length", "max_source_positions", default=64)
    spectra = [
        torch.randn(batch, mel, 2 * frames),
        torch.randn(batch, frames, mel),
        torch.randn(batch, 2 * frames, mel),
    ]
    return spectra


def _values(name: str, config: Any, batch: int, length: int) -> list[Any]:
    if name.endswith("input_ids"):
        return [_ids(config, batch, length)]
    if name.startswith("pixel_values"):
        return list(_images(config, batch))
    if name == "input_features":
        return list(_sound(config, batch))
    if name == "input_values":
        spectra = _sound(config, batch) if hasattr(config, "num_mel_bins") else []
        return [*spectra, torch.randn(batch, 3200), torch.randn(batch, 1, 3200), *_sound(config, batch)]
    if name.endswith("attention_mask") or name == "pixel_mask":
        return [torch.ones(batch, length, dtype=torch.long)]
    if name == "bbox":
        corner = torch.randint(0, 20, (batch, length, 2))
        return [torch.cat([corner, corner + 5], dim=-1), torch.rand(batch, length, 4)]
    if name == "past_values":
        # Lags reach back before the context.
        past = _find(config, "context_length", "prediction_length", default=16)
        lags = max(getattr(config, "lags_sequence", None) or [0])
        channels = _find(config, "num_input_channels", "input_size", default=1)
        series = [torch.randn(batch, past + lags, channels), torch.randn(batch, past + lags)]
        return series
    if name in ("inputs",):
        return [_ids(config, batch, length), torch.randn(batch, length, _find(config, "d_model", default=32))]
    return [None]


def _labels(cls: Any, config: Any, batch: int, inputs: dict[str, Any], length: int) -> list[Tensor]:
    """What a head of this class could want; the wrong ones are refused by the model."""
    name = cls.__name__
    if "ForMaskedLM" in name or "CausalLM" in name or "LMHead" in name:
        return [inputs["input_ids"]] if "input_ids" in inputs else []
    if "ConditionalGeneration" in name or "Seq2Seq" in name or "ForCTC" in name:
        short = 4 if "ForCTC" in name else length
        return [inputs["input_ids"]] if "CausalLM" in name else [_ids(config, batch, short)]
    if "Classification" in name and "Token" not in name:
        return [torch.randint(0, max(getattr(config, "num_labels", 2), 1), (batch,))]
    return []
