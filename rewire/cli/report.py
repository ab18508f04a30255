"""``rewire report``: what an ablation gave, as a page, Markdown or CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from rewire.report import render, write


@click.command(epilog="Example: rewire report runs/2026-01-31T12-00-00 --baseline bp --out report.html")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The file to write, - for standard output.  [default: report.html in the first RUN]",
)
@click.option("--baseline", help="The rule others are compared with.  [default: what the runs name, else bp]")
@click.option("--format", "kind", help="html, csv or markdown.  [default: as --out ends, else html]")
@click.option("--metric", default="accuracy", show_default=True, help="Of the test set: accuracy or error.")
def report(runs: Sequence[Path], out: Path | None, baseline: str | None, kind: str | None, metric: str) -> None:
    """Write one self-contained report of all RUNS together, folders that rewire ablate made.

    Means, deviations and significance over seeds, training curves, alignment and whether it can be believed, cost,
    what failed, and how to repeat it. The page needs no network. A cell that several runs have counts once.
    """
    if out is not None and str(out) == "-":
        click.echo(render(runs, format=kind or "html", baseline=baseline, metric=metric), nl=False)
        return
    click.echo(f"Report: {write(runs, out=out, format=kind, baseline=baseline, metric=metric)}")
