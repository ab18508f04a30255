"""Where the time of a step goes, for MLPs, CNNs and a transformer: arithmetic, operations, memory, and a profile.

    python benchmarks/where_time_goes.py
    python benchmarks/where_time_goes.py --models mlp-512 --rules bp dfa --top 15     # operation by operation

Arithmetic is what torch.utils.flop_counter counts, memory the peak of what a step allocates beyond what was there
before it: with gradients that are made anew, as after ``zero_grad()``, and where they are there already and are added
to. All of it is the same on every run (--steps 0 prints it alone). The profile is
torch.profiler's, each operation with its own time alone; watching slows small operations down, so read the shares,
not the milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler of memory talks on its own otherwise

import torch
from machine import machine, one_line
from memory import peak_of
from models import CASES, loss_of
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import rewire
from rewire.diagnose.arithmetic import arithmetic

PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "convolution_backward", "mkldnn_convolution", "convolution_overrideable")
MODELS = ["mlp-128", "mlp-2048", "resnet18", "mobilenet", "vit-tiny"]
KINDS = ("products", "other operations", "autograd", "Python and the rest")


def kind_of(event: str) -> str:
    """Which of the first three kinds a profiled event belongs to."""
    if not event.startswith("aten::"):
        return "autograd"
    return "products" if event.removeprefix("aten::") in PRODUCTS else "other operations"


def look(model_name: str, rule: str, batch: int, steps: int, top: int) -> dict[str, Any]:
    """Everything about one model under one rule; ``top`` operations are printed."""
    torch.manual_seed(0)
    case = CASES[model_name]
    x, y = case.data(batch, "cpu")
    model = case.make()
    if rule != "bp":
        rewire.convert(model, rule, feedback=case.feedback)

    def step() -> None:
        loss_of(model(x), y).backward()

    for _ in range(3):  # scales are measured, roles found
        step()
    counted = arithmetic(model, x, lambda out: loss_of(out, y))
    added = peak_of(step, "cpu")
    model.zero_grad()
    exact = {
        "forward_flops": counted.forward,
        "backward_flops": counted.backward,
        "peak_bytes": peak_of(step, "cpu"),
        "peak_bytes_adding": added,
        "feedback_bytes": rewire.summary(model).feedback_bytes if rule != "bp" else 0,
    }
    if not steps:
        return exact
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        start = time.perf_counter()
        for _ in range(steps):
            model.zero_grad()
            step()
        spent = time.perf_counter() - start
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in record.key_averages():
        kind = kind_of(event.key)
        seconds[kind] += event.self_cpu_time_total / 1e6
        calls[kind] += event.count if event.self_cpu_time_total else 0
    seconds[KINDS[-1]] = max(spent - seconds.total(), 0.0)
    if top:
        print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=top, max_name_column_width=60))
    return {
        **exact,
        "products": calls["products"] / steps,
        "milliseconds": spent / steps * 1e3,
        "shares": {kind: seconds[kind] / seconds.total() for kind in KINDS},
    }


def show(title: str, found: dict[str, dict[str, Any]], console: Console) -> None:
    """One table for one model: a row a quantity, a column a rule."""
    table = Table(title=title)
    table.add_column("a step")
    for rule in found:
        table.add_column(rule, justify="right")
    reference = next(iter(found.values()))
    whole = reference["forward_flops"] + reference["backward_flops"]
    rows = {
        "forward, MFLOP": lambda r: f"{r['forward_flops'] / 1e6:.1f}",
        "backward, MFLOP": lambda r: f"{r['backward_flops'] / 1e6:.1f}",
        f"arithmetic / {next(iter(found))}": lambda r: f"{(r['forward_flops'] + r['backward_flops']) / whole:.3f}",
        "peak memory, kB": lambda r: f"{r['peak_bytes'] / 1e3:.1f}",
        "  gradients there, kB": lambda r: f"{r['peak_bytes_adding'] / 1e3:.1f}",
        "feedback, kB": lambda r: f"{r['feedback_bytes'] / 1e3:.1f}",
    }
    if "shares" in reference:
        rows["matrix products"] = lambda r: f"{r['products']:.0f}"
        rows["profiled, ms"] = lambda r: f"{r['milliseconds']:.2f}"
        rows |= {
            f"in {kind}": lambda r, kind=kind: f"{r['shares'][kind] * r['milliseconds']:.2f} {r['shares'][kind]:4.0%}"
            for kind in KINDS
        }
    for name, cell in rows.items():
        table.add_row(name, *(cell(each) for each in found.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=MODELS)
    parser.add_argument("--rules", nargs="+", choices=rewire.rules(), metavar="RULE", default=["bp", "fa", "dfa"])
    parser.add_argument("--batch", type=int, help="default: each model's own")
    parser.add_argument("--steps", type=int, default=20, help="to profile; 0: only what is the same on every run")
    parser.add_argument("--top", type=int, default=0, help="print so many operations of each profile")
    parser.add_argument("--quick", action="store_true", help="the small model, one step, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.models, options.steps = options.models[:1], 1
    console = Console(width=120)
    lines = []
    for name in options.models:
        batch = options.batch or CASES[name].batch
        found = {rule: look(name, rule, batch, options.steps, options.top) for rule in options.rules}
        lines.append({"model": name, "batch": batch, "rules": found})
        show(f"{CASES[name].title}, batch {batch}", found, console)
    about = machine("cpu")
    console.print(one_line(about), highlight=False)
    if options.steps and not options.quick:
        out = Path(__file__).parent / "results" / "where_time_goes-cpu.json"
        out.write_text(json.dumps({"machine": about, "lines": lines}, indent=1) + "\n")
        console.print(f"written to {out}")


if __name__ == "__main__":
    main()
