"""``docs/coverage.md`` from the results."""

from __future__ import annotations

from collections import Counter
from typing import Any

NAMES = {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}


def markdown(rows: list[dict[str, Any]], known: list[str]) -> str:
    """The page: counts per library and rule, exceptions with their reason, what stays on backprop.

    Args:
        rows: results.
        known: every model in the list; those without a result are counted.
    """
    rules = sorted({row["rule"] for row in rows}, key=lambda rule: (rule != "fa", rule))
    tried = [row for row in rows if not missing(row)]
    lines = [
        "# Coverage",
        "",
        "Written by `make zoo` from [its results](../benchmarks/results/zoo/results.jsonl); not by hand.",
        "",
        'Each model has random weights and is converted with `feedback="channel"`. It passes if',
        "",
        "- `convert` leaves the state dict and the forward in eval mode bit for bit as they were,",
        "- after two training passes every parameter that backprop reaches in an unconverted copy has a finite",
        "  gradient,",
        "- `rewire.verify` finds no layer dead, unrouted or wrong,",
        "- an optimizer step changes it, and `restore` gives back every class, leaves no attribute or hook, and",
        "  forward and state dict are bit for bit those of an unconverted copy with the same weights.",
        "",
        "torchvision: everything below 100 million parameters that can be trained. timm: the smallest model of each",
        "of its files. transformers: tiny configurations.",
        "",
        "| | " + " | ".join(rules) + " |",
        "|---|" + "---|" * len(rules),
    ]
    for source, name in NAMES.items():
        cells = []
        for rule in rules:
            mine = [row for row in tried if row["rule"] == rule and row["spec"].startswith(f"{source}:")]
            cells.append(f"{sum(row['ok'] for row in mine)} of {len(mine)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if waiting := len(set(known) - {row["spec"] for row in rows}):
        lines += ["", f"{waiting} of {len(known)} models have not been run yet."]
    lines += ["", "## Exceptions", ""]
    failed = [row for row in tried if not row["ok"]]
    lines += [
        f"- `{row['spec']}` under `{row['rule']}`: {'; '.join(short(p) for p in row['problems'])}" for row in failed
    ]
    lines += ["None."] if not failed else []
    skipped = {row["spec"]: row for row in rows if missing(row)}
    if skipped:
        lines += [
            "",
            "Not tried, because the compiled operations of torchvision that they need are not in the build used: "
            + ", ".join(f"`{spec}`" for spec in skipped)
            + ".",
        ]
    lines += ["", "## What stays on backprop", ""]
    lines += [
        "Modules with weights that no rule was applied to, by kind; elementwise ones (norms, scales) are left out."
    ]
    kept: Counter[str] = Counter()
    places: dict[str, set[str]] = {}
    for row in tried:
        if row["rule"] == rules[0]:
            for kind, count in row.get("on_backprop", {}).items():
                kept[_kind(kind)] += count
                places.setdefault(_kind(kind), set()).add(row["spec"])
    lines += ["", "| module | why | how many | in models |", "|---|---|---|---|"]
    for kind, count in sorted(kept.items(), key=lambda item: (-item[1], item[0])):
        module, _, why = kind.partition(": ")
        where = sorted(places[kind])
        shown = ", ".join(f"`{spec}`" for spec in where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        lines.append(f"| {module} | {why} | {count} | {shown} |")
    zero = [row for row in tried if row.get("zero")]
    if zero:
        lines += [
            "",
            "## Gradients of exactly zero",
            "",
            "Parameters whose gradient is zero under the rule but not under backprop. Such a model passes.",
            "",
        ]
        lines += [
            f"- `{row['spec']}` under `{row['rule']}`: {len(row['zero'])}, such as `{row['zero'][0]}`" for row in zero
        ]
    return "\n".join(lines) + "\n"


def missing(row: dict[str, Any]) -> bool:
    """Whether the model could not even be built here, for want of compiled operations."""
    return any("custom C++ ops" in p or "torchvision::" in p for p in row["problems"])


def short(problem: str, most: int = 220) -> str:
    """The start of a message, on one line."""
    text = " ".join(problem.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _kind(text: str) -> str:
    """The reason without the name of one layer."""
    return text.split(" '")[0] + (" …" if " '" in text else "")
