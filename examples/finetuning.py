"""What finetune_vision.py and finetune_text.py share: the linear probe, and a table that goes on where it stopped.

A method is what trains and what ``rewire.convert`` is told. Every method starts from the same pretrained weights and
the same head, that of the linear probe, and has the same number of steps. Its learning rate is the one of a few that
does best in training on as many samples, with a seed of its own, measured on others held out of the training
pool; the test samples are not looked at there. Each run has a process of its own, so that memory can be told.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import rewire
from rewire.ablation.memory import peak_mb, reset_peak

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Array = npt.NDArray[np.float32]
BATCH = 16  # of so few samples larger batches would make few steps
VALIDATION = 100  # the seed of the runs that choose learning rates


@dataclass(frozen=True)
class Method:
    """``convert``: options of rewire.convert, None: not called; ``trains``: names (fnmatch) of parameters that do."""

    convert: dict[str, Any] | None = None
    trains: tuple[str, ...] = ("*",)

    def choose(self, model: nn.Module) -> list[nn.Parameter]:
        """Freeze what does not train, and return what does."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in self.trains))
        return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Given(rewire.LocalRule):
    """``B^T delta`` with a fixed B that is given, of the weight's shape: `fa` with feedback that is not random."""

    random = False
    uses_weight = False

    def __init__(self, B: Tensor) -> None:
        self._B = B

    def backward_weight(self, weight: Tensor | None, random: Tensor | None, scale: float) -> Tensor:
        return self._B


def weights_now(name: str, layer: nn.Module) -> Given:
    """For ``layers=``: each layer's feedback is its weight as it is now, and stays so while the weight is trained."""
    return Given(layer.get_parameter("weight").detach().clone())


@dataclass
class Cost:
    """CPU seconds of training, and the most memory (10⁶ bytes) it needed beyond what was there before."""

    seconds: float = 0.0
    memory: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    reset_peak()
    cost, before, began = Cost(), peak_mb() or 0.0, time.process_time()
    yield cost
    cost.seconds, cost.memory = time.process_time() - began, (peak_mb() or 0.0) - before


@dataclass(frozen=True)
class Probe:
    """The linear probe's head, weight (classes, F) and bias (classes,), and its accuracy on the held-out samples."""

    weight: Array
    bias: Array
    accuracy: float

    def start(self, head: nn.Linear) -> None:
        """Write it into the head of a model, to go on from there."""
        head.load_state_dict({"weight": torch.from_numpy(self.weight), "bias": torch.from_numpy(self.bias)})


def fit(head: nn.Linear, decay: float, x: Tensor, y: Tensor) -> None:
    """Multinomial logistic regression on features x (N, F), labels y (N,): mean cross-entropy + decay |W|² is least."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def fit_probe(classes: int, x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor) -> Probe:
    """A linear classifier of features, whose weight decay does best on a fifth of the samples it is not fitted to."""
    head, cut = nn.Linear(x.shape[1], classes), len(x) * 4 // 5

    def unfitted(decay: float) -> float:
        fit(head, decay, x[:cut], y[:cut])
        with torch.no_grad():
            return F.cross_entropy(head(x[cut:]), y[cut:]).item()

    fit(head, min((0.1, 0.03, 0.01, 0.003, 0.001, 0.0003), key=unfitted), x, y)
    with torch.no_grad():
        return Probe(head.weight.numpy(), head.bias.numpy(), accuracy(head(x_held), y_held))


def accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).float().mean().item() * 100


@dataclass(frozen=True)
class Job:
    """One run. All but ``files`` is written to the file of results, beside what came out."""

    method: str
    seed: int
    rate: float
    split: str  # "test" or "validation"
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def key(self) -> str:
        return json.dumps([self.method, self.seed, self.rate, self.split, self.settings], sort_keys=True)


T = TypeVar("T")


def _alone(function: Callable[..., T], *arguments: object) -> T:
    torch.set_num_threads(1)
    return function(*arguments)


def tabulate(title: str, results: list[dict[str, Any]]) -> Table:
    """Test accuracies, and their gain over the linear probe of the same seed: mean ± deviation over seeds."""
    out = Table(title=title)
    for column in ("method", "rate", "accuracy %", "over the probe", "CPU s", "MB"):
        out.add_column(column, justify="left" if column == "method" else "right")
    of: dict[str, list[dict[str, Any]]] = {}
    for each in results:
        of.setdefault(each["method"], []).append(each)

    def spread(values: list[float], sign: str = "") -> str:
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):{sign}.1f}{deviation}"

    if results:
        probes = {each["seed"]: each["probe"] for each in results}
        out.add_row("linear probe", "", spread(list(probes.values())), "", "", "")
    for method, runs in of.items():
        gains = [each["accuracy"] - each["probe"] for each in runs]
        # Beyond the spread: by more than two deviations, and not for one seed alone.
        beyond = " ✓" if len(gains) > 1 and statistics.fmean(gains) > 2 * statistics.stdev(gains) else ""
        seconds, memory = (f"{statistics.fmean(each[what] for each in runs):.0f}" for what in ("seconds", "memory"))
        rate = f"{runs[0]['rate']:g}"
        out.add_row(
            method, rate, spread([each["accuracy"] for each in runs]), spread(gains, "+") + beyond, seconds, memory
        )
    return out


def command(
    about: str,
    probe: Callable[[Job], Probe],
    finetune: Callable[[Job, Probe], dict[str, float]],  # to "accuracy" in per cent, "seconds" and "memory"
    methods: dict[str, Method],
    rates: list[float],
    results: str,
    options: argparse.ArgumentParser,
) -> None:
    """Run what is missing, write it down as it comes, print the table."""
    options.description, options.formatter_class = about, argparse.RawDescriptionHelpFormatter
    options.add_argument("--methods", nargs="*", default=list(methods), help=f"of: {'; '.join(methods)}")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rates", type=float, nargs="*", default=rates, help="learning rates to choose from")
    options.add_argument("--results", type=Path, default=BENCHMARKS / "results" / results)
    options.add_argument("--fresh", action="store_true", help="run again what is there")
    asked = vars(options.parse_args())
    chosen, seeds, rates, file, fresh = (asked.pop(name) for name in ("methods", "seeds", "rates", "results", "fresh"))
    for name in chosen:
        if name not in methods:
            options.error(f"no method {name!r}: {'; '.join(methods)}")
    sys.path.append(str(BENCHMARKS))
    from machine import machine

    torch.set_num_threads(1)
    files = {name: value for name, value in asked.items() if isinstance(value, Path)}
    settings = {name: value for name, value in asked.items() if name not in files and value is not None}
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() and not fresh else []
    fields = ("method", "seed", "rate", "split", "settings")
    done = {Job(*(line[name] for name in fields)).key(): line for line in lines}
    # Processes that start where this one is now, its modules loaded, and end after one run.
    start = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(start)
    file.parent.mkdir(parents=True, exist_ok=True)
    probes: dict[tuple[str, int], Probe] = {}
    console = Console()
    errors = Console(stderr=True)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:

        def run(job: Job) -> dict[str, Any]:
            if job.key() not in done:
                of = (job.split, job.seed)
                probes[of] = probes.get(of) or pool.submit(_alone, probe, job).result()
                outcome = pool.submit(_alone, finetune, job, probes[of]).result()
                about = {**{name: getattr(job, name) for name in fields}, "probe": probes[of].accuracy}
                done[job.key()] = {**about, **outcome, **machine("cpu")}
                with file.open("a") as out:
                    out.write(json.dumps(done[job.key()]) + "\n")
            return done[job.key()]

        best = {name: rates[0] for name in chosen}
        for name in track(chosen if len(rates) > 1 else [], "learning rates", console=errors):
            tried = [run(Job(name, VALIDATION, rate, "validation", settings, files)) for rate in rates]
            best[name] = max(tried, key=lambda each: each["accuracy"])["rate"]
        # Seed by seed, so that what is there when it is interrupted can be compared.
        jobs = [Job(name, seed, best[name], "test", settings, files) for seed in range(seeds) for name in chosen]
        outcomes = [run(job) for job in track(jobs, "runs", console=errors)]
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    order = {name: place for place, name in enumerate(chosen)}
    console.print(tabulate(title, sorted(outcomes, key=lambda each: order[each["method"]])))
