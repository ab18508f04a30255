"""Runs that are kept as JSON lines, so that a command that is called again goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track

Run = dict[str, object]


def completed(
    path: Path,
    wanted: Iterable[dict[str, object]],
    run: Callable[[dict[str, object]], Run],
    *,
    fresh: bool = False,
    title: str = "",
) -> list[Run]:
    """A run for each of ``wanted``, in their order: out of the file, or else run now and added to it.

    Args:
        path: the file; made if it is not there.
        wanted: what identifies each run; its line in the file has all of that in it.
        run: what a run found, without what identifies it.
        fresh: run all again. Of several lines for one run the last one counts.
    """
    wanted = list(wanted)
    lines = path.read_text().splitlines() if path.exists() and not fresh else []
    before: list[Run] = [json.loads(line) for line in lines]

    def kept(one: dict[str, object]) -> Run | None:
        return next((each for each in reversed(before) if all(each.get(k) == one[k] for k in one)), None)

    missing = [one for one in wanted if kept(one) is None]
    for one in track(missing, title, console=Console(stderr=True), disable=not missing):
        before.append({**one, **run(one)})
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(before[-1]) + "\n")
    found = [kept(one) for one in wanted]
    assert all(each is not None for each in found)
    return [each for each in found if each is not None]
