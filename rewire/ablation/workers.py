"""Units done by processes of this machine.

Each worker is a fresh process (``spawn``: torch's threads do not survive a fork) that lives as long as this one. One
that the system kills takes one unit with it, which is given to another worker once, and goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from . import files
from .work import Outcome, Unit, do, failed

_TICK = 0.5  # seconds between looks at the progress bar
_spawn = multiprocessing.get_context("spawn")


def outcomes(units: Sequence[Unit], *, count: int, threads: int) -> Iterator[Outcome | None]:
    """The outcome of each unit as it is done, in whatever order; None now and then, so that a caller can look around.

    Args:
        count: of workers.
        threads: of torch in each.

    Raises:
        StorageError: the disk takes no more.
    """
    waiting = deque(units)
    tries: dict[Unit, int] = {}
    workers = [_Worker(threads) for _ in range(min(count, len(units)))]
    try:
        while waiting or any(worker.unit is not None for worker in workers):
            for worker in workers:
                if worker.unit is None and waiting:
                    worker.give(waiting.popleft())
            busy = [worker for worker in workers if worker.unit is not None]
            ready = wait([worker.pipe for worker in busy], timeout=_TICK)
            for i, worker in enumerate(workers):
                if worker.pipe not in ready:
                    continue
                said = worker.take()
                if isinstance(said, files.StorageError):
                    raise said
                if isinstance(said, Outcome):
                    yield said
                    continue
                unit = worker.unit
                assert unit is not None
                reason = worker.ended()
                workers[i] = _Worker(threads)
                tries[unit] = tries.get(unit, 0) + 1
                if tries[unit] < 2:
                    waiting.appendleft(unit)
                else:
                    yield failed(unit, f"its process was ended twice, {reason}")
            yield None
    finally:
        for worker in workers:
            worker.stop()


@dataclass(frozen=True)
class _Died:
    pass


class _Worker:
    def __init__(self, threads: int) -> None:
        self.pipe, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=_serve, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that its end of the pipe closes with it
        self.unit: Unit | None = None

    def give(self, unit: Unit) -> None:
        self.unit = unit
        with contextlib.suppress(OSError):  # it died before; reading says so
            self.pipe.send(unit)

    def take(self) -> Outcome | files.StorageError | _Died:
        try:
            said: Outcome | files.StorageError = self.pipe.recv()
        except (EOFError, OSError):
            return _Died()
        self.unit = None
        return said

    def ended(self) -> str:
        """How, in words."""
        self.process.join(5)
        self.stop()
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def stop(self) -> None:
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()  # files are replaced as a whole: there is nothing to tidy up
        self.process.join()


def _serve(pipe: Connection[Any, Any], threads: int) -> None:
    """What a worker does until there is nobody left to work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()

    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            unit: Unit = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            said: Outcome | files.StorageError = do(unit)
        except files.StorageError as error:
            said = error
        except Exception as error:
            said = failed(unit, f"{type(error).__name__}: {error}")
        pipe.send(said)


def _leave_with(parent: int) -> None:
    """Leave when the process that started this one is gone, in the middle of whatever is being done."""
    wait([parent])
    os._exit(1)
