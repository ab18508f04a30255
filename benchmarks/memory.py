"""Memory and time of one step: backprop, a direct rule, the same streamed, and activation checkpointing.

    python benchmarks/memory.py               # everything; many minutes on two cores
    python benchmarks/memory.py --turns 0     # memory only; several minutes

Memory is the peak of everything allocated during a step (forward, loss, backward) beyond what was there before it;
gradients are there before it, so what is counted are activations and what is made on the way. On the CPU every
allocation is seen by PyTorch's profiler, so that the figure is the same in every run; on a GPU it is
``torch.cuda.max_memory_allocated``.

Time is the median over turns of the ratio to backprop's step in the same turn, quartiles in brackets. Everything is
also written to ``benchmarks/results/memory-DEVICE.json``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on its own otherwise

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import rewire

RESULTS = Path(__file__).parent / "results"
METHODS = ("bp", "dfa", "streamed", "checkpoint")
CLASSES = 10
Step = Callable[[], None]


class MLP(nn.Sequential):
    """``depth`` linear layers and ReLUs of one width, and a linear output layer."""

    def __init__(self, depth: int, width: int = 512) -> None:
        layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
        super().__init__(*layers, nn.Linear(width, CLASSES))
        self.segments = round(depth**0.5)

    def checkpointed(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self, self.segments, x, use_reentrant=False)


class Transformer(nn.Module):
    """Pre-norm blocks between a linear embedding and a linear head on the mean over tokens."""

    def __init__(self, depth: int, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, run: Callable[..., Tensor] = lambda block, h: block(h)) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = run(block, h)
        return self.head(self.norm(h).mean(1))

    def checkpointed(self, x: Tensor) -> Tensor:
        return self(x, partial(checkpoint, use_reentrant=False))


def steps_of(base: nn.Module, options: dict, x: Tensor, y: Tensor) -> dict[str, Step]:
    """One training step without the optimizer, by method. Scales and output layers are known when this returns."""

    def loss_of(out: Tensor) -> Tensor:
        return F.cross_entropy(out, y)

    models = {
        "bp": copy.deepcopy(base),
        "dfa": rewire.convert(copy.deepcopy(base), "dfa", **options),
        "streamed": rewire.convert(copy.deepcopy(base), "dfa", skip="cut", **options),
        "checkpoint": copy.deepcopy(base),
    }

    def step(method: str) -> None:
        model = models[method]
        model.zero_grad(set_to_none=False)
        if method == "streamed":
            rewire.backward_streamed(model, x, loss_of)
        else:
            loss_of(model.checkpointed(x) if method == "checkpoint" else model(x)).backward()
        if x.is_cuda:
            torch.cuda.synchronize()

    for method in METHODS:
        for _ in range(2):
            step(method)
    return {method: partial(step, method) for method in METHODS}


def peak_of(step: Step, device: str) -> int:
    """Bytes at the highest point of a step, beyond those allocated before it."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def ratios_of(steps: dict[str, Step], turns: int) -> dict[str, list[float]]:
    """Quartiles of each method's time divided by backprop's in the same turn."""
    found: dict[str, list[float]] = {method: [] for method in METHODS if method != "bp"}
    for turn in range(turns):
        times: dict[str, float] = {}
        for method in METHODS if turn % 2 else reversed(METHODS):
            start = time.perf_counter()
            steps[method]()
            times[method] = time.perf_counter() - start
        for method, ratios in found.items():
            ratios.append(times[method] / times["bp"])
    return {m: statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3 for m, ratios in found.items()}


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
    parser.add_argument("--turns", type=int, default=7, help="how often each step is timed; 0: memory only (default 7)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], dict]] = [
        (f"MLP, {depth} layers of 512, batch 4096", partial(MLP, depth), (4096, 512), {}) for depth in (8, 32, 128)
    ]
    cases += [
        ("transformer, 24 blocks", partial(Transformer, 24), (8, 64, 128), {}),
        ("transformer, 24 blocks, blocks=", partial(Transformer, 24), (8, 64, 128), {"blocks": ["blocks.*"]}),
    ]
    about = machine(options.device)
    table = Table(title=f"Peak memory of a step in MiB (of backprop's), time / backprop [quartiles]. {about}")
    table.add_column("model")
    for method in METHODS:
        table.add_column(method, justify="right")
    lines = []
    console = Console(width=150)
    for name, make, shape, convert in cases:
        with console.status(name):
            torch.manual_seed(0)
            x = torch.randn(*shape, device=options.device)
            y = torch.randint(0, CLASSES, shape[:1], device=options.device)
            steps = steps_of(make().to(options.device), convert, x, y)
            peaks = {method: peak_of(steps[method], options.device) for method in METHODS}
            ratios = ratios_of(steps, options.turns) if options.turns else {}
        lines.append({"model": name, "peak_bytes": peaks, "time_ratios": ratios})
        cells = []
        for method, peak in peaks.items():
            cell = f"{peak / 2**20:.0f} ({peak / peaks['bp']:.2f})"
            if method in ratios:
                low, mid, high = ratios[method]
                cell += f"  {mid:.2f} [{low:.2f} {high:.2f}]"
            cells.append(cell)
        table.add_row(name, *cells)
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"memory-{options.device}.json"
    out.write_text(json.dumps({"machine": about, "lines": lines}, indent=1) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
