"""Every rule as it is written, in convert, on the command line and in a file; what is said of wrong options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.ablation import train
from rewire.cli import main
from rewire.rules import DFA, resolve
from rewire.structures import Dense, LowRank, Seeded, Shared, Sparse

LEARNED = [
    "kp",
    "wm",
    "wm(every=2, samples=16)",
    "ldfa",
    "ldfa(rank=4, align=False)",
    "pfa",
    "pfa(expand=1, orthogonal=True)",
    "dkp",
    "dkp(lr=0.02, normalise=False)",
    "fitted",
    "fitted(context=8)",
    "fitted(by='jvp')",
    "fitted(every=3, probe=20)",
    "grape",
    "grape(every=4, together=True)",
]
SCHEDULES = [
    "switch(first=bp, then=fitted(context=2), at=3)",
    "switch(first='dfa', then='dkp', at=2)",
    "anchored(rule=dfa, every=4)",
    "anchored(rule=grape(every=2), every=5)",
]

WRONG = {
    "ftted": "did you mean 'fitted'",
    "kp(decay=0.1)": "rule 'kp' has no option 'decay'",
    "wm(evry=3)": "did you mean 'every'",
    "wm(rate=2)": "rate is a number above 0 and at most 1, not 2",
    "ldfa(rnk=3)": "did you mean 'rank'",
    "ldfa(align=3)": "align is True or False, not 3",
    "pfa(expnd=3)": "did you mean 'expand'",
    "pfa(orthogonal='yes')": "orthogonal is True or False, not 'yes'",
    "dkp(normalize=True)": "did you mean 'normalise'",
    "dkp(normalise=3)": "normalise is True or False, not 3",
    "fitted(contxt=8)": "did you mean 'context'",
    "fitted(by='gradient')": "by is 'gradients' or 'jvp', not 'gradient'",
    "fitted(by=jvp)": "cannot read 'jvp' in rule 'fitted(by=jvp)': values are numbers, strings in quotes",
    "fitted(cap=1e999)": "cap is a number from 0 on, not inf",
    "fitted(feedback='lowrnk')": "did you mean 'lowrank'",
    "grape(evry=3)": "did you mean 'every'",
    "grape(every=None)": "every is a whole number, 1 or more, not None",
    "grape(together=1)": "together is True or False, not 1",
    "switch": "needs first, then, at, as in 'switch(first=..., then=..., at=...)'",
    "switch(first=bpp, then=dfa, at=3)": "did you mean 'bp'",
    "switch(first='bpp', then=dfa, at=3)": "did you mean 'bp'",
    "switch(first=bp, than=dfa, at=3)": "did you mean 'then'",
    "switch(first=bp, then=fitted(contxt=3), at=3)": "did you mean 'context'",
    "anchored(rule=dffa)": "did you mean 'dfa'",
    "anchored(rule=dfa, evry=3)": "did you mean 'every'",
    "anchored(rule=switch(first=bp, then=dfa, at=3))": "not between schedules",
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("text", LEARNED + SCHEDULES)
def test_convert_takes_it_and_it_reads_back(text: str) -> None:
    rule = resolve(text)
    assert repr(resolve(repr(rule))) == repr(rule)
    model = rewire.convert(mlp(), text)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.01)
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("text", WRONG)
def test_wrong_options_are_one_line_and_change_nothing(text: str) -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(rewire.ConversionError) as caught:
        rewire.convert(model, text)
    assert WRONG[text] in str(caught.value) and "\n" not in str(caught.value)
    assert all(type(module) in (nn.Linear, nn.Tanh) for module in model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def own(registry: None) -> None:
    """Rules of one's own, one with an option that it keeps under another name each."""

    class Times(rewire.DirectRule):
        def __init__(self, *, k: int = 1, watches: bool = False, layout: str | None = None) -> None:
            super().__init__()
            self.factor, self.looks = k, watches

        def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
            return error * self.factor

    class Kept(Times):
        def __init__(self, *, k: int = 1) -> None:
            super().__init__(k=k)
            self.k = k

    rewire.register_rule("times")(Times)
    rewire.register_rule("kept")(Kept)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("option", ["k=3", "layout='batch_first'"])
def test_an_option_that_would_be_lost(option: str) -> None:
    """From configurations, tables and checkpoints, all of which write the rule down."""
    name = option.partition("=")[0]
    with pytest.raises(rewire.ConversionError) as caught:
        rewire.convert(mlp(), f"times({option})")
    for word in ("'times'", repr(name), option, "Times.__init__", f"self.{name} = {name}"):
        assert word in str(caught.value)
    assert repr(resolve("times")) == "times"
    assert repr(resolve("kept(k=3)")) == "kept(k=3)"
    config = rewire.config(rewire.convert(mlp(), "kept(k=3)", scale=0.1))
    assert "kept(k=3)" in json.dumps(config)


# -- the command line -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "step_ratio", lambda cell: 1.0)
    yield tmp_path
    torch.set_num_threads(threads)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert isinstance(caught.value.code, int)
    return caught.value.code


QUICK = ["--model", "mlp", "--epochs", "1", "--workers", "0", "--seeds", "1", "--no-controls"]
QUICK += ["--alignments", "1", "--batch-size", "128"]


def test_one_ablation_of_them_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ablate", "--rules", " ".join(["bp", "dfa", *LEARNED, *SCHEDULES]), "--out", "run", *QUICK) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (here / "run" / "results.jsonl").read_text().splitlines()]
    rules = ["bp", "dfa", *(repr(resolve(text)) for text in LEARNED + SCHEDULES)]
    assert [repr(resolve(row["cell"]["rule"])) for row in rows] == rules
    assert {row["status"] for row in rows} == {"done"}
    # Each in its own way: these few steps are enough for the last of them to switch, or probe, and learn.
    assert len({row["final_loss"] for row in rows}) == len(rows)
    assert "fitted(context=8)" in printed and "switch(" in printed


def test_a_grid_in_a_file(here: Path) -> None:
    (here / "grid.toml").write_text(
        'models = ["mlp"]\nrules = ["kp", "fitted(context=8)", "switch(first=bp, then=dfa, at=3)"]\nseeds = 1\n'
        'layers = [{}, {"3" = "dkp(lr=0.02)"}]\noptimizers = [{ name = "sgd", lr = 0.05, weight_decay = 1e-3 }]\n'
        "controls = false\nepochs = 1\nalignments = 0\nbatch_size = 256\n"
    )
    assert run("ablate", "grid.toml", "--workers", "0", "--out", "run") == 0
    rows = [json.loads(line) for line in (here / "run" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {row["status"] for row in rows} == {"done"}
    assert {row["cell"]["layers"].get("3") for row in rows} == {None, "dkp(lr=0.02)"}


def test_one_of_them_is_trained_and_inspected(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = ("--epochs", "1", "--batch-size", "256", "--alignments", "0")
    assert run("train", "--model", "mlp", "--rule", "fitted(context=8)", "--out", "run", *once) == 0
    assert run("inspect", "torchvision:alexnet", "--rule", "fitted(context=8)", "--feedback", "channel") == 0
    assert "fitted(context=8)" in capsys.readouterr().out


@pytest.mark.parametrize("text", WRONG)
def test_wrong_options_on_the_command_line(here: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert run("ablate", "--model", "mlp", "--rules", f"bp {text}") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rewire: ") and err.count("\n") == 1
    assert WRONG[text] in err
    assert not list(here.iterdir())


def test_wrong_options_in_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "grid.toml").write_text('models = ["mlp"]\nrules = ["fitted(contxt=8)"]\n')
    assert run("ablate", "grid.toml") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "did you mean 'context'" in err
    assert [path.name for path in here.iterdir()] == ["grid.toml"]


STRUCTURES = {
    "lowrank(rank=4)": LowRank(rank=4),
    "LowRank(rank=4)": LowRank(rank=4),
    "lowrank()": LowRank(),
    "lowrank(rank=4, dtype=torch.bfloat16)": LowRank(rank=4, dtype=torch.bfloat16),
    "binary(per='channel')": Dense("binary", per="channel"),
    "channel(distribution='uniform')": Dense("uniform", per="channel"),
    "Dense(distribution='ternary', dtype=torch.int8)": Dense("ternary", dtype=torch.int8),
    "sparse(nonzeros=2)": Sparse(nonzeros=2),
    "shared(per='element')": Shared(per="element"),
    "seeded(distribution='uniform')": Seeded("uniform"),
}
WRONG_STRUCTURES = {
    "lowrnk(rank=4)": "unknown feedback 'lowrnk'; did you mean 'lowrank'",
    "lowrank(rnk=4)": "feedback 'lowrank' has no option 'rnk'; did you mean 'rank'?; options: rank, distribution, per",
    "LowRank(rnk=4)": "feedback 'LowRank' has no option 'rnk'; did you mean 'rank'",
    "lowrank(rank=0)": "rank is a positive int, not 0",
    "lowrank(4)": "a structure with options is written name(option=value, ...), as in 'lowrank(rank=8)'",
    "lowrank(rank=4": "cannot read feedback 'lowrank(rank=4'",
    "lowrank(dtype=bfloat16)": "cannot read 'bfloat16' in feedback 'lowrank(dtype=bfloat16)'",
    "Structure()": "unknown feedback 'Structure'",
    "dfa(layout='batch_first')": "unknown feedback 'dfa'",
}


@pytest.mark.parametrize("text", STRUCTURES)
def test_a_structure_with_options(text: str) -> None:
    """To convert, in a rule, in a rule of one's own; it is in the configuration, and read back from there."""

    class Own(DFA):
        feedback = text

    assert rewire.structures.resolve(text) == STRUCTURES[text]
    assert rewire.structures.resolve(repr(STRUCTURES[text])) == STRUCTURES[text]
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    found = []
    for given in (STRUCTURES[text], text, f"dfa(feedback={text})", f"dfa(feedback={text!r})", Own()):
        by_rule = given not in (STRUCTURES[text], text)
        model = rewire.convert(mlp(), **({"rule": given} if by_rule else {"rule": "dfa", "feedback": given}), scale=0.1)
        nn.functional.cross_entropy(model(x), y).backward()
        found.append(rewire.feedback(model))
        if type(given) is not Own:
            config = json.loads(json.dumps(rewire.config(model)))
            again = rewire.load_config(mlp(), config)
            assert rewire.config(again) == config
            found.append(rewire.feedback(again))
    assert len(found[0]) == 2
    assert all(torch.equal(B, other[name]) for other in found for name, B in found[0].items())


@pytest.mark.parametrize("text", WRONG_STRUCTURES)
def test_wrong_options_of_a_structure_are_one_line(here: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(rewire.ConversionError) as caught:
        rewire.convert(mlp(), "dfa", feedback=text)
    assert WRONG_STRUCTURES[text] in str(caught.value) and "\n" not in str(caught.value)
    if text != "lowrank(rank=4":  # words apart: what is not closed is said by what takes them apart
        assert run("ablate", "--model", "mlp", "--rules", "dfa", "--feedback", f"dense {text}") == 2
        assert WRONG_STRUCTURES[text] in capsys.readouterr().err
    if "unknown" not in WRONG_STRUCTURES[text] and "cannot read feedback" not in WRONG_STRUCTURES[text]:
        with pytest.raises(rewire.ConversionError, match="rank"):
            rewire.convert(mlp(), f"dfa(feedback={text})")


def test_structures_with_options_on_the_command_line_and_in_a_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    texts = ["dense", "lowrank(rank=2)", "LowRank(rank=4, per='element')", "sparse(nonzeros=2)"]
    assert run("ablate", "--rules", "dfa", "--feedback", " ".join(texts), "--out", "run", *QUICK) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in texts)
    rows = [json.loads(line) for line in (here / "run" / "results.jsonl").read_text().splitlines()]
    assert [row["cell"]["feedback"] for row in rows] == texts
    assert len({row["final_loss"] for row in rows}) == len(rows) and {row["status"] for row in rows} == {"done"}
    listed = ", ".join(f'"{text}"' for text in texts)
    (here / "grid.toml").write_text(
        f'model = "mlp"\nrules = "dfa"\nfeedback = [{listed}]\nseeds = 1\ncontrols = false\nepochs = 1\n'
        "alignments = 1\nbatch_size = 128\n"
    )
    assert run("ablate", "grid.toml", "--workers", "0", "--out", "run") == 0  # goes on with it: nothing is left to do
    assert (here / "run" / "results.jsonl").read_text().count("\n") == len(texts)
    once = ("--epochs", "1", "--batch-size", "256", "--alignments", "0")
    assert run("train", "--model", "mlp", "--rule", "dfa", "--feedback", texts[1], "--out", "once", *once) == 0
    capsys.readouterr()
    assert run("inspect", "torchvision:alexnet", "--rule", "dfa", "--feedback", texts[1]) == 0
    assert "LowRank(rank=2)" in capsys.readouterr().out
