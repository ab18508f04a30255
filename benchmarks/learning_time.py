"""What it costs that feedback learns: time of a training step against ``dfa``'s, over whole cycles of learning.

    python benchmarks/learning_time.py
    python benchmarks/learning_time.py --rules fitted "fitted(every=20)" --optimizer sgd --seconds 60

The LeNet of ``make fashion``, batch 64: zero_grad, forward, loss, backward, optimizer step. A rule that learns does not
cost the same in every step: ``fitted`` hands every fifth pass back exactly, and the step after it solves for B. So what
is timed is a cycle, as many steps as the rule has between two anchors or probes, beside the same number of steps of
``dfa``, in turns (:mod:`paired`): the ratio is that within a turn, the median and quartiles those over turns. The clock
is the process's own processor time, on one thread, so that others who use the machine slow both down alike or not at
all. Anchors of ``grape`` (one pass in 100) lie outside of most cycles, and of the median.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine, one_line
from paired import Step, paired
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import rewire
from rewire.ablation import models
from rewire.rules import resolve

RULES = ("bp", "fitted", "fitted(context=8)", "dkp", "grape", "grape(every=10)")
RESULTS = Path(__file__).parent / "results" / "learning_time.json"


def processor_time(step: Step) -> float:
    """Seconds of processor time that one step takes."""
    began = time.process_time()
    step()
    return time.process_time() - began


def cycle(rule: str) -> int:
    """Passes after which a rule does again what it did."""
    return int(getattr(resolve(rule), "every", 1))


def training(rule: str, optimizer: str, batch: int) -> Callable[[], None]:
    """A training step of LeNet under ``rule``, on random images of Fashion-MNIST's size."""
    torch.manual_seed(0)
    model = models.build("lenet", (1, 28, 28), 10)
    if rule != "bp":
        rewire.convert(model, rule)
    parameters = list(model.parameters())
    changes: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=1e-3)
    if optimizer == "sgd":
        changes = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))

    def step() -> None:
        changes.zero_grad()
        F.cross_entropy(model(x), y).backward()
        changes.step()

    return step


def times(step: Step, number: int) -> Step:
    """``step``, ``number`` times."""

    def repeated() -> None:
        for _ in range(number):
            step()

    return repeated


def measure(rules: list[str], optimizer: str, batch: int, seconds: float, least: int) -> dict[str, Any]:
    """By rule: ``ratio`` (quartiles) to ``dfa``, ``step`` (seconds, a median cycle's by its steps) and ``turns``."""
    found = {}
    for rule in rules:
        number = cycle(rule)
        own, dfa = training(rule, optimizer, batch), training("dfa", optimizer, batch)
        for _ in range(3 * number + 3):  # roles, scale, a first fit; whole cycles begin anywhere
            own(), dfa()
        timed = paired(
            {rule: times(own, number)}, times(dfa, number), seconds / len(rules), least=least, clock=processor_time
        )
        one = timed["contenders"][rule]
        found[rule] = {"ratio": one["ratio"], "step": one["seconds"] / number, "turns": one["turns"], "cycle": number}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=100.0, help="in all")
    parser.add_argument("--least", type=int, default=10, help="turns of each rule")
    parser.add_argument("--out", type=Path, help=f"keep the figures here, as {RESULTS.name}")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for rule in asked.rules:
        resolve(rule)
    found = measure(asked.rules, asked.optimizer, asked.batch, asked.seconds, asked.least)
    about = {**machine("cpu"), "optimizer": asked.optimizer, "batch": asked.batch}
    if asked.out:
        asked.out.write_text(json.dumps({"machine": about, "rules": found}, indent=1) + "\n")
    table = Table(title=f"LeNet, batch {asked.batch}, {asked.optimizer}: time of a training step ÷ dfa's")
    for column in ("rule", "cycle", "ratio [quartiles]", "ms a step", "turns"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for rule, one in found.items():
        low, middle, high = one["ratio"]
        ratio = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(rule, str(one["cycle"]), ratio, f"{1e3 * one['step']:.2f}", str(one["turns"]))
    console = Console(width=100)
    console.print(table)
    console.print(one_line(about), style="dim")


if __name__ == "__main__":
    main()
