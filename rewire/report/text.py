"""The table as CSV, one row per group and rule with every number in full, and the report as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from . import words
from .flags import flags, recorded
from .runs import count, environments
from .table import Report, Row, Spread, described, plain


def as_csv(report: Report) -> str:
    """A header and one row per rule of each group; cells that are not known are empty."""
    names = list(dict.fromkeys(name for group in report.groups for name in group.settings))
    out = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for group in report.groups:
        for row in group.rows:
            line = {name: plain(group.settings[name]) if name in group.settings else "" for name in names}
            line |= {"rule": row.rule, "options": " ".join(f"{k}={v}" for k, v in row.options.items())}
            line |= _numbers(report, row)
            if writer is None:
                writer = csv.DictWriter(out, fieldnames=list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)
    return out.getvalue()


def _numbers(report: Report, row: Row) -> dict[str, Any]:
    found = row.comparison
    trust = [words for moment in row.last for words in moment.flags]
    return {
        "seeds": len(row.outcomes),
        **{status: row.count(status) for status in ("done", "diverged", "failed")},
        **_spread(f"{report.metric}_percent", row.result),
        "baseline": report.baseline if found else "",
        "difference": found.difference if found else "",
        "low_95": _or_empty(found and found.low),
        "high_95": _or_empty(found and found.high),
        "p": _or_empty(found and found.p),
        "p_holm": _or_empty(found and found.corrected),
        "test": found.test if found else "",
        **_spread("gamma", row.gamma),
        "flags": "; ".join(dict.fromkeys(trust)),
        **{key: value for name in ("final_loss", "step_ms") for key, value in _spread(name, row.spread(name)).items()},
        "step_ratio": _or_empty((ratio := row.mean("step_ratio")) and ratio.mean),
        **{key: value for name in ("memory_mb", "seconds") for key, value in _spread(name, row.spread(name)).items()},
    }


def _spread(name: str, spread: Spread | None) -> dict[str, Any]:
    return {
        f"{name}_mean": _or_empty(spread and spread.mean),
        f"{name}_std": _or_empty(spread and spread.deviation),
        f"{name}_n": spread.n if spread else 0,
    }


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


def as_markdown(report: Report) -> str:
    """Tables, flags, failures and how to repeat it, for an issue or a notebook."""
    out = ["# Ablation report", ""]
    if report.common:
        out += [f"{_safe(described(report.common))}.", ""]
    out += [f"- {_safe(note)}." for note in report.notes]
    for group in report.groups:
        out += ["", f"## {_safe(group.title)}", ""]
        out += [f"- {_safe(sentence)}" for sentence in words.in_short(report, group)]
        compared, aligned = group.baseline is not None, recorded(group)
        head = ["rule", f"test {report.metric}, %", "seeds"]
        head += [f"difference to {report.baseline}", "p", "finding"] if compared else []
        head += ["alignment Γ"] if aligned else []
        lines = []
        for row in group.rows:
            ended = f" ({words.ended(row)})" if words.ended(row) else ""
            line = [row.label, words.shown(row.result, 2), words.seeds(row) + ended]
            if compared and row.comparison is not None:
                tested = f", {row.comparison.test}" if row.comparison.p is not None else ""
                line += [
                    words.difference(row.comparison),
                    words.p_value(row.comparison.corrected),
                    words.verdict(report, row.comparison) + tested,
                ]
            elif compared:
                line += [words.MISSING, words.MISSING, "baseline" if row.is_baseline else "no result"]
            if aligned:
                line.append(words.shown(row.gamma, 3) + (" (flagged)" if row.flagged else ""))
            line += [words.loss(row.spread("final_loss")), words.shown(row.mean("step_ratio"), 2)]
            line += [words.shown(row.spread("memory_mb"), 1), words.shown(row.spread("seconds"), 1)]
            lines.append(line)
        out += ["", *_table([*head, "final loss", "step time ÷ bp", "memory, MB", "seconds"], lines)]
    out += ["", words.how_tested(report)]

    found = [flag for group in report.groups for flag in flags(group)]
    if found:
        out += ["", "## Trust flags", ""]
        out += _table(
            ["setting", "rule", "what was found", "seeds", "first", "at the end"],
            [
                [
                    each.group.title,
                    each.row.label,
                    each.words,
                    f"{each.seeds} of {each.of}",
                    each.first,
                    f"still, in {count(each.at_end, 'seed')}" if each.at_end else "no longer",
                ]
                for each in found
            ],
        )
    trouble = [each for each in report.collected.outcomes if each.status != "done"]
    if trouble:
        out += ["", "## Failed and diverged", ""]
        out += _table(
            ["cell", "how it ended", "message"],
            [
                [described(each.cell), each.status, ((each.error or "").strip().splitlines() or [""])[-1]]
                for each in trouble
            ],
        )
    out += ["", "## To repeat it"]
    for run in report.collected.runs:
        out += ["", f"{_safe(run.name)}:", "", *_code(run.command or "(the command line was not kept)")]
    where = environments(report.collected.runs)
    if where:
        names = [run.name for run in report.collected.runs]
        out += ["", *_table(["", *names], [[name, *values] for name, values in where])]
    return "\n".join(out) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(each if each == "---" else _safe(each) for each in row) + " |" for row in rows]


def _code(text: str) -> list[str]:
    # Indented: no run of backticks in it can end it.
    return [f"    {line}" for line in text.splitlines()]


def _safe(text: str) -> str:
    """``text`` as text in Markdown: nothing in it is markup, a column or a new line."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())
