"""``rewire inspect``: its numbers, its exit codes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rewire
from rewire.cli import main
from rewire.diagnose.arithmetic import arithmetic

MODULE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)), torch.ones(4, 5)

def conv():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 10)), \\
        torch.ones(2, 3, 8, 8)

def nested():
    units = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Linear(5, 6), *units, nn.Linear(6, 3)), torch.ones(4, 5)

class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last((self.first(x).unsqueeze(1) * self.inner.weight).sum(-1))

def none():
    return mlp()[0], None

def dead():
    return Around(), torch.ones(3, 5)

"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory that holds a module called ``inspected``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delitem(sys.modules, "inspected", raising=False)
    importlib.invalidate_caches()
    (tmp_path / "inspected.py").write_text(MODULE)
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def row(out: str, name: str) -> list[str]:
    """The cells of the first table row that starts with ``name``."""
    line = next(line for line in out.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_table_shows_rules_feedback_and_memory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspected:conv", "--layers", "4=bp") == 0

    out = capsys.readouterr().out
    assert row(out, "0")[2:5] == ["dfa", "hidden", "-"]  # nothing below it
    assert row(out, "2")[2:6] == ["dfa", "hidden", "10×8×6×6", f"{10 * 8 * 6 * 6 * 4 / 1e3:.1f} KB"]
    assert row(out, "4")[2:4] == ["bp", "output"] and "exact gradient" in row(out, "4")[7]


def test_blocks_skip_and_scale_as_in_ablations(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    convert = rewire.convert
    monkeypatch.setattr(rewire, "convert", lambda *args, **kwargs: (given.append(kwargs), convert(*args, **kwargs))[1])
    assert run("inspected:nested", "--blocks", "1 2", "--blocks", "3", "--skip", "cut", "--scale", "0.25") == 0
    out = capsys.readouterr().out
    assert given[0]["blocks"] == ["1", "2", "3"] and given[0]["skip"] == "cut"
    assert row(out, "2")[1:3] == ["Sequential", "dfa"] and row(out, "2")[6] == "0.25"
    assert "inside block '2'" in row(out, "2.0")[7]
    assert run("inspected:nested", "--blocks", "9") == 2
    assert "no module fits '9'" in capsys.readouterr().err
    for wrong, says in ((("--skip", "ct"), "skip is 'keep' or 'cut'"), (("--scale", "big"), "scale is 'auto' or a")):
        assert run("inspected:mlp", *wrong) == 2
        assert says in capsys.readouterr().err
    assert run("inspected:mlp") == 0
    assert given[-1]["blocks"] is None and given[-1]["skip"] == "keep" and given[-1]["scale"] == "auto"


def test_channel_feedback_has_one_value_per_channel(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspected:conv", "--feedback", "channel") == 0
    assert row(capsys.readouterr().out, "2")[4:6] == ["10×8", f"{10 * 8 * 4} B"]


def test_arithmetic_is_what_can_be_counted_by_hand(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch, widths = 4, [(5, 7), (7, 6), (6, 3)]
    forward = sum(2 * batch * a * b for a, b in widths)
    below = forward - 2 * batch * 5 * 7  # the first layer hands nothing back
    feedback = sum(2 * batch * 3 * a for a, _ in widths[1:])

    assert run("inspected:mlp") == 0

    out = capsys.readouterr().out
    assert "MFLOP" not in out and "GFLOP" not in out
    assert row(out, "backprop")[1:] == [f"{n:.4g}" for n in (forward, forward + below, 2 * forward + below)]
    ahead, behind = forward, forward + feedback
    assert row(out, "dfa")[1:] == [f"{n:.4g}" for n in (ahead, behind, ahead + behind)]
    ratio = (ahead + behind) / (2 * forward + below)
    assert row(out, "ratio")[1] == f"{ahead / forward:.3f}" and row(out, "ratio")[3] == f"{ratio:.3f}"


@pytest.mark.parametrize("rule", ["bp", "fa"])
def test_counting_leaves_gradients_and_random_state_as_they_were(rule: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2)), torch.randn(3, 4)
    rewire.convert(model, rule)
    model(x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = torch.get_rng_state()

    found = arithmetic(model, x, lambda y: y.square().sum())

    assert (found.forward, found.backward) == (2 * 3 * (24 + 12), 2 * 3 * (24 + 12 + 12))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (4, 2)])
def test_arithmetic_of_convolutions(layer: type[nn.Module], groups: int, stride: int) -> None:
    """A multiply-add for each weight and position of the smaller side, and as many for each of both gradients."""
    x = torch.randn(3, 4, 7, 7, requires_grad=True)
    model = layer(4, 8, 3, stride=stride, groups=groups)
    positions = (7 if layer is nn.ConvTranspose2d else (7 - 3) // stride + 1) ** 2

    found = arithmetic(model, x, lambda y: y.square().sum())

    once = 2 * 3 * positions * 4 * 8 * 9 // groups
    assert (found.forward, found.backward) == (once, 2 * once)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_verify_shows_that_rules_are_live(here: Path, capsys: pytest.CaptureFixture[str], rule: str) -> None:
    assert run("inspected:mlp", "--rule", rule, "--verify") == 0
    out = capsys.readouterr().out
    assert "Sequential: ok" in out and "2 live, 1 first layer" in out


@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
def test_a_dead_layer_is_exit_code_1(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspected:dead") == 0
    assert run("inspected:dead", "--verify") == 1
    out = capsys.readouterr().out
    assert "NOT ok" in out and "dead" in out


@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
def test_feedback_that_memory_cannot_hold_is_not_made(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    assert run("inspected:conv") == 0
    out = capsys.readouterr().out
    assert "Not run: feedback would need" in out and "--feedback channel" in out
    assert row(out, "2")[4] == "10×8×6×6"
    assert "arithmetic" not in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["torchvision:resnet19"], "did you mean 'resnet18'"),
        (["inspected:mpl"], "did you mean 'mlp'"),
        (["inspected:mlp", "--rule", "dfaa"], "did you mean 'dfa'"),
        (["inspected:mlp", "--feedback", "chanel"], "did you mean 'channel'"),
        (["inspected:mlp", "--layers", "2"], "PATTERN=RULE"),
        (["inspected:mlp", "--layers", "7=fa"], "no layer fits '7'"),
        (["inspected:mlp", "--layers", "2=fb"], "did you mean 'fa'"),
        (["inspected:mlp", "--output", "5"], "no layer is named '5'"),
        (["inspected:mlp", "--batch", "0"], "batch must be above zero"),
        ([], "SPEC"),
    ],
)
def test_a_wrong_request_gets_one_line_and_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


def test_an_output_that_is_not_the_output_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspected:mlp", "--output", "2") == 1
    assert "Write output='4'" in capsys.readouterr().err


def test_later_patterns_win(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspected:mlp", "--layers", "*=fa, 4=bp", "--layers", "2=usf") == 0
    out = capsys.readouterr().out
    assert [row(out, name)[2] for name in "024"] == ["fa", "usf", "bp"]


def test_help_has_an_example(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "Example: rewire inspect torchvision:resnet18" in capsys.readouterr().out


def test_inputs_that_are_none_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspected:none") == 2
    assert capsys.readouterr().err == (
        "rewire: inspected:none returned (model, None): return the model alone, or (model, inputs)\n"
    )
