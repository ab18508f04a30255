"""Seeds trained together (one vmap over stacked models) against one by one: the digits MLP, or another small model.

    python benchmarks/together.py            # some minutes on two cores
    python benchmarks/together.py --quick    # one minute

In each turn every seed takes one training step on a batch of its own, once one after the other and once together: all
that training does per step, optimizer included. What counts is the ratio within a turn; the table shows the median
over turns with the quartiles in brackets. One thread each, as workers of ``rewire ablate`` have: two workers double
both. ``--threads 2`` gives both two threads. Goal: 16 seeds of the MLP 3 times faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine, one_line
from rich.console import Console
from rich.table import Table

from rewire.ablation import Cell, load
from rewire.ablation.together import _Together
from rewire.ablation.trainer import make_trainer

RESULTS = Path(__file__).parent / "results"
RULES = ("bp", "fa", "usf", "frsf", "dfa")
WARM_UP = 8


def turns(cell: Cell, seeds: int, count: int, clock: Callable[[], float] = time.perf_counter) -> list[list[float]]:
    """Seconds of a step of all seeds, (one by one, together), turn by turn."""
    data = load(cell.data)
    cells = [replace(cell, seed=seed) for seed in range(seeds)]
    alone = [make_trainer(each, data) for each in cells]
    stack = _Together(cells, data, [None] * seeds, every=1e9)
    order = torch.Generator().manual_seed(0)
    found: list[list[float]] = []
    for turn in range(WARM_UP + count):
        batch = torch.randint(len(data.x_train), (seeds, cell.batch_size), generator=order)
        x, y = data.x_train[batch], data.y_train[batch]

        def one_by_one(x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            for trainer, x_i, y_i in zip(alone, x, y, strict=True):
                float(trainer.step(x_i, y_i))

        def together(x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            stack._step(x, y)

        ways = (one_by_one, together)
        times = [0.0, 0.0]
        for i in (0, 1) if turn % 2 else (1, 0):
            began = clock()
            ways[i]()
            times[i] = clock() - began
        if turn >= WARM_UP:
            found.append(times)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mlp", help="a small model of rewire ablate (default mlp)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="fewer turns and numbers of seeds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    counts = (16,) if options.quick else (4, 8, 16, 32)
    about = machine("cpu")
    table = Table(title=f"{options.model}, batch {options.batch_size}: time one by one ÷ together\n{one_line(about)}")
    table.add_column("rule")
    table.add_column("seeds", justify="right")
    for name in ("one by one ms", "together ms", "gain"):
        table.add_column(name, justify="right")
    lines = []
    for rule in RULES:
        for seeds in counts:
            cell = Cell(options.model, rule, 0, batch_size=options.batch_size)
            found = turns(cell, seeds, 30 if options.quick else options.turns)
            one, stacked = (1e3 * statistics.median(times) for times in zip(*found, strict=True))
            low, middle, high = statistics.quantiles((a / b for a, b in found), n=4)
            lines.append({"rule": rule, "seeds": seeds, "one_by_one_ms": one, "together_ms": stacked, "gain": middle})
            gain = f"{middle:.2f} [{low:.2f} {high:.2f}]"
            table.add_row(rule, str(seeds), f"{one:.2f}", f"{stacked:.2f}", gain)
    Console(width=110).print(table)
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / "together.json"
    out.write_text(json.dumps({"machine": about, "lines": lines}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
