"""How much of the gap between ``dfa`` and backprop other direct rules close: test error of small models on real data.

    python benchmarks/gap.py                         # everything, all rules, three seeds: about an hour on one core
    python benchmarks/gap.py transformer --seeds 1   # one task

Everything but the rule is the same: initial weights, batches, optimizer. "closed" is (dfa - rule) / (dfa - bp), of mean
errors. Runs are added to ``benchmarks/results/gap.jsonl`` as they finish, and found there by the next call; ``--fresh``
runs them again. Times are CPU seconds of training.

Tasks:
    transformer  six pre-norm blocks, 64 wide, on scikit-learn's digits as 8 tokens of 8 pixels; Adam 1e-3, batch 32,
                 20 epochs
    resnet       four residual blocks with BatchNorm, 16 to 64 channels, on 20,000 images of Fashion-MNIST; Adam 1e-3,
                 batch 64, 2 epochs
    lenet        the LeNet of ``make fashion``, Adam 1e-3, batch 64, 3 epochs
    lenet-sgd    the same with SGD 0.01, momentum 0.9
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kept import completed
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import rewire
from rewire.ablation import data, models

RESULTS = Path(__file__).parent / "results" / "gap.jsonl"
FASHION = Path("/usr/share/datasets/fashion-mnist")


class Attention(nn.Module):
    """Self-attention with one linear layer for queries, keys and values; (N, T, D) to (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Rows of an image as tokens; (N, 1, T, F) to (N, classes)."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        _, tokens, features = shape
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x.squeeze(1)) + self.position)
        return self.head(self.norm(x).mean(1))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        shrinks = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*(shrinks if stride > 1 or inputs != outputs else []))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.body(x))


def resnet(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    widths = [(16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)]
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Residual(*width) for width in widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


@dataclass(frozen=True)
class Task:
    """What is trained, on what, how long. ``parts``: patterns of the parts that "per block" feeds back as one each."""

    data: str
    model: Callable[[tuple[int, int, int], int], nn.Module]
    samples: int
    epochs: int
    batch: int
    parts: tuple[str, ...]
    rules: tuple[str, ...]
    sgd: bool = False


LAYERS = ("bp", "dfa", "fitted", "fitted(context=8)")
BLOCKS = ("dfa per block", "fitted per block", "fitted(context=8) per block")
LENET = ("bp", "dfa", "fitted")
TASKS = {
    "transformer": Task("digits", Transformer, 10**6, 20, 32, ("*.attention", "*.mlp"), (*LAYERS, "grape", *BLOCKS)),
    "resnet": Task("fashion-mnist", resnet, 20_000, 2, 64, ("3", "4", "5", "6"), LAYERS),
    "lenet": Task("fashion-mnist", models.lenet, 10**6, 3, 64, (), LENET),
    "lenet-sgd": Task("fashion-mnist", models.lenet, 10**6, 3, 64, (), LENET, sgd=True),
}


def run(name: str, written: str, seed: int, folder: Path) -> dict[str, object]:
    """Train one model; its test error in per cent and the CPU seconds that training took."""
    task = TASKS[name]
    images = data.load(task.data, folder if task.data == "fashion-mnist" else None)
    x, y = images.x_train[: task.samples], images.y_train[: task.samples]
    torch.manual_seed(seed)
    model = task.model(images.shape, images.classes)
    rule, _, blocks = written.partition(" per ")
    if rule != "bp":
        rewire.convert(model, rule, seed=seed, blocks=task.parts if blocks else None)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if task.sgd:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    began = time.process_time()
    for _ in range(task.epochs):
        for batch in torch.randperm(len(x), generator=order).split(task.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    seconds = time.process_time() - began
    model.eval()
    with torch.no_grad():
        pairs = zip(images.x_test.split(1000), images.y_test.split(1000), strict=True)
        wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in pairs)
    error = 100 * wrong / len(images.y_test)
    return {"error": error, "seconds": seconds, **machine("cpu")}


def table(name: str, runs: list[dict[str, object]]) -> Table:
    """Mean ± deviation over seeds, the share of the gap that is closed, and training time against ``dfa``'s."""
    out = Table(title=name)
    for column in ("rule", "seeds", "test error %", "closed %", "time ÷ dfa"):
        out.add_column(column, justify="left" if column == "rule" else "right")
    of: dict[str, list[dict[str, object]]] = {}
    for each in runs:
        of.setdefault(str(each["rule"]), []).append(each)

    def mean(rule: str, what: str) -> float:
        return statistics.fmean(float(str(each[what])) for each in of[rule])

    for rule in of:
        errors = [float(str(each["error"])) for each in of[rule]]
        spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        gap = mean("dfa", "error") - mean("bp", "error") if {"dfa", "bp"} <= set(of) else 0.0
        closed = f"{100 * (mean('dfa', 'error') - mean(rule, 'error')) / gap:.0f}" if gap else "-"
        ratio = f"{mean(rule, 'seconds') / mean('dfa', 'seconds'):.2f}" if "dfa" in of else "-"
        out.add_row(rule, str(len(errors)), f"{statistics.fmean(errors):.2f}{spread}", closed, ratio)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--rules", nargs="*", help="in place of each task's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=FASHION, help="Fashion-MNIST's four IDX files")
    parser.add_argument("--fresh", action="store_true", help="run again what is there")
    asked = parser.parse_args()
    for name in asked.tasks:
        if name not in TASKS:
            parser.error(f"no task {name!r}: {', '.join(TASKS)}")
    torch.set_num_threads(1)
    console = Console()
    for name in asked.tasks or TASKS:
        wanted = [
            {"task": name, "rule": rule, "seed": seed}
            for rule in asked.rules or TASKS[name].rules
            for seed in range(asked.seeds)
        ]

        def one(which: dict[str, object]) -> dict[str, object]:
            return run(str(which["task"]), str(which["rule"]), int(str(which["seed"])), asked.data_dir)

        console.print(table(name, completed(RESULTS, wanted, one, fresh=asked.fresh, title=name)))


if __name__ == "__main__":
    main()
