"""Two processes that train together, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds: a machine may be busy with other things
# What a process says whose work was done: before Python 3.14 a thread of gloo's that waits to let go of a tensor while
# Python shuts down is ended in a way that C++ does not allow. A barrier at the end makes it rare, no more. And a
# DistributedDataParallel that is the last to hold its process group waits for that thread for good: it goes before.
ABORTED = "terminate called without an active exception"


def environment(**more):
    """Of another process: it finds this package and these tests, and runs on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}


def run_ranks(folder, *command):
    """Run ``python *command RANK FOLDER`` for ranks 0 and 1 at a time.

    They meet at ``file://FOLDER/store``: a port that was free a moment ago may be somebody else's by now.

    Returns:
        What each has saved as ``FOLDER/rankRANK.pt``.
    """
    env = environment()
    line = [sys.executable, *command]
    jobs = [
        subprocess.Popen([*line, str(rank), str(folder)], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for job in jobs:
            _, said = job.communicate(timeout=PATIENCE)
            assert job.returncode == 0, said[-4000:]
    finally:
        for job in jobs:
            job.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
