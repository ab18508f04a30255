"""The report of one folder of results as an HTML page."""

from __future__ import annotations

from pathlib import Path

from rewire import report


def write(folder: Path, *, out: Path | None = None) -> Path:
    """Write ``folder``'s report to ``out``, by default ``folder/report.html``, and return where it is.

    Raises:
        InputError: no results there, the file cannot be written, or the extra ``rewire[report]`` is missing.
    """
    return report.write([folder], out=out)
