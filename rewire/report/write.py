"""Results in, one file out."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rewire.ablation.inputs import one_of
from rewire.errors import InputError

FORMATS = {"html": "html", "csv": "csv", "markdown": "md"}
_SUFFIXES = {".html": "html", ".htm": "html", ".csv": "csv", ".md": "markdown", ".markdown": "markdown"}
_NEEDED = ("jinja2", "scipy", "statsmodels")


def format_of(out: Path | None, given: str | None = None) -> str:
    """The format to write: the one ``given``, else what the suffix of ``out`` says, else HTML.

    Raises:
        InputError: there is no such format, or the suffix is that of another.
    """
    if given is not None:
        one_of("format", given, FORMATS)
    said = None if out is None else _SUFFIXES.get(out.suffix.lower())
    if given is not None and said is not None and given != said:
        raise InputError(f"{out} is a name of {said}, not {given}: leave the format out, or name another file")
    return given or said or "html"


def render(
    folders: Sequence[Path], *, format: str = "html", baseline: str | None = None, metric: str = "accuracy"
) -> str:
    """The report of all ``folders`` together, as text.

    Raises:
        InputError: no results, no such format, metric or baseline, or the extra ``rewire[report]`` is missing.
    """
    one_of("format", format, FORMATS)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"reports need {' and '.join(missing)}: pip install 'rewire[report]'")
    # Here, as training should not need what only reports do.
    from . import page, text
    from .runs import read
    from .table import build

    report = build(read(folders), baseline=baseline, metric=metric)
    return {"html": page.page, "csv": text.as_csv, "markdown": text.as_markdown}[format](report)


def write(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    format: str | None = None,
    baseline: str | None = None,
    metric: str = "accuracy",
) -> Path:
    """:func:`render` into a file, by default ``report.html`` (``.csv``, ``.md``) in the first folder.

    The format is what the file's name ends with, unless it is given. The file is there complete or not at all.

    Raises:
        InputError: as for :func:`render`, or the file cannot be written.
    """
    format = format_of(out, format)
    text = render(folders, format=format, baseline=baseline, metric=metric)
    place = folders[0] / f"report.{FORMATS[format]}" if out is None else out
    try:
        _replace(place, text)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror}") from error
    return place


def _replace(place: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        # A temporary file is for its owner alone; a report is for whom other files are.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise
