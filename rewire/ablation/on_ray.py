"""Units done by a Ray cluster: ``pip install 'rewire[ray]'``.

Ray schedules; this file only hands units over and takes outcomes back. ``RAY_ADDRESS`` says which cluster; without it
Ray starts one on this machine. Checkpoints are kept in the run's folder where workers see it (a shared disk); a worker
that does not starts its cell anew, and gives the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from rewire.errors import RewireError
from rewire.specs.libraries import library

from . import files
from .work import Outcome, Unit, do, failed

_TICK = 0.5


def outcomes(units: Sequence[Unit], *, threads: int, count: int | None = None) -> Iterator[Outcome | None]:
    """The outcome of each unit as it is done, in whatever order; None now and then, so that a caller can look around.

    Args:
        count: of CPU cores for a cluster that is started here.
        threads: of torch in each task, and CPU cores that Ray gives it.

    Raises:
        InputError: Ray cannot be imported.
        RewireError: it cannot be started or reached.
        StorageError: the disk takes no more.
    """
    ray = library("ray")
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        alone = {"num_cpus": max(count or 1, threads), "include_dashboard": False} if address is None else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **alone)
        except Exception as error:  # Ray raises plain exceptions here
            raise RewireError(f"Ray cannot be started or reached: {error}") from error
    try:
        # What the system kills is tried once more, as by workers of our own.
        remote = ray.remote(num_cpus=threads, max_retries=1)(_task)
        tasks = {remote.remote(unit, threads, os.getcwd()): unit for unit in units}
        while tasks:
            ready, _ = ray.wait(list(tasks), num_returns=1, timeout=_TICK)
            for task in ready:
                unit = tasks.pop(task)
                yield _taken(ray, task, unit)
            yield None
    finally:
        if started:
            ray.shutdown()


def _taken(ray: Any, task: Any, unit: Unit) -> Outcome:
    try:
        said: Outcome | str = ray.get(task)
    except ray.exceptions.RayError as error:
        lines = str(error).splitlines() or [""]
        return failed(unit, f"{type(error).__name__}: {lines[0]}")
    if isinstance(said, str):
        raise files.StorageError(said)
    return said


def _task(unit: Unit, threads: int, directory: str) -> Outcome | str:
    """In a worker of the cluster. A disk that takes no more is a word, not an error that Ray would wrap."""
    import torch

    torch.set_num_threads(threads)
    if os.path.isdir(directory):
        os.chdir(directory)  # modules and files of the user's own are named from there
    try:
        return do(unit)
    except files.StorageError as error:
        return str(error)
