"""How numbers and findings are put, the same on the page, in Markdown and in CSV."""

from __future__ import annotations

from collections.abc import Sequence

from .compare import Comparison
from .table import Group, Report, Row, Spread

MISSING = "–"
NBSP = "\u00a0"


def shown(spread: Spread | None, digits: int) -> str:
    """``mean ± deviation`` or ``–``."""
    return MISSING if spread is None else spread.text(digits).replace("-", "−")


def loss(spread: Spread | None) -> str:
    """A loss may be 0.0004 or 1e30: enough digits to tell losses apart, and as many of the deviation."""
    if spread is None:
        return MISSING
    if 1e-4 <= spread.mean < 1e4:
        return spread.text(5 if spread.mean < 1e-3 else 4 if spread.mean < 1 else 3 if spread.mean < 100 else 1)
    return f"{spread.mean:.2e}" + ("" if spread.deviation is None else f" ± {spread.deviation:.1e}")


def difference(comparison: Comparison) -> str:
    """In percentage points, with its confidence interval where there is one."""
    return " ".join(part for part in (signed(comparison.difference), interval(comparison)) if part)


def interval(comparison: Comparison) -> str:
    """``[−1.49, −0.56]``, or nothing."""
    if comparison.low is None or comparison.high is None:
        return ""
    return f"[{signed(comparison.low)}, {signed(comparison.high)}]"


def signed(value: float) -> str:
    """With a sign and a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def p_value(p: float | None) -> str:
    """To two significant digits, never as 0."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def verdict(report: Report, comparison: Comparison) -> str:
    """``better``, ``worse``, ``no clear difference`` or why there is no test."""
    if comparison.p is None:
        return comparison.test
    if not comparison.clear:
        return "no clear difference"
    return "better" if (comparison.difference > 0) == (report.metric == "accuracy") else "worse"


def seeds(row: Row) -> str:
    """``3``, or ``2 of 3`` where a seed has no result."""
    return str(len(row.values)) if len(row.values) == len(row.outcomes) else f"{len(row.values)} of {len(row.outcomes)}"


def ended(row: Row) -> str:
    """``1 diverged, 2 failed``, or nothing."""
    return ", ".join(f"{row.count(status)} {status}" for status in ("diverged", "failed") if row.count(status))


def in_short(report: Report, group: Group) -> list[str]:
    """The table of ``group`` in sentences."""
    measured = [(row, row.result) for row in group.rows if row.result is not None]
    if not measured:
        return ["No cell gave a result."]
    sign = 1 if report.metric == "accuracy" else -1
    best, result = max(measured, key=lambda each: sign * each[1].mean)
    superlative = "Highest" if sign == 1 else "Lowest"
    number = f"{result.text(2)} %".replace(" ", NBSP)  # stays on one line
    sentences = [f"{superlative} mean {report.metric}: {best.label}, {number}."]
    found: dict[str, list[str]] = {}
    for row in group.rows:
        if row.comparison is not None:
            found.setdefault(verdict(report, row.comparison), []).append(row.label)
    for words, start in (
        ("better", f"Clearly better than {report.baseline}:"),
        ("no clear difference", f"No clear difference to {report.baseline}:"),
        ("worse", f"Clearly worse than {report.baseline}:"),
        ("too few seeds", f"Too few seeds to test against {report.baseline}:"),
    ):
        if words in found:
            sentences.append(f"{start} {_listed(found[words])}.")
    stopped = [f"{row.label} ({ended(row)})" for row in group.rows if ended(row)]
    if stopped:
        sentences.append(f"Not every seed went to the end: {_listed(stopped)}.")
    flagged = [row.label for row in group.rows if row.flagged]
    if flagged:
        sentences.append(f"Alignment not to be trusted as it stands: {_listed(flagged)}.")
    return sentences


def how_tested(report: Report) -> str:
    """What stands behind the p-values, in one or two sentences."""
    if not report.tests:
        return (
            "Nothing was tested: a test needs results of at least three seeds of a rule and of the baseline, of which "
            "none diverged and not all are the same."
        )
    several = f", corrected for the {report.tests} comparisons of this report (Holm)" if report.tests > 1 else ""
    return (
        f"Difference: mean of the rule minus mean of {report.baseline}, in percentage points, with its 95 % confidence "
        f"interval (not corrected). p: two-sided t-test, paired by seed where at least three seeds match, else "
        f"Welch's{several}. “Better” and “worse” mean p below 0.05; no clear difference does not mean equal."
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
