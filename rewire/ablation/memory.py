"""The most memory the process has had resident."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Let :func:`peak_mb` count from now, where the system can; elsewhere it counts from the process's start."""
    with contextlib.suppress(OSError):
        _RESET.write_text("5")


def peak_mb() -> float | None:
    """Peak resident memory in MB (10⁶ bytes), PyTorch itself included; None where the system does not say."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
