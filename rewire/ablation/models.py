"""The small models an ablation can train, built for images of any shape (C, H, W)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .inputs import InputError, one_of

Shape = tuple[int, int, int]


def mlp(shape: Shape, classes: int) -> nn.Sequential:
    """Two hidden layers of 256 ReLUs; (N, C, H, W) to (N, classes)."""
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Sequential:
    """Two 3×3 convolutions with ReLU and pooling, then 64 ReLUs; (N, C, H, W) to (N, classes)."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (shape[1] // 4) * (shape[2] // 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def lenet(shape: Shape, classes: int) -> nn.Sequential:
    """LeNet-5 with its own tanh, and max pooling, conv 6-16-120 and fully connected 84-10 on 32×32.

    (N, C, H, W) to (N, classes). Smaller images are padded to 32×32, as 28×28 ones always were.

    Raises:
        InputError: the images are larger than 32×32.
    """
    channels, height, width = shape
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


_BUILDERS: dict[str, Callable[[Shape, int], nn.Sequential]] = {"mlp": mlp, "cnn": cnn, "lenet": lenet}


def names() -> list[str]:
    """Names that :func:`build` takes."""
    return list(_BUILDERS)


def build(name: str, shape: Shape, classes: int) -> nn.Sequential:
    """A freshly initialised model for images of ``shape`` (C, H, W), drawn from torch's global generator.

    Raises:
        InputError: the name is unknown, or the model cannot take images of this shape.
    """
    return _BUILDERS[one_of("model", name, _BUILDERS)](shape, classes)
