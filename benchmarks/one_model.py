"""Times one model under several contenders, in a process of its own, and writes one JSON object.

    python benchmarks/one_model.py mlp-2048 --batch 256 --who fa dfa dfa/channel biotorch:dfa

``step_time.py`` starts this once per model, batch size and mode, so that no model meets the memory or the threads that
another left behind. A contender is a rule, with a structure of feedback behind a slash if it is not the model's own, or
``library:rule`` for another library.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peers
import torch
from machine import clean, machine, no_gpu
from models import CASES, Case, loss_of
from paired import Step, clock_for, paired
from torch import Tensor, nn

import rewire

WARM_UP = 3


def make_step(who: str, base: nn.Module, case: Case, x: Tensor, y: Tensor, compile_mode: str | None) -> Step:
    """A training step without the optimizer, which is the same for all: zero the gradients, forward, loss, backward."""
    model = copy.deepcopy(base)
    library, _, rule = who.rpartition(":")
    if library:
        loss = peers.loss_under(library, rule, model, case)
    else:
        run: nn.Module = model
        if rule != "backprop":
            name, _, feedback = rule.partition("/")
            rewire.convert(model, name, feedback=feedback or case.feedback)
        if compile_mode is not None:
            # Scales are measured and roles found in eager mode, before anything is traced.
            for _ in range(2 if rule != "backprop" else 0):
                loss_of(model(x), y).backward()
            run = torch.compile(model, fullgraph=True, mode=compile_mode)  # type: ignore[assignment]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return loss_of(run(x), y)

    def step() -> None:
        model.zero_grad()
        loss(x, y).backward()

    return step


def measure(
    case: Case,
    who: list[str],
    *,
    batch: int,
    seconds: float,
    least: int,
    device: str,
    compile_mode: str | None = None,
) -> dict[str, Any]:
    """Ratios of all contenders that run, and why the others do not."""
    torch.manual_seed(0)
    base = case.make().to(device)
    x, y = case.data(batch, device)
    steps: dict[str, Step] = {}
    fails: dict[str, str] = {}
    for name in ("backprop", *who):
        library = name.rpartition(":")[0]
        if library and not peers.installed(library):
            fails[name] = "not installed"
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # BioTorch and TinyDFA print while they convert
                step = make_step(name, base, case, x, y, compile_mode)
                for _ in range(WARM_UP):
                    step()
        except Exception as error:  # whatever another library or a compiler raises is a result
            fails[name] = clean(error)
        else:
            steps[name] = step
    found: dict[str, Any] = {"reference_seconds": None, "contenders": {}}
    reference = steps.pop("backprop", None)
    if reference is not None and steps:
        gc.collect()
        found = paired(steps, reference, seconds, least=least, clock=clock_for(device))
    return {**found, "fails": fails}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CASES)
    parser.add_argument("--batch", type=int, help="default: the model's own")
    parser.add_argument("--who", nargs="+", default=["fa", "dfa"])
    parser.add_argument("--compile-mode", help="compile all: default, reduce-overhead or max-autotune")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--least", type=int, default=5, help="fewest turns of each contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--out", type=Path, help="a file for the result, in place of standard output")
    options = parser.parse_args()
    if reason := no_gpu(options.device):
        sys.exit(reason)
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)  # BioTorch
    if options.compile_mode:
        # Several models share the code of their forwards.
        torch._dynamo.config.recompile_limit = 64
    case = CASES[options.model]
    batch = options.batch or case.batch
    result = {
        "model": options.model,
        "batch": batch,
        "mode": "compiled" if options.compile_mode else "eager",
        "feedback": case.feedback,
        "machine": machine(options.device),
        **measure(
            case,
            options.who,
            batch=batch,
            seconds=options.seconds,
            least=options.least,
            device=options.device,
            compile_mode=options.compile_mode,
        ),
    }
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
