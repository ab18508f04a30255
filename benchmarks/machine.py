"""What figures depend on: the machine, versions, threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import rewire


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, object]:
    """Everything that goes beside the figures in a file of results."""
    gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if gpu else processor(),
        **({"cuda": torch.version.cuda} if gpu else {}),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rewire": rewire.__version__,
    }


def one_line(about: dict[str, object]) -> str:
    """The same for people."""
    return (
        f"{about['device']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
        f"Python {about['python']}, rewire {about['rewire']}"
    )


def no_gpu(device: str) -> str | None:
    """Why ``device`` cannot be used, or None if it can."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"no GPU here: --device {device} needs one (torch {torch.__version__})"
    return None


def clean(error: Exception, most: int = 160) -> str:
    """An error's kind and first line, without paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = [word if word.count("/") < 2 else "..." for word in (lines[0] if lines else "").split()]
    text = f"{type(error).__name__}: {' '.join(words)}"
    return text if len(text) <= most else text[: most - 1] + "…"
