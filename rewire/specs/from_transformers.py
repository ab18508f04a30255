"""``hf:MODEL_TYPE`` and ``hf:PATH``: transformers models from a configuration, random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from rewire.errors import InputError, nearest
from rewire.specs.attempts import first_that_works, try_out
from rewire.specs.libraries import imports, library
from rewire.specs.losses import default_loss
from rewire.specs.shrink import Sizes, tiny
from rewire.specs.spec import Example
from rewire.specs.transformers_inputs import candidates

# Classes with a task's head come first, as they are what people train; the bare model last.
_TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "IMAGE_TO_IMAGE",
    "TIME_SERIES_PREDICTION",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "PRETRAINING",
)
_SIZES = (
    Sizes(),
    Sizes(head=16),  # state-space models whose inner width is twice the outer
    Sizes(hidden=64, heads=4, head=16),
    Sizes(hidden=64, heads=8, head=8, layers=4),
    Sizes(hidden=64, heads=4, head=16, layers=4, image=224),
)


def prepare(name: str) -> Callable[[int], Example]:
    """Check ``name``; called for a batch size, the result builds the model."""
    transformers = library("transformers")
    transformers.logging.set_verbosity_error()
    path = Path(name)
    if path.exists():
        return lambda batch: _as_it_is(transformers, path, batch)
    known = list(transformers.CONFIG_MAPPING)
    if name not in known:
        if "/" in name or name.endswith(".json"):
            raise InputError(f"hf: no file or folder {name}; model types such as hf:bert need no file")
        raise InputError(f"transformers has no model type {name!r}{nearest(name, known)}")
    return lambda batch: first_that_works(f"hf:{name}", _attempts(transformers, name, batch))


def _as_it_is(transformers: Any, path: Path, batch: int) -> Example:
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} holds no configuration that transformers can read: {error}") from error
    config.use_cache = False
    return first_that_works(f"hf:{path}", _tried(transformers, config, batch))


def _attempts(transformers: Any, name: str, batch: int) -> Iterator[Callable[[], Example]]:
    for sizes in _SIZES:
        try:
            default = transformers.CONFIG_MAPPING[name]()
            config = type(default)(**tiny(default, sizes))
        except Exception as error:  # sizes that do not go together
            yield _raising(error)
            continue
        yield from _tried(transformers, config, batch)


def _raising(error: Exception) -> Callable[[], Example]:
    def attempt() -> Example:
        raise error

    return attempt


def _tried(transformers: Any, config: Any, batch: int) -> Iterator[Callable[[], Example]]:
    with imports("transformers"):
        cls = _model_class(transformers, config)
    create = cache(lambda: cls(config))
    for inputs in candidates(cls, config, batch):

        def attempt(inputs: dict[str, Any] = inputs) -> Example:
            model: nn.Module = create()
            try_out(model, inputs)
            return Example(model, inputs, default_loss)

        yield attempt


def _model_class(transformers: Any, config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    auto = transformers.models.auto.modeling_auto
    mappings = [getattr(auto, f"MODEL_FOR_{task}_MAPPING", {}) for task in _TASKS]
    if hasattr(config, "text_config") and (hasattr(config, "vision_config") or hasattr(config, "image_config")):
        # Two towers: a classifier would be one of them.
        mappings = [auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    for mapping in (*mappings, auto.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise InputError(f"transformers has no model class for {type(config).__name__}")
