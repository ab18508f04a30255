"""``python -m tests.zoo``: every model in the list under every rule, each model in a process of its own.

Results are appended to a JSON-lines file as they come; a second run does what is missing (``--again`` all that
failed too), and writes ``docs/coverage.md`` from everything there is.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.zoo import models, report, worker

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("only", nargs="*", help="patterns of models, such as 'hf:*bert*'")
    parser.add_argument("--rules", default="fa dfa")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3000, help="limit for one model under one rule")
    parser.add_argument("--gigabytes", type=float, default=16, help="limit for one model")
    parser.add_argument("--again", action="store_true", help="also what failed before")
    parser.add_argument("--fresh", action="store_true", help="everything, whatever there is")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/zoo")
    parser.add_argument("--report", type=Path, default=ROOT / "docs/coverage.md")
    options = parser.parse_args()

    file = options.results / "results.jsonl"
    known = models.every(options.results / "timm-smallest.json")
    specs = [s for s in known if not options.only or any(fnmatch.fnmatch(s, p) for p in options.only)]
    rules = options.rules.split()
    rows = load(file)
    done = {key for key, row in rows.items() if not (options.fresh or (options.again and not row["ok"]))}
    todo = [(spec, [r for r in rules if (spec, r) not in done]) for spec in specs]
    todo = [(spec, missing) for spec, missing in todo if missing]

    worker.start()
    screen = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=screen)
    task = progress.add_task("zoo", total=sum(len(missing) for _, missing in todo))
    with progress, ThreadPoolExecutor(options.workers) as pool:
        running = [pool.submit(worker.run, spec, missing, options.seconds, options.gigabytes) for spec, missing in todo]
        try:
            for future in as_completed(running):
                for row in future.result():
                    rows[row["spec"], row["rule"]] = row
                    screen.print(line(row), highlight=False, soft_wrap=True)
                    progress.advance(task)
                save(file, rows, known)
        except KeyboardInterrupt:
            for future in running:
                future.cancel()
            raise
    save(file, rows, known)
    options.report.write_text(report.markdown(list(load(file).values()), known))
    failed = [row for row in rows.values() if not row["ok"] and row["spec"] in specs and not report.missing(row)]
    screen.print(f"{len(rows)} results in {file}, {len(failed)} not ok; {options.report} written", highlight=False)
    sys.exit(1 if failed else 0)


def load(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Results so far, the newest of each model and rule."""
    if not file.exists():
        return {}
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    return {(row["spec"], row["rule"]): row for row in rows}


def save(file: Path, rows: dict[tuple[str, str], dict[str, Any]], order: list[str]) -> None:
    """Write all results, in the order of the list, so that two runs give the same file."""
    place = {spec: i for i, spec in enumerate(order)}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        json.dumps(rows[key]) + "\n"
        for key in sorted(rows, key=lambda key: (place.get(key[0], len(place)), key[0], key[1]))
    )
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def line(row: dict[str, Any]) -> str:
    """One result for people."""
    state = "[green]ok  [/]" if row["ok"] else "[red]FAIL[/]"
    layers = ", ".join(f"{n} {status}" for status, n in row.get("layers", {}).items())
    problems = " | ".join(report.short(p) for p in row["problems"]).replace("[", "\\[")
    return f"{state} {row['spec']} {row['rule']}: {layers}{problems and ' — '}{problems}  {row.get('seconds', '')}"


if __name__ == "__main__":
    main()
