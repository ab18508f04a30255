"""Runs with made-up numbers, written in the layout of `rewire ablate`: `python -m tests.report.made_up FOLDER`."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RULES = ("bp", "fa", "usf", "dfa", "sdfa(layout=auto)", "fitted(every=100)", "shallow")
LAYERS = ("conv1", "conv2", "encoder.layers.0.attention.self.query", "fc1", "fc2", "head")
# How good, how fast, and how far from backprop each rule is made to be.
_NATURE = {"bp": (0.985, 1.0, 0), "fa": (0.978, 1.02, 55), "usf": (0.981, 0.98, 30), "dfa": (0.962, 0.71, 70)}


def cell(rule: str = "bp", seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "model": "mlp", "data": "digits", "rule": rule, "layers": {}, "blocks": [], "feedback": "dense",
        "skip": "keep", "scale": "auto", "optimizer": "adam", "lr": 0.002, "momentum": 0.0, "weight_decay": 0.0,
        "schedule": "constant", "epochs": 15, "batch_size": 32, "seed": seed,
    } | changes  # fmt: skip


def line(rule: str = "bp", seed: int = 0, *, every: int = 50, **changes: Any) -> dict[str, Any]:
    """A finished cell with curves and alignment that look like real ones; the same for the same arguments."""
    made = cell(rule, seed, **changes)
    chance = random.Random(json.dumps(made))
    best, ratio, angle = _NATURE.get(rule.split("(")[0], (0.93, 0.8, 82))
    if made["model"] == "cnn":
        best += 0.008
    best += chance.gauss(0, 0.0025)
    epochs = made["epochs"]
    history, loss = [], 2.3
    for epoch in range(1, epochs + 1):
        loss = 2.3 * math.exp(-(1.3 - (1 - best) * 8) * epoch**0.65) + (1 - best) * 0.3 + abs(chance.gauss(0, 0.002))
        accuracy = best - (best - 0.25) * math.exp(-0.9 * epoch**0.8) + chance.gauss(0, 0.003)
        history.append({"epoch": epoch, "loss": loss, "accuracy": accuracy, "seconds": 0.4 * ratio})
    return {
        "id": f"{made['model']}-{rule}-{seed}", "cell": made, "status": "done", "error": None,
        "accuracy": history[-1]["accuracy"], "final_loss": history[-1]["loss"], "history": history,
        "alignment": [moment(rule, angle, step, epochs, every, chance) for step in range(0, epochs * 45 + 1, every)],
        "step_ms": 1.9 * ratio + chance.gauss(0, 0.05), "step_ratio": ratio,
        "memory_mb": 310 * ratio, "seconds": 0.4 * ratio * epochs + chance.random(),
    }  # fmt: skip


def moment(rule: str, angle: float, step: int, epochs: int, every: int, chance: random.Random) -> dict[str, Any]:
    layers = {}
    for depth, name in enumerate(LAYERS):
        falling = angle + (88 - angle) * math.exp(-step / 120) if angle else 0.0
        here = falling * (1 - depth / (len(LAYERS) - 1)) ** 0.35 + (chance.gauss(0, 1.5) if angle else 0)
        layers[name] = {
            "rule": "bp" if name == "head" else rule, "weight_angle": max(here, 0.0) if name != "head" else 0.0,
            "input_angle": min(here + 5, 90) if angle else 0.0, "feedback_angle": 88.0 if rule == "fa" else None,
            "feedback_ratio": 1.0 if rule == "fa" else None, "activation_norm": 3.0 + step / 500,
            "norm": 0.2, "backprop_norm": 0.1, "null_angle": 89.5, "note": "",
        }  # fmt: skip
    flags = []
    if rule.startswith("sdfa") and step > 200:
        for name in LAYERS[:2]:
            layers[name] |= {"weight_angle": None, "note": "backprop's gradient is at the floor"}
        flags = [f"backprop's gradient is at the numeric floor: not measurable: conv1 (turns by {step}°), conv2"]
    elif angle and step == 0:
        flags = ["not distinguishable from chance: " + ", ".join(f"{each} (88.1°, by chance 89.5°)" for each in LAYERS)]
    if rule == "shallow":
        layers = {
            name: each | {"weight_angle": None if name != "head" else 0.0, "note": "no gradient arrives"}
            for name, each in layers.items()
        }
    known = [each["weight_angle"] for each in layers.values() if each["weight_angle"] is not None]
    gamma = sum(math.cos(math.radians(each)) for each in known) / len(known) if known else None
    return {"epoch": step / 45, "step": step, "gamma": gamma, "flags": flags, "layers": layers}


def failed(rule: str, seed: int, error: str, **changes: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("accuracy", "final_loss", "step_ms", "step_ratio", "memory_mb", "seconds"))
    made = cell(rule, seed, **changes)
    return {"id": "x", "cell": made, "status": "failed", "error": error, "history": [], "alignment": [], **empty}


def diverged(rule: str, seed: int, **changes: Any) -> dict[str, Any]:
    made = line(rule, seed, **changes)
    kept = [{**each, "loss": each["loss"] * 3 ** each["epoch"]} for each in made["history"][:4]]
    kept.append({"epoch": 5, "loss": None, "accuracy": 0.1, "seconds": 0.4})
    return made | {"status": "diverged", "history": kept, "accuracy": 0.1, "final_loss": None}


def write(folder: Path, lines: Iterable[dict[str, Any]], *, torn: str = "", **about: Any) -> Path:
    folder.mkdir(parents=True)
    run = {
        "version": "0.1.0", "started": "2026-01-31T12:00:00+00:00", "baseline": "bp",
        "command": "rewire ablate --model 'mlp cnn' --rules 'bp fa usf dfa' --seeds 5",
        "grid": {"models": ["mlp", "cnn"], "rules": list(RULES), "seeds": [0, 1, 2, 3, 4], "lr": 0.002},
        "environment": {"torch": "2.13.0", "python": "3.11.2", "platform": "Linux", "cpu": "some CPU", "threads": 1,
                        "rewire": "0.1.0"},
    } | about  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + torn)
    return folder


def grid(seeds: int = 5) -> list[dict[str, Any]]:
    """Two models, seven rules; one cell failed, one diverged."""
    lines = [line(rule, seed, model=model) for model in ("mlp", "cnn") for rule in RULES for seed in range(seeds)]
    place = {(each["cell"]["model"], each["cell"]["rule"], each["cell"]["seed"]): i for i, each in enumerate(lines)}
    lines[place["cnn", "sdfa(layout=auto)", 1]] = diverged("sdfa(layout=auto)", 1, model="cnn")
    error = 'Traceback (most recent call last):\n  File "x.py", line 1\nRuntimeError: <script>alert(1)</script> & more'
    lines[place["cnn", "dfa", 1]] = failed("dfa", 1, error, model="cnn")
    return lines


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), grid(), torn='{"id": "cut'))
