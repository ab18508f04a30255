"""Memory and time of one step: backprop, a direct rule, the same streamed, and activation checkpointing.

    python benchmarks/memory.py               # everything; some six minutes on two cores
    python benchmarks/memory.py --seconds 0   # memory only
    python benchmarks/memory.py --quick       # memory only, of small models
    python benchmarks/memory.py --read benchmarks/results/memory-cpu.json --markdown

Memory is the peak of everything allocated during a step (forward, loss, backward) beyond what was there before it;
gradients and feedback are there before it, so what is counted are activations and what is made on the way. On the CPU
every allocation is seen by PyTorch's profiler, so that the figure is the same in every run; on a GPU it is
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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on its own otherwise

import torch
from machine import machine, no_gpu, one_line
from paired import clock_for, paired
from report import MISSED, Sheet, missed, spread, with_missed
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import rewire

RESULTS = Path(__file__).parent / "results"
METHODS = ("bp", "dfa", "streamed", "checkpoint")
CLASSES = 10
MAY_GROW = 1.1  # the streamed peak of the deepest MLP, of the shallowest's
SHALLOW, DEEP = 8, 128
Step = Callable[[], None]
Line = dict[str, Any]


class MLP(nn.Sequential):
    """``depth`` linear layers and ReLUs of one width, and a linear output layer.

    Weights are drawn as in He et al. 2015 (arXiv:1502.01852). With PyTorch's own, gradients of 128 layers shrink to
    denormal numbers, and products of those take a CPU ten times as long: backprop's time would be theirs.
    """

    def __init__(self, depth: int, width: int = 512) -> None:
        layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
        super().__init__(*layers, nn.Linear(width, CLASSES))
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
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


@dataclass(frozen=True)
class Case:
    """One model, what it is fed, and what is aimed at.

    Attributes:
        shape: of the input.
        options: of ``rewire.convert``.
        peaks, times: ratios to backprop aimed at, by method.
    """

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)


def mlps(depths: tuple[int, ...], batch: int, width: int = 512) -> list[Case]:
    return [
        Case(
            f"MLP, {depth} layers of {width}, batch {batch}",
            partial(MLP, depth, width),
            (batch, width),
            times={"streamed": 1.1},
        )
        for depth in depths
    ]


def transformers(depth: int, shape: tuple[int, ...]) -> list[Case]:
    make = partial(Transformer, depth)
    peaks = {"streamed": 0.35} if depth >= 24 else {}
    return [
        Case(f"transformer, {depth} blocks{', blocks=' if options else ''}", make, shape, options, peaks)
        for options in ({}, {"blocks": ["blocks.*"]})
    ]


def steps_of(base: nn.Module, options: dict[str, Any], x: Tensor, y: Tensor) -> tuple[dict[str, Step], int]:
    """One training step without the optimizer, by method, and the bytes of the direct rule's feedback.

    Scales and output layers are known when this returns.
    """

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

    for method in METHODS:
        for _ in range(2):
            step(method)
    feedback = sum(B.nbytes for B in rewire.feedback(models["dfa"]).values())
    return {method: partial(step, method) for method in METHODS}, feedback


def peak_of(step: Step, device: str) -> int:
    """Bytes at the highest point of a step, beyond those allocated before it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measured(case: Case, device: str, seconds: float) -> Line:
    torch.manual_seed(0)
    x = torch.randn(*case.shape, device=device)
    y = torch.randint(0, CLASSES, case.shape[:1], device=device)
    steps, feedback = steps_of(case.make().to(device), case.options, x, y)
    line: Line = {"title": case.title, "feedback_bytes": feedback, "goals": {"peak": case.peaks, "time": case.times}}
    line["peak_bytes"] = {method: peak_of(step, device) for method, step in steps.items()}
    if seconds:
        timed = {method: step for method, step in steps.items() if method != "bp"}
        line.update(paired(timed, steps["bp"], seconds, least=2, clock=clock_for(device)))
    return line


def sheet_of(lines: list[Line]) -> Sheet:
    sheet = Sheet(
        "peak memory of a step in MiB (of backprop's); step / backprop: median [quartiles]", ["model", *METHODS]
    )
    for line in lines:
        sheet.rows.append([line["title"], *(_cell(line, method) for method in METHODS)])
        kept, beyond = line["feedback_bytes"], line["peak_bytes"]["dfa"] - line["peak_bytes"]["bp"]
        note = f"a dfa step holds {beyond / 1e3:+.1f} kB beside backprop's; feedback is {kept / 1e3:.1f} kB"
        sheet.notes.append(f"{line['title']}: {note}" + (MISSED if beyond > kept else ""))
    streamed = {line["title"]: line["peak_bytes"]["streamed"] for line in lines}
    shallow, deep = (
        next((peak for title, peak in streamed.items() if title.startswith(f"MLP, {depth} ")), None)
        for depth in (SHALLOW, DEEP)
    )
    if shallow and deep:
        grows = f"from {SHALLOW} to {DEEP} layers the streamed peak grows {deep / shallow:.3f}-fold"
        sheet.notes.append(f"{grows} (goal {MAY_GROW}){missed(deep / shallow, MAY_GROW)}")
    return with_missed(sheet)


def _cell(line: Line, method: str) -> str:
    peaks, goals = line["peak_bytes"], line["goals"]
    of_bp = peaks[method] / peaks["bp"]
    cell = f"{peaks[method] / 2**20:.1f} ({of_bp:.2f}){missed(of_bp, goals['peak'].get(method))}"
    timed = line.get("contenders", {}).get(method)
    return cell if timed is None else f"{cell} {spread(timed['ratio'], goals['time'].get(method))}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing per model; 0: memory only (default 40)")
    parser.add_argument("--quick", action="store_true", help="memory only, of small models")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--markdown", action="store_true", help="print Markdown in place of drawn tables")
    parser.add_argument("--read", type=Path, help="print an earlier file of results; nothing is measured")
    parser.add_argument("--out", type=Path, help="where to write results")
    return parser.parse_args()


def main() -> int:
    """Run, print, write."""
    options = arguments()
    console = Console(width=190)
    if options.read:
        found = json.loads(options.read.read_text())
    elif reason := no_gpu(options.device):
        print(reason)
        return 0
    else:
        cases = [*mlps((SHALLOW, 32, DEEP), 4096), *transformers(24, (8, 64, 128))]
        if options.quick:
            cases = [*mlps((SHALLOW, 32), 256, 128), *transformers(6, (2, 16, 128))]
        lines = []
        for case in cases:
            with console.status(case.title):
                lines.append(measured(case, options.device, 0.0 if options.quick else options.seconds))
        found = {"machine": machine(options.device), "lines": lines}
    sheet = sheet_of(found["lines"])
    if options.markdown:
        print(f"{one_line(found['machine'])}\n\n{sheet.markdown()}")
    else:
        sheet.draw(console)
        console.print(one_line(found["machine"]), highlight=False)
    if not options.read and (options.out or not options.quick):
        out = options.out or RESULTS / f"memory-{options.device.partition(':')[0]}.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
