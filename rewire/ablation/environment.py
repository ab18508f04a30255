"""What numbers depend on beside the grid: versions, machine, threads."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any

import torch

import rewire


def environment(threads: int) -> dict[str, Any]:
    """For ``run.json``: ready for JSON."""
    return {
        "rewire": rewire.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": cores(),
        "threads": threads,
        "git": _commit(),
    }


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, "") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the current directory, with a "+" if files differ from it; None outside of a repository."""
    try:
        said = [
            subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] + ("+" if said[1] else "")
