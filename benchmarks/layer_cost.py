"""What a converted layer costs beyond backprop's own, in microseconds, where layers are tiny and nothing else counts.

    python benchmarks/layer_cost.py                    # linear layers, 4 to 128 wide
    python benchmarks/layer_cost.py --kind conv        # 3 × 3 convolutions of as many channels on 4 × 4

A chain of equal layers is run under backprop and under each rule in turns, one thread, on the process's own clock, so
that other programs hardly matter. Forward, backward, and forward without gradients are timed apart. The figure is the
difference to backprop divided by the number of layers: of the fastest runs, and of the medians in brackets. It can be
negative: a direct rule saves a product. Also written to benchmarks/results/layer_cost-KIND.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine, one_line
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import rewire

PARTS = ("forward", "backward", "no grad")
RULES = ("fa", "usf", "frsf", "brsf", "dfa", "sdfa", "shallow")
Times = dict[str, list[int]]  # part to nanoseconds, one number a turn


def chain(kind: str, width: int, depth: int) -> nn.Sequential:
    """``depth`` layers that keep the shape of what goes in."""
    if kind == "conv":
        return nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)))
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def turn(model: nn.Module, x: Tensor, ones: Tensor, times: Times, clock: Callable[[], int]) -> None:
    """One forward and backward, and one forward without gradients."""
    model.zero_grad()
    x.grad = None
    start = clock()
    y = model(x)
    middle = clock()
    y.backward(ones)
    end = clock()
    with torch.no_grad():
        model(x)
    last = clock()
    for part, spent in zip(PARTS, (middle - start, end - middle, last - end), strict=True):
        times[part].append(spent)


def measure(kind: str, width: int, depth: int, batch: int, rules: list[str], turns: int) -> dict[str, dict[str, dict]]:
    """Microseconds a layer beyond backprop: by rule and part, of the fastest turns and of the medians."""
    torch.manual_seed(0)
    base = chain(kind, width, depth)
    shape = (batch, width, 4, 4) if kind == "conv" else (batch, width)
    x = torch.randn(shape, requires_grad=True)  # so that the first layer hands back too
    ones = torch.ones(shape)
    models = {"backprop": base}
    models |= {rule: rewire.convert(copy.deepcopy(base), rule) for rule in rules}
    for model in models.values():  # scales are measured, roles found
        for _ in range(5):
            turn(model, x, ones, {part: [] for part in PARTS}, time.process_time_ns)
    spent: dict[str, Times] = {name: {part: [] for part in PARTS} for name in models}
    for number in range(turns):
        for name in models if number % 2 else reversed(models):
            turn(models[name], x, ones, spent[name], time.process_time_ns)
    reference = spent["backprop"]
    found: dict[str, dict[str, dict]] = {}
    for name, times in spent.items():
        found[name] = {}
        for part in PARTS:
            least, middle = min(times[part]), statistics.median(times[part])
            if name != "backprop":
                least, middle = least - min(reference[part]), middle - statistics.median(reference[part])
            found[name][part] = {"min": least / depth / 1e3, "median": middle / depth / 1e3}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("linear", "conv"), default="linear")
    parser.add_argument("--widths", nargs="+", type=int, default=[4, 16, 64, 128])
    parser.add_argument("--rules", nargs="+", choices=rewire.rules(), metavar="RULE", default=list(RULES))
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="one width, 20 turns, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.widths, options.turns = options.widths[:1], 20
    torch.set_num_threads(1)
    about = machine("cpu")
    lines = []
    console = Console(width=120)
    for width in options.widths:
        found = measure(options.kind, width, options.depth, options.batch, options.rules, options.turns)
        lines.append({"width": width, "microseconds": found})
        title = f"{options.kind}, {width} wide, batch {options.batch}: µs a layer, fastest [median]"
        table = Table(title=escape(title))
        for column in ("", *PARTS):
            table.add_column(column, justify="right" if column else "left")
        for name, parts in found.items():
            sign = "" if name == "backprop" else "+"
            cells = [f"{parts[p]['min']:{sign}.1f} [{parts[p]['median']:{sign}.1f}]" for p in PARTS]
            table.add_row(name if name == "backprop" else f"{name} beyond", *map(escape, cells))
        console.print(table)
    console.print(one_line(about), highlight=False)
    if not options.quick:
        out = Path(__file__).parent / "results" / f"layer_cost-{options.kind}.json"
        setting = {key: getattr(options, key) for key in ("kind", "depth", "batch", "turns")}
        out.write_text(json.dumps({"machine": about, **setting, "lines": lines}, indent=1) + "\n")
        console.print(f"written to {out}")


if __name__ == "__main__":
    main()
