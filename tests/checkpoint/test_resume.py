"""Ten steps, saved, resumed in another process, ten more: bit by bit what twenty steps in one go lead to."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import rewire
from tests.checkpoint.resume import CASES, begin
from tests.every_rule import EVERY

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with what the other process made of every case, and what twenty steps in one go lead to."""
    folder = tmp_path_factory.mktemp("resume")
    undisturbed = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rewire.RewireWarning)
        for case in CASES:
            undisturbed[case] = begin(folder, case)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.resume", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    return folder, undisturbed


# One process for all cases, so one test: under xdist each of many would start its own.
def test_a_resumed_training_is_bit_by_bit_the_undisturbed_one(runs):
    folder, undisturbed = runs
    assert json.loads((folder / "failed").read_text()) == {}
    for case, expected in undisturbed.items():
        resumed = torch.load(folder / f"{case}.resumed", weights_only=True)
        assert resumed.keys() == expected.keys(), case
        different = [name for name in expected if not torch.equal(expected[name], resumed[name])]
        assert not different, (case, different)


def test_every_rule_is_resumed():
    assert {CASES[case]["rule"] for case in CASES if case.endswith("-11")} == set(EVERY.values())
