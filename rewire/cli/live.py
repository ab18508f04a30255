"""What ``rewire train`` shows while it trains: a table that grows by a line per epoch, and a bar below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rewire.ablation.cell import Epoch
from rewire.ablation.progress import Listener


class Screen(Listener):
    """On a terminal a live table; elsewhere a line per epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.table = Table()
        for name in ("epoch", "loss", "test accuracy %", "Γ", "seconds"):
            self.table.add_column(name, justify="right")
        self.table.add_column("flags")
        self.bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("", total=None, loss=float("nan"))
        self.live = Live(Group(self.table, self.bar), console=console, refresh_per_second=4)

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bar.update(self.task, visible=False)
            self.live.stop()

    def began(self, history: Sequence[Epoch], alignment: Sequence[Mapping[str, Any]]) -> None:
        measured = {each["epoch"]: each for each in alignment}
        for epoch in history:
            self.epoch(epoch, measured.get(epoch.epoch))

    def step(self, done: int, total: int, loss: float) -> None:
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, total=total, loss=loss)

    def epoch(self, epoch: Epoch, alignment: Mapping[str, Any] | None) -> None:
        gamma = None if alignment is None else alignment.get("gamma")
        cells = (
            str(epoch.epoch),
            f"{epoch.loss:.4f}",
            f"{100 * epoch.accuracy:.2f}",
            "" if alignment is None else "–" if gamma is None else f"{gamma:.3f}",
            f"{epoch.seconds:.1f}",
            "" if alignment is None else "; ".join(alignment.get("flags", ())),
        )
        if self.console.is_terminal:
            self.table.add_row(*map(Text, cells))  # flags name layers and errors, which are not ours
            return
        aligned = f"  Γ {cells[3]}" if cells[3] else ""
        self.console.print(
            f"epoch {cells[0]}  loss {cells[1]}  test {cells[2]} %{aligned}  {cells[4]} s  {cells[5]}".rstrip(),
            highlight=False,
            soft_wrap=True,
            markup=False,
            emoji=False,
        )
