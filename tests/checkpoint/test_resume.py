"""Ten steps, saved, resumed in another process, ten more: bit by bit what twenty steps in one go lead to."""

import copy
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


@pytest.mark.parametrize("rule", ["anchored(rule=dfa, every=3)", "switch(first=bp, then=dfa, at=7)"])
def test_several_processes_save_the_pass_that_they_have_not_taken_in(rule, monkeypatch):
    """They take it in together, when the next forward begins; none may do so by itself, for saving."""

    def steps(model, count):
        for _ in range(count):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))

    x, y = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    model = rewire.convert(make(), rule, scale=0.3)
    steps(model, 5)
    with monkeypatch.context() as among_others:
        among_others.setattr(rewire.wiring, "several", lambda: True)
        saved, weights = json.loads(json.dumps(rewire.config(model))), copy.deepcopy(model.state_dict())
    resumed = rewire.load_config(make(), saved)
    resumed.load_state_dict(weights)
    for each in (model, resumed):
        steps(each, 7)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
