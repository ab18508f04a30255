"""The example that ``torchrun`` starts: two processes, under either wrapper, train the model that one does."""

import subprocess
import sys

import pytest

from ..ranks import ABORTED, PATIENCE, ROOT, environment


def accuracy(how, processes, rule="dfa"):
    """What ``examples/train_parallel.py`` says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    for _ in range(3):
        done = subprocess.run(
            [*command, str(ROOT / "examples" / "train_parallel.py"), rule, how],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if ABORTED not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-4000:]
    said, on = done.stdout.split(" on ")
    assert on == f"{processes} processes\n"
    return float(said.removeprefix("test accuracy ").rstrip("%"))


@pytest.fixture(scope="module")
def alone():
    return accuracy("ddp", 1)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(how, alone):
    assert alone > 80
    assert accuracy(how, 2) == pytest.approx(alone, abs=0.6)  # two of 397 images: sums of float32 in another order
