"""From a written specification to a :class:`~rewire.specs.spec.Spec`."""

from __future__ import annotations

from functools import partial

from rewire.errors import InputError, nearest
from rewire.specs import from_python, from_timm, from_torchvision, from_transformers
from rewire.specs.spec import Spec

_SOURCES = {
    "torchvision": from_torchvision.prepare,
    "timm": from_timm.prepare,
    "hf": from_transformers.prepare,
}
FORMS = "torchvision:NAME, timm:NAME, hf:MODEL_TYPE, hf:PATH or package.module:function"


def resolve(spec: str) -> Spec:
    """The model that ``spec`` names. Nothing is built yet.

    ========================== ====================================================================
    ``torchvision:resnet18``   any of torchvision's models, random weights, small images
    ``timm:resnet18``          any of timm's, at the smallest resolution it runs on, 10 classes
    ``hf:bert``                a transformers model type, its configuration made tiny
    ``hf:path/to/config.json`` a configuration as it is (or the folder it is in)
    ``package.module:factory`` a function without arguments that returns a module, or (module, inputs),
                               or (module, inputs, loss_fn); the current directory is importable
    ========================== ====================================================================

    Raises:
        InputError: for an unknown source or name, with the nearest right spelling; a library that is missing.
    """
    source, colon, name = spec.partition(":")
    if not colon or not name:
        raise InputError(f"{spec!r} names no model: write {FORMS}{nearest(source, _SOURCES)}")
    if source in _SOURCES:
        return Spec(spec, source, _SOURCES[source](name))
    return Spec(spec, "python", from_python.prepare(source, name, partial(nearest, source, _SOURCES)))
