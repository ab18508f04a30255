"""Step time of converted models as a ratio to plain backprop of the same model.

    python benchmarks/step_time.py                                  # everything; about an hour on two cores
    python benchmarks/step_time.py --quick                          # the 2048-wide MLP at batch 1 and 256
    python benchmarks/step_time.py --models vit-tiny --rules dfa fa --modes compiled
    python benchmarks/step_time.py --read benchmarks/results/step_time-cpu.json --markdown

A step is zeroing the gradients, forward, loss and backward; the optimizer, which is the same for all, is left
out. Each model runs in a process of its own. There each contender takes turns with backprop on the same batch; a
figure is the median over turns of the ratio within a turn, with the quartiles behind it. Compiled contenders are
compared with compiled backprop. Other libraries are timed beside, if they are installed, and what there is to gain
at all (by hand, see peers.py).

Everything is also written to benchmarks/results/step_time-DEVICE.json, with the machine, versions and thread count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
from machine import machine, no_gpu, one_line
from models import CASES
from report import show

import rewire

RULES = ("fa", "frsf", "brsf", "dfa")
MODES = ("eager", "compiled")
SWEPT, BATCHES = "mlp-2048", (1, 2, 8, 64, 1024)  # besides its ordinary batch
HERE = Path(__file__).parent

Job = tuple[str, int, str]  # model, batch, mode


def jobs(options: argparse.Namespace) -> list[Job]:
    """What to run, each in a process of its own."""
    if options.quick:
        return [(SWEPT, batch, "eager") for batch in options.batches or (1, CASES[SWEPT].batch)]
    chosen = options.models or list(CASES)
    found = [
        (model, batch, mode)
        for mode in options.modes
        for model in chosen
        for batch in options.batches or [CASES[model].batch]
    ]
    if not options.batches and SWEPT in chosen and "eager" in options.modes:
        found += [(SWEPT, batch, "eager") for batch in BATCHES]
    return found


def run(job: Job, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One job's result; if its process dies, every contender fails with what it said last."""
    model, batch, mode = job
    who = list(options.rules)
    if mode == "eager" and options.peers and batch == CASES[model].batch:
        who += peers.names()
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "one_model.py"), model, "--batch", str(batch), "--out", str(out)]
    command += ["--seconds", str(options.seconds), "--least", str(options.least), "--device", options.device]
    command += ["--compile-mode", options.compile_mode] if mode == "compiled" else []
    command += ["--threads", str(options.threads)] if options.threads else []
    ended = subprocess.run([*command, "--who", *who], stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode == 0 and out.exists():
        return json.loads(out.read_text())
    last = ended.stderr.strip().splitlines()[-1:] or ["no message"]
    reason = f"its process ended with {ended.returncode}: {last[0][:160]}"
    fails = dict.fromkeys(("backprop", *who), reason)
    found = {"reference_seconds": None, "contenders": {}, "fails": fails, "died": True}
    return {"model": model, "batch": batch, "mode": mode, "feedback": CASES[model].feedback, **found}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the 2048-wide MLP at batch 1 and 256, eager, no peers")
    parser.add_argument("--models", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--rules", nargs="+", help=f"rule or rule/feedback; default: {' '.join(RULES)}")
    parser.add_argument("--batches", nargs="+", type=int, help=f"default: each model's own; {SWEPT}: {BATCHES} too")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--compile-mode", default="default", help="of torch.compile, such as reduce-overhead")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave other libraries out")
    parser.add_argument("--seconds", type=float, help="of measuring per model (default 40; with --quick 15)")
    parser.add_argument("--least", type=int, default=7, help="fewest turns of each contender (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--markdown", action="store_true", help="print Markdown in place of drawn tables")
    parser.add_argument("--read", type=Path, help="print an earlier file of results; nothing is measured")
    parser.add_argument("--out", type=Path, help="where to write results")
    options = parser.parse_args()
    for rule in options.rules or ():
        if rule.partition("/")[0] not in rewire.rules():
            parser.error(f"no rule {rule!r}: {', '.join(rewire.rules())}; a structure of feedback after a slash")
    options.rules = options.rules or (("fa", "frsf", "dfa") if options.quick else RULES)
    options.seconds = options.seconds or (15.0 if options.quick else 40.0)
    options.peers = options.peers and not options.quick
    return options


def main() -> int:
    options = arguments()
    if options.read:
        found = json.loads(options.read.read_text())
        show(found["lines"], found["machine"], options.markdown)
        return 0
    if reason := no_gpu(options.device):
        print(reason)
        return 0
    about = machine(options.device)
    if options.threads:
        about["threads"] = options.threads
    print(one_line(about), file=sys.stderr)
    todo, lines = jobs(options), []
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(todo, 1):
            print(f"{number}/{len(todo)}  {job[0]}, batch {job[1]}, {job[2]}", file=sys.stderr, flush=True)
            line = run(job, options, Path(folder))
            line.pop("machine", None)
            lines.append(line)
    show(lines, about, options.markdown)
    name = f"step_time-{options.device.replace(':', '')}{'-quick' if options.quick else ''}.json"
    out = options.out or HERE / "results" / name
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"machine": about, "lines": lines}, indent=1) + "\n")
    print(f"written to {out}", file=sys.stderr)
    return 1 if any(line.get("died") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
