"""Training that is stopped, saved and resumed in another process.

``python -m tests.checkpoint.resume FOLDER`` does the second half of every case in FOLDER, which a test has begun.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import rewire
from rewire.rules.direct import DFA
from rewire.structures import LowRank, Shared, Sparse
from tests import plain  # noqa: F401  (what is imported must not matter)
from tests.every_rule import EVERY

HALF = 10


class Net(nn.Module):
    """Convolution, batch norm, dropout, a shared layer, a weight used by its parent, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.Tanh()
        self.drop = nn.Dropout(0.2)
        self.twice = nn.Linear(36, 36)
        self.used = nn.Linear(36, 12)
        self.mid = nn.Linear(12, 12)
        self.side = nn.Linear(12, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.avg_pool2d(self.act(self.norm(self.conv(x))), 2).flatten(1)
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        h = self.drop(torch.tanh(F.linear(h, self.used.weight, self.used.bias)))
        side = self.side(h)
        return self.head(torch.tanh(self.mid(h))), side


class Sequence(nn.Module):
    """An attention, whose projections are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x.reshape(len(x), 4, 9))).mean(1))


class Experts(nn.Module):
    """Each expert gets the rows picked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(36, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = (h.detach()[:, 0] > 0).eq(bool(number)).nonzero().flatten()
            out = out.index_add(0, rows, torch.tanh(expert(h[rows])))
        return self.head(out)


class Steps(nn.Module):
    """Sequence first: (T, N, F), with as many steps as samples only in the second half of the training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.reshape(len(x), 6, 6).transpose(0, 1)
        h = torch.tanh(self.second(torch.tanh(self.first(h))))
        return self.head(h.mean(0))


def surrogate(a: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + a.abs())


def _rules() -> dict[str, dict[str, Any]]:
    return {f"{name}-{seed}": {"rule": rule, "seed": seed} for name, rule in EVERY.items() for seed in (0, 11)}


def _structures() -> dict[str, dict[str, Any]]:
    return {f"dfa-{name}": {"rule": "dfa", "feedback": name} for name in rewire.structures.NAMES}


def _learned_structures() -> dict[str, dict[str, Any]]:
    rules = ["fitted(every=4)", "fitted(every=4, context=2)", "fitted(by='jvp', every=3)", "dkp", "grape"]
    kept = {"lowrank": LowRank(rank=2), "sparse": Sparse(nonzeros=2), "shared": Shared()}
    return {f"{rule}-{name}": {"rule": rule, "feedback": kept[name], "seed": 7} for rule in rules for name in kept}


# Options of convert by the name of the case.
CASES: dict[str, dict[str, Any]] = {
    **_rules(),
    **_structures(),
    **_learned_structures(),
    "mixed": {
        "rule": DFA(feedback=rewire.structures.LowRank(rank=2)),
        "layers": {"conv": "frsf", "mid": "sdfa", "head": "bp"},
        "derivative": {nn.Tanh: surrogate},
        "skip": "cut",
        "on_nonfinite": "skip",
    },
    "given": {"rule": "dfa", "scale": {"mid": 0.3, "twice": 0.2}, "output": ["head", "side"], "seed": 3},
    "block": {"rule": "dfa", "model": "Sequence", "blocks": ["layer"]},
    # Fitted between the two halves, and from what was gathered before.
    "fitted-often": {"rule": "fitted(every=3)"},
    # Redrawn feedback of a rule that is one of two, and a turn that comes in the second half.
    "switch-later": {"rule": "switch(first='brsf', then='dfa', at=13)"},
    "anchored-fitted": {"rule": "anchored(rule='fitted(every=4)', every=3)"},
    "experts": {"rule": "dfa", "model": "Experts"},
    "steps": {"rule": "dfa", "model": "Steps"},
    "attention-dfa": {"rule": "dfa", "model": "Sequence"},
    "attention-brsf": {"rule": "brsf", "model": "Sequence"},
}


def model_of(case: str) -> nn.Module:
    kinds: list[type[nn.Module]] = [Net, Sequence, Experts, Steps]
    return {kind.__name__: kind for kind in kinds}[CASES[case].get("model", "Net")]()


def convert(model: nn.Module, case: str) -> nn.Module:
    return rewire.convert(model, **{name: value for name, value in CASES[case].items() if name != "model"})


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        numbers = torch.Generator().manual_seed(step)
        batch = 6 if step >= HALF or step % 2 else 4
        x = torch.randn(batch, 1, 6, 6, generator=numbers)
        y = torch.randint(3, (batch,), generator=numbers)
        optimizer.zero_grad()
        with rewire.targets(y):
            out = model(x)
            outs = out if isinstance(out, tuple) else (out,)
            loss = torch.stack([F.cross_entropy(o, y) for o in outs]).sum()
        loss.backward()
        optimizer.step()


def begin(folder: Path, case: str) -> dict[str, torch.Tensor]:
    """Train to half and save; go on undisturbed, and return what that leads to."""
    torch.manual_seed(5)
    model = convert(model_of(case), case)
    optimizer = optimizer_of(model)
    steps(model, optimizer, 0, HALF)
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], folder / f"{case}.pt")
    rewire.save_config(model, folder / f"{case}.json")
    steps(model, optimizer, HALF, 2 * HALF)
    return model.state_dict()


def resume(folder: Path, case: str) -> dict[str, torch.Tensor]:
    """The second half, from the files."""
    parameters, optimized, numbers = torch.load(folder / f"{case}.pt", weights_only=True)
    model = rewire.load_config(model_of(case), folder / f"{case}.json")
    model.load_state_dict(parameters)
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(optimized)
    torch.set_rng_state(numbers)
    steps(model, optimizer, HALF, 2 * HALF)
    return model.state_dict()


def main(folder: Path) -> None:
    failed: dict[str, str] = {}
    for file in sorted(folder.glob("*.pt")):
        case = file.stem
        try:
            torch.save(resume(folder, case), folder / f"{case}.resumed")
        except Exception as problem:
            failed[case] = f"{type(problem).__name__}: {problem}"
    (folder / "failed").write_text(json.dumps(failed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
