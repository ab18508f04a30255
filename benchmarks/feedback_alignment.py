"""How well direct feedback points along backprop's gradient while LeNet trains: fixed, learned and fitted.

python benchmarks/feedback_alignment.py
python benchmarks/feedback_alignment.py --data fashion-mnist --data-dir DIR --epochs 1 --batch 64 --lr 1e-3

Every ``--look`` steps a copy of the model is given the same images under backprop. A layer's alignment is the cosine
between the gradient that arrives at its input there and what its feedback B makes of the same output error, all images
together; the table has the mean over looks and seeds. All rules of a seed start from the same weights and see the same
batches. "every seed" says whether each layer's is above ``dfa``'s in every seed. ``probes`` counts forward-mode probes,
``exact`` the passes that were handed back exactly, per 100 passes. Runs are added to
``benchmarks/results/feedback_alignment.jsonl`` as they finish, and found there by the next call.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from kept import completed
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rewire
from rewire.ablation import data, models
from rewire.rules import BP, resolve
from rewire.rules.base import LearnedDirect

RULES = ("dfa", "dkp", "grape", "fitted")
RESULTS = Path(__file__).parent / "results" / "feedback_alignment.jsonl"


def alignment(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Cosine between e B and backprop's gradient at each layer's input, by layer name; x (N, C, H, W), y (N,)."""
    model = copy.deepcopy(model)
    feedback = rewire.feedback(model)
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]
            args[0].retain_grad()

        return hook

    for name in feedback:
        model.get_submodule(name).register_forward_pre_hook(note(name))  # type: ignore[arg-type]
    with rewire.use_rule(model, "bp"):
        F.cross_entropy(model(x), y).backward()
    e = rewire.output_error(model)
    assert isinstance(e, Tensor)
    found = {}
    for name, B in feedback.items():
        exact = inputs[name].grad
        assert exact is not None
        found[name] = float(F.cosine_similarity((e @ B.flatten(1)).flatten(), exact.flatten(), 0))
    return found


def train(
    rule: str, seed: int, images: data.Dataset, *, epochs: int, limit: int | None, lr: float, batch: int, look: int
) -> tuple[dict[str, float], float, tuple[int, int, int]]:
    """Train LeNet under ``rule``: mean alignment by layer, test error, and how many (passes, probes, exact passes)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build("lenet", images.shape, images.classes)
    rewire.convert(model, rule, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed)
    x, y = images.x_train[:limit], images.y_train[:limit]
    looks: list[dict[str, float]] = []
    steps = 0
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=order).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            steps += 1
            if steps % look == look // 2:
                looks.append(alignment(model, x[:256], y[:256]))
    with torch.no_grad():
        wrong = (model(images.x_test).argmax(1) != images.y_test).double().mean()
    means = {name: mean(found[name] for found in looks) for name in looks[0]}
    return means, float(wrong), (steps, *_costs(rule, steps))


def _costs(rule: str, passes: int) -> tuple[int, int]:
    made = resolve(rule)
    if isinstance(made, BP):
        return 0, passes
    if not isinstance(made, LearnedDirect):
        return 0, 1
    counted = range(passes)
    return sum(made.probes and made.probe_number(i) is not None for i in counted), sum(
        made.exact(i, 0) for i in counted
    )


def table(runs: list[dict[str, Any]], name: str) -> Table:
    """The mean over seeds for each rule, in the order of ``runs``."""
    shown = Table(title=f"LeNet on {name}: cosine of e B and backprop's gradient, by layer")
    layers = list(runs[0]["cosines"])
    for column in ("rule", *layers, "every seed", "test error %", "probes", "exact"):
        shown.add_column(column, justify="left" if column == "rule" else "right")
    plain = {run["seed"]: run["cosines"] for run in runs if run["rule"] == "dfa"}
    for rule in dict.fromkeys(run["rule"] for run in runs):
        of = [run for run in runs if run["rule"] == rule]
        above = all(run["cosines"][layer] > plain[run["seed"]][layer] for run in of for layer in layers if plain)
        shown.add_row(
            rule,
            *(f"{mean(run['cosines'][layer] for run in of):.3f}" for layer in layers),
            "" if rule == "dfa" or not plain else "above" if above else "not above",
            f"{mean(run['error'] for run in of):.2f}",
            *(f"{100 * of[0][what] / of[0]['steps']:.0f}" for what in ("probes", "exact")),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, help="only the first so many training images")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--look", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="run again what is there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    images = data.load(asked.data, asked.data_dir)
    how = {"epochs": asked.epochs, "limit": asked.images, "lr": asked.lr, "batch": asked.batch, "look": asked.look}
    wanted = [
        {"data": images.name, **how, "rule": rule, "seed": seed} for rule in asked.rules for seed in range(asked.seeds)
    ]

    def run(which: dict[str, Any]) -> dict[str, object]:
        cosines, wrong, (steps, probes, exact) = train(which["rule"], which["seed"], images, **how)
        found = {"cosines": cosines, "error": 100 * wrong, "steps": steps, "probes": probes, "exact": exact}
        return {**found, **machine("cpu")}

    Console(width=120).print(table(completed(asked.results, wanted, run, fresh=asked.fresh), images.name))


if __name__ == "__main__":
    main()
