"""The models an ablation can train: small ones built for the data, and any other by its specification.

Models of libraries (:mod:`rewire.specs`) come with inputs of their own; :class:`Net` brings images to their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire.errors import nearest
from rewire.specs import Spec, resolve
from rewire.specs.from_python import find

from .inputs import InputError
from .resnet import resnet

Shape = tuple[int, ...]


def mlp(shape: Shape, classes: int) -> nn.Sequential:
    """Two hidden layers of 256 ReLUs; (N, *shape) to (N, classes)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Sequential:
    """Two 3×3 convolutions with ReLU and pooling, then 64 ReLUs; (N, C, H, W) to (N, classes)."""
    channels, height, width = image("cnn", shape)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def lenet(shape: Shape, classes: int) -> nn.Sequential:
    """LeNet-5 with its own tanh, and max pooling, conv 6-16-120 and fully connected 84-10 on 32×32.

    (N, C, H, W) to (N, classes). Smaller images are padded to 32×32, as 28×28 ones always were.

    Raises:
        InputError: the images are larger than 32×32.
    """
    channels, height, width = image("lenet", shape)
    if height > 32 or width > 32:
        raise InputError(f"lenet takes images up to 32×32, got {height}×{width}")
    left, top = (32 - width) // 2, (32 - height) // 2
    return nn.Sequential(
        nn.ZeroPad2d((left, 32 - width - left, top, 32 - height - top)),
        nn.Conv2d(channels, 6, 5),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 120, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, classes),
    )


def _resnet(shape: Shape, classes: int) -> nn.Sequential:
    return resnet(image("resnet", shape)[0], classes)


def image(model: str, shape: Shape) -> tuple[int, int, int]:
    """``shape`` as (C, H, W).

    Raises:
        InputError: it has not three dimensions.
    """
    if len(shape) != 3:
        raise InputError(f"{model} takes images (C, H, W), not samples of shape {shape}")
    channels, height, width = shape
    return channels, height, width


_BUILDERS: dict[str, Callable[[Shape, int], nn.Sequential]] = {
    "mlp": mlp,
    "cnn": cnn,
    "lenet": lenet,
    "resnet": _resnet,
}
_FORMS = "torchvision:NAME, timm:NAME, hf:MODEL_TYPE or package.module:function"


def names() -> list[str]:
    """The small models of our own that :func:`build` takes."""
    return list(_BUILDERS)


def check(name: str) -> None:
    """Raise an :class:`InputError` unless :func:`build` knows ``name``. Nothing is built."""
    if ":" not in name:
        _small(name)
    elif _is_python(name):
        _factory(name)
    else:
        resolve(name)


def build(name: str, shape: Shape, classes: int) -> nn.Sequential:
    """A freshly initialised small model for samples of ``shape``, drawn from torch's global generator.

    Raises:
        InputError: the name is unknown, or the model cannot take such samples.
    """
    return _BUILDERS[_small(name)](shape, classes)


@dataclass(frozen=True)
class Net:
    """A model and the way of a batch through it.

    Attributes:
        model: any module.
        key: keyword its input goes by; None: the first argument.
        size: (C, H, W) images are brought to: repeated channels, bilinear interpolation; None: as they are.
    """

    model: nn.Module
    key: str | None = None
    size: tuple[int, int, int] | None = None

    def feed(self, x: Tensor) -> Any:
        """x (N, ...) as the model takes it: a tensor, or a dict of keyword arguments."""
        if self.size is not None and tuple(x.shape[1:]) != self.size:
            channels, *space = self.size
            if list(x.shape[2:]) != space:
                x = F.interpolate(x, space, mode="bilinear")
            x = x.expand(-1, channels, -1, -1)
        return x if self.key is None else {self.key: x}

    def __call__(self, x: Tensor) -> Tensor:
        """The model's predictions: (N, classes), or (N, ..., classes) with one for every position."""
        fed = self.feed(x)
        return logits(self.model(**fed) if isinstance(fed, Mapping) else self.model(fed))


def logits(outputs: Any) -> Tensor:
    """The predictions in what a model returned: itself, ``.logits``, or the first of several."""
    found = getattr(outputs, "logits", outputs)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise InputError(f"the model returned {type(outputs).__name__}, in which there is no tensor of predictions")
    return found


def net(name: str, shape: Shape, classes: int, seed: int) -> Net:
    """The model called ``name`` for samples of ``shape``, initialised from ``seed``. Global random state is left alone.

    Raises:
        InputError: the name is unknown, or the model and the data do not go together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" not in name:
            return Net(build(name, shape, classes))
        if _is_python(name):
            made = _factory(name)()
            model = made[0] if isinstance(made, tuple) and made else made
            if not isinstance(model, nn.Module):
                raise InputError(f"{name} returned {type(made).__name__}, not a module")
            return Net(model.train())
    return _fitted(resolve(name), shape, classes, seed)


def _fitted(spec: Spec, shape: Shape, classes: int, seed: int) -> Net:
    model, inputs, _ = spec.build(seed=seed)
    key, like = next(iter(inputs.items())) if isinstance(inputs, Mapping) else (None, inputs)
    if isinstance(like, tuple | list) and like:
        like = like[0]
    if not isinstance(like, Tensor):
        raise InputError(f"{spec.text} takes {type(like).__name__}, which no data set here has")
    if not like.is_floating_point():
        if len(shape) != 1:
            raise InputError(f"{spec.text} takes {key or 'ids'} of shape (N, T), not samples of shape {shape}")
        return Net(model, key)
    if like.dim() != 4:
        raise InputError(f"{spec.text} takes inputs of shape {tuple(like.shape)}, not images")
    channels, *_ = image(spec.text, shape)
    wanted = (int(like.shape[1]), int(like.shape[2]), int(like.shape[3]))
    if channels not in (1, wanted[0]):
        raise InputError(f"{spec.text} takes images of {wanted[0]} channels, not {channels}")
    fitted = Net(model, key, wanted)
    training = model.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = logits(fitted.model.eval()(**{key: like}) if key else model(like)).shape
    model.train(training)
    if found[-1] < classes:
        raise InputError(f"{spec.text} predicts {found[-1]} classes, and the data have {classes}")
    return fitted


def _small(name: str) -> str:
    if name in _BUILDERS:
        return name
    known = f"{', '.join(_BUILDERS)}; or {_FORMS}"
    raise InputError(f"unknown model {name!r}{nearest(name.lower(), _BUILDERS)}; known are {known}")


def _is_python(name: str) -> bool:
    return name.partition(":")[0] not in ("torchvision", "timm", "hf") and bool(name.partition(":")[2])


def _factory(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    return find(module, function, partial(nearest, module, ("torchvision", "timm", "hf")))
