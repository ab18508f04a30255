"""The models that are timed: how each is made, what it is fed, and what is aimed at."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

VOCABULARY = 50_257


@dataclass(frozen=True)
class Case:
    """One model at one batch size.

    Attributes:
        title: as it is printed.
        make: makes the model, on the CPU.
        shape: of one sample. Tokens if ``vocabulary`` is set.
        batch: number of samples, unless asked otherwise.
        feedback: structure of B under direct rules.
        chain: whether the model is an ``nn.Sequential`` of linear layers and activations.
        goals: the ratios to backprop aimed at, by contender; compiled ones are ``"compiled dfa"``. For other
            batch sizes than the ordinary one they are in ``batch_goals``.
    """

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    classes: int = 10
    tokens: bool = False
    feedback: str = "dense"
    chain: bool = False
    goals: Mapping[str, float] = field(default_factory=dict)
    batch_goals: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def data(self, batch: int, device: str) -> tuple[Tensor, Tensor]:
        """Inputs of shape (batch, *shape) and targets: (batch,), or one for each token."""
        generator = torch.Generator().manual_seed(0)
        if self.tokens:
            x = torch.randint(self.classes, (batch, *self.shape), generator=generator)
            return x.to(device), x.roll(-1, dims=1).to(device)
        y = torch.randint(self.classes, (batch,), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator).to(device), y.to(device)

    def goal(self, who: str, batch: int, mode: str) -> float | None:
        """The ratio aimed at, if one was set."""
        prefix = "compiled " if mode == "compiled" else ""
        goals = self.goals if batch == self.batch else self.batch_goals.get(batch, {})
        return goals.get(prefix + who)


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (..., classes) against (...)."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def mlp(width: int, hidden: int = 4) -> nn.Sequential:
    """784, hidden × width, 10, with ReLU."""
    sizes = [784, *[width] * hidden]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def lenet() -> nn.Sequential:
    """Convolutions 6-16-120, fully connected 84-10, for one channel of 32 × 32."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def from_torchvision(name: str) -> nn.Module:
    """A torchvision classifier with ten outputs.

    torchvision's compiled operations belong to other builds of torch than the CPU-only one, where importing it fails
    unless these two names exist. Classifiers use neither.
    """
    operations = torch.library.Library("torchvision", "FRAGMENT")
    for operation in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            operations.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, num_classes=10)
    return model


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, d) to (N, T, d)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block, (N, T, d) to (N, T, d)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with a class token; the widths of ViT-tiny. (N, 3, 64, 64) to (N, 10)."""

    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3, patch: int = 8, image: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Decoder(nn.Module):
    """A small GPT-2 with its embedding tied to its head. (N, T) tokens to (N, T, vocabulary)."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.tokens.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


# "large" and "small" as they are meant by the goals.
LARGE = {"fa": 1.03, "frsf": 1.06, "brsf": 1.35}

CASES: dict[str, Case] = {
    "mlp-128": Case("MLP 784-128×4-10", lambda: mlp(128), (784,), 128, chain=True, goals={"fa": 1.15, "dfa": 1.12}),
    "mlp-512": Case("MLP 784-512×4-10", lambda: mlp(512), (784,), 128, chain=True, goals={"dfa": 0.85}),
    "mlp-2048": Case(
        "MLP 784-2048×4-10",
        lambda: mlp(2048),
        (784,),
        256,
        chain=True,
        goals={**LARGE, "dfa": 0.73, "compiled dfa": 0.75},
        batch_goals={**{n: {"dfa": 0.85} for n in (1, 2, 8)}, 1024: {"dfa": 0.73}},
    ),
    "lenet": Case("LeNet 32²", lenet, (1, 32, 32), 64),
    "resnet18": Case("ResNet-18 64²", lambda: from_torchvision("resnet18"), (3, 64, 64), 32, goals={"dfa": 0.72}),
    "mobilenet": Case(
        "MobileNetV2 64²", lambda: from_torchvision("mobilenet_v2"), (3, 64, 64), 32, goals={"dfa": 0.87}
    ),
    "vit-tiny": Case("ViT-tiny 64²", ViT, (3, 64, 64), 32, goals={"dfa": 0.80}),
    "decoder-50k": Case(
        "decoder, 50k words",
        Decoder,
        (64,),
        8,
        classes=VOCABULARY,
        tokens=True,
        feedback="lowrank",
        goals={"dfa": 0.90},
    ),
}
