"""Step time of converted models as a ratio to backprop of the same model, in one process.

    python benchmarks/step_time.py            # everything, a few minutes on two cores
    python benchmarks/step_time.py --quick    # the judged lines only

A step is zeroing the gradients, forward, loss and backward; the optimizer, which is the same for all, is
left out. Each rule takes turns with backprop on the same batch, in alternating order; every figure is the
median over turns of the ratio within a turn, with the quartiles behind it. Results are also written to
``benchmarks/results/step_time-DEVICE.json`` with the machine, versions and thread count.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import rewire

RULES = ("fa", "frsf", "dfa")
RESULTS = Path(__file__).parent / "results"


def mlp(width: int, hidden: int = 4) -> nn.Module:
    """784 - width x hidden - 10, with ReLU."""
    sizes = [784, *[width] * hidden]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def lenet() -> nn.Module:
    """Convolutions 6-16-120, fully connected 84-10, for one channel of 32 x 32."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def make_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One training step without the optimizer."""

    def step() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, seconds: float, device: str) -> dict:
    """Median step time of backprop in seconds, and for each rule the quartiles of its ratio to backprop.

    Rules are measured one after the other, each in turns with backprop on the same batch and the same weights.
    """
    torch.manual_seed(0)
    base = make().to(device)
    x, y = torch.randn(batch, *shape, device=device), torch.randint(0, 10, (batch,), device=device)
    backprop: list[float] = []
    ratios: dict[str, list[float]] = {}
    for rule in RULES:
        steps = (make_step(copy.deepcopy(base), x, y), make_step(rewire.convert(copy.deepcopy(base), rule), x, y))
        for step in steps:
            for _ in range(3):
                step()
        found: list[float] = []
        end = time.perf_counter() + seconds / len(RULES)
        while time.perf_counter() < end or len(found) < 11:
            times = [0.0, 0.0]
            for which in (0, 1) if len(found) % 2 else (1, 0):  # who goes second may find the batch in the cache
                start = time.perf_counter()
                steps[which]()
                times[which] = time.perf_counter() - start
            backprop.append(times[0])
            found.append(times[1] / times[0])
        ratios[rule] = statistics.quantiles(found, n=4)
    return {"batch": batch, "bp_seconds": statistics.median(backprop), "pairs": len(backprop), "ratios": ratios}


def machine(device: str) -> dict[str, object]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rewire": rewire.__version__,
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the 2048-wide MLP at batch 1 and 256")
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each line (default 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    def wide() -> nn.Module:
        return mlp(2048)

    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
        ("MLP 784-2048x4-10", wide, (784,), batch)
        for batch in ((1, 256) if options.quick else (1, 2, 8, 32, 256, 1024))
    ]
    if not options.quick:
        cases += [
            ("MLP 784-512x4-10", lambda: mlp(512), (784,), 128),
            ("MLP 784-128x4-10", lambda: mlp(128), (784,), 128),
            ("LeNet", lenet, (1, 32, 32), 64),
        ]
    about = machine(options.device)
    table = Table(title=f"Step time / backprop, median [quartiles]. {about}")
    for column in ("model", "batch", "backprop ms", "us/sample", *RULES):
        table.add_column(column, justify="left" if column == "model" else "right")
    lines = []
    console = Console(width=140)
    for name, make, shape, batch in cases:
        with console.status(f"{name}, batch {batch}"):
            line = measure(make, shape, batch, options.seconds, options.device)
        lines.append({"model": name, **line})
        seconds = line["bp_seconds"]
        cells = [f"{mid:.2f} [{low:.2f} {high:.2f}]" for low, mid, high in line["ratios"].values()]
        table.add_row(name, str(batch), f"{seconds * 1e3:.2f}", f"{seconds / batch * 1e6:.0f}", *cells)
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"step_time-{options.device}.json"
    out.write_text(json.dumps({"machine": about, "lines": lines}, indent=1) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
