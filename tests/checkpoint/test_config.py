"""A conversion as JSON: what is in it, what is refused, and that a refusal changes nothing."""

import copy
import json
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewire
from rewire.errors import ConversionError
from rewire.stacked import feedback_of
from tests.checkpoint import resume
from tests.every_rule import EVERY


def net(width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def step(model):
    numbers = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 8, generator=numbers), torch.randint(3, (5,), generator=numbers)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def trained(rule="dfa", **options):
    model = rewire.convert(net(), rule, **options)
    step(model)
    step(model)
    return model


def looks(model):
    """All that a refused call must leave alone."""
    return [
        (type(m), dict(m.__dict__), dict(m._forward_hooks), dict(m._forward_pre_hooks), list(m._parameters.items()))
        for m in model.modules()
    ]


def states(model):
    return [copy.copy(vars(m.__dict__["_rewire"])) for m in model.modules() if "_rewire" in m.__dict__]


def refused(model, source, *words):
    before, inside = looks(model), states(model)
    with pytest.raises(ConversionError) as caught:
        rewire.load_config(model, source)
    for word in words:
        assert word in str(caught.value)
    assert looks(model) == before
    assert str(states(model)) == str(inside)
    return str(caught.value)


def plain(config):
    """As it comes out of a file."""
    return json.loads(json.dumps(config))


# -- what is in it ---------------------------------------------------------------------------------------


def test_a_config_says_it_all_in_plain_values(tmp_path):
    model = rewire.convert(net(), "dfa", layers={"2": "brsf"}, seed=4, feedback="lowrank")
    step(model)
    step(model)
    found = plain(rewire.config(model))
    assert found["seed"] == 4 and found["structure"] == "LowRank()" and found["outputs"] == ["4"]
    assert {name: layer["rule"] for name, layer in found["layers"].items()} == {"0": "dfa", "2": "brsf", "4": "dfa"}
    assert found["layers"]["2"]["draws"] == 2
    # Written by hand: the first layer has nothing to hand back to, 4 hears its own error.
    assert found["layers"]["4"]["scale"] == rewire.scales(model)["4"]
    assert found["layers"]["2"]["std"] == pytest.approx(float(net()[2].weight.detach().double().std()))
    assert [fed["shape"] for fed in found["layers"]["4"]["feedback"]] == [[3, 12]]
    assert found["versions"] == {"rewire": rewire.__version__, "torch": torch.__version__, "numpy": np.__version__}

    rewire.save_config(model, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    torch.save({"rewire": rewire.config(model)}, tmp_path / "x.pt")
    assert plain(torch.load(tmp_path / "x.pt", weights_only=True)["rewire"]) == found


def test_a_model_from_a_config_has_the_same_config_feedback_and_gradients(tmp_path):
    model = trained(seed=3, feedback="sparse", layers={"0": "fa"})
    rewire.save_config(model, tmp_path / "x.json")
    other = rewire.load_config(net(), tmp_path / "x.json")
    other.load_state_dict(model.state_dict())
    assert rewire.config(other) == rewire.config(model)
    expected = rewire.feedback(model)
    assert expected.keys() == rewire.feedback(other).keys()
    assert all(torch.equal(B, expected[name]) for name, B in rewire.feedback(other).items())
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(other), strict=True))


@pytest.mark.parametrize("case", ["steps", "experts", "mixed", "given", "block", "attention-brsf"])
def test_what_passes_have_shown_comes_back(case):
    model = resume.convert(resume.model_of(case), case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rewire.RewireWarning)
        resume.steps(model, resume.optimizer_of(model), 0, 3)
    found = plain(rewire.config(model))
    other = rewire.load_config(resume.model_of(case), found)
    assert plain(rewire.config(other)) == found
    assert any(layer["reading"] for layer in found["layers"].values()) or case not in ("steps", "block")
    assert any(layer["picks"] for layer in found["layers"].values()) == (case == "experts")


def test_counts_and_which_layers_are_frozen_come_back():
    model = rewire.convert(net(), "grape(every=2)")
    model[0].requires_grad_(False)
    for _ in range(5):
        step(model)
    other = rewire.load_config(net(), plain(rewire.config(model)))
    ours, theirs = model[2]._rewire.wiring, other[2]._rewire.wiring
    assert (ours.passes, ours.sampled, ours.probed, ours.probe_count) == (5, 0, 4, 2)
    assert (theirs.passes, theirs.sampled, theirs.probed, theirs.probe_count) == (5, 0, 4, 2)
    assert [m._rewire.idle for m in (other[0], other[2], other[4])] == [True, False, False]
    assert theirs.certain


def test_fitted_goes_on_counting_samples():
    model = rewire.convert(net(), "fitted(probe=1000)")
    for _ in range(5):
        step(model)
    other = rewire.load_config(net(), plain(rewire.config(model)))
    assert model[2]._rewire.wiring.sampled == other[2]._rewire.wiring.sampled > 0
    assert other[2]._rewire.exact


def test_growth_is_since_the_start_of_the_first_run():
    """Written by hand: how large the outputs of a fresh network are."""
    x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3
    start = float(net()[0](x).detach().square().mean().sqrt())
    model = rewire.convert(net(), "dfa")
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        model[0].weight *= 1000
        model[0].bias *= 1000
    F.cross_entropy(model(x), y).backward()
    other = rewire.load_config(net(), plain(rewire.config(model)))
    other.load_state_dict(model.state_dict())
    F.cross_entropy(other(x), y).backward()
    assert other[0]._rewire.start == pytest.approx(start, rel=1e-6)
    looked_at = rewire.alignment(other, x, lambda out: F.cross_entropy(out, y), null=3)
    growth = {layer.name: layer.growth for layer in looked_at.layers}
    assert growth["0"] == pytest.approx(1000, rel=1e-5)
    assert any(flag.startswith("activations have blown up") and "0 (×1" in flag for flag in looked_at.flags)


def test_the_rule_whose_turn_it_is_needs_no_passes():
    rule = "switch(first='brsf', then='usf', at=2)"
    model = rewire.convert(net(), rule)
    for _ in range(2):
        step(model)
    other = rewire.load_config(net(), plain(rewire.config(model)))
    assert repr(other[2]._rewire.rule) == "usf" and other[2]._rewire.draws == 2
    early = rewire.convert(net(), rule)
    step(early)
    assert repr(rewire.load_config(net(), plain(rewire.config(early)))[2]._rewire.rule) == "brsf"


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_what_was_loaded_can_be_compiled(rule):
    model = trained(rule)
    other = rewire.load_config(net(), plain(rewire.config(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rewire.RewireWarning)
        compiled = torch.compile(other, backend="aot_eager", dynamic=False)
        for _ in range(3):
            expected = step(model)
            found = step(compiled)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))
    torch._dynamo.reset()


def test_what_was_loaded_can_be_stacked_before_any_pass():
    model = trained()
    other = rewire.load_config(net(), plain(rewire.config(model)))
    ours, theirs = feedback_of(model), feedback_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(B, theirs[name]) for name, B in ours.items())


def test_a_config_before_the_first_pass_leads_to_the_same_first_pass():
    model = rewire.convert(net(), "dfa", seed=2)
    other = rewire.load_config(net(), plain(rewire.config(model)))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step(model), step(other), strict=True))
    assert rewire.scales(model) == rewire.scales(other)


def test_a_converted_model_is_brought_to_the_saved_point_in_place():
    model = trained("brsf")
    found = plain(rewire.config(model))
    expected = step(model)
    step(model)
    parameters, classes = list(model.parameters()), [type(m) for m in model.modules()]
    rewire.load_config(model, found)
    assert [type(m) for m in model.modules()] == classes
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, step(model), strict=True))  # the same draw again


def test_a_resumed_model_looks_for_special_uses_once_more_and_then_takes_the_short_way():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.used, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = torch.tanh(F.linear(torch.tanh(self.a(x)), self.used.weight))
            return self.c(torch.tanh(self.b(h)))

    torch.manual_seed(0)
    model = rewire.convert(Parent(), "dfa")
    for _ in range(3):
        expected = step(model)
    other = rewire.load_config(Parent(), plain(rewire.config(model)))
    other.load_state_dict(model.state_dict())
    for _ in range(3):
        assert all((a is b is None) or torch.equal(a, b) for a, b in zip(expected, step(other), strict=True))
    assert other.b._rewire.steady == model.b._rewire.steady == "direct"
    assert other.b._rewire.wiring.looked
    assert [entry[0] for entry in other._rewire_host.used] == ["used"]
    assert rewire.verify(other, torch.randn(4, 8), lambda y: y.square().sum()).ok


def test_restore_after_load_config_leaves_nothing():
    model = rewire.load_config(net(), plain(rewire.config(trained())))
    rewire.restore(model)
    reference = net()
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(m.__dict__) for m in reference.modules()]


def test_a_wrapped_model_is_asked_for_its_config():
    model = trained()
    assert rewire.config(nn.Sequential(model)) == rewire.config(model)


def test_with_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = trained("fa", seed=9)
    safetensors.save_file(model.state_dict(), tmp_path / "x.safetensors")
    rewire.save_config(model, tmp_path / "x.json")
    other = rewire.load_config(net(), tmp_path / "x.json")
    other.load_state_dict(safetensors.load_file(tmp_path / "x.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(other), strict=True))


@pytest.mark.parametrize("rule", EVERY.values(), ids=list(EVERY))
def test_copies_and_pickles_still_carry_the_conversion(rule):
    model = trained(rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rewire.RewireWarning)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert rewire.config(other) == rewire.config(model)
    expected = step(model)
    for other in copies:
        assert all(torch.equal(a, b) for a, b in zip(expected, step(other), strict=True))


# -- another conversion ----------------------------------------------------------------------------------


def test_another_architecture_is_refused_with_what_differs():
    found = plain(rewire.config(trained()))
    refused(net(13), found, "layer '0': weight (12, 8) in the configuration, (13, 8) in the model", "layer '2'")
    fewer = nn.Sequential(*net()[:3])
    refused(fewer, found, "layer '4': the model has none of that name")
    refused(nn.Sequential(*net(), nn.Linear(3, 3)), found, "layer '5': not in the configuration")
    refused(nn.Sequential(net()), found, "layer '0': the model has none of that name")


def test_renamed_layers_are_refused():
    class Named(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.add_module(first, nn.Linear(8, 4))
            self.head = nn.Linear(4, 3)

    found = rewire.config(rewire.convert(Named("hidden"), "fa"))
    refused(Named("hidden1"), found, "layer 'hidden'", "did you mean 'hidden1'", "layer 'hidden1': not in")


def test_another_conversion_of_the_same_model_is_refused_with_what_differs():
    found = plain(rewire.config(trained(seed=1)))
    refused(trained(seed=2), found, "seed: 1 in the configuration, 2 in the model")
    refused(trained(seed=1, layers={"2": "fa"}), found, "layer '2': rule dfa in the configuration, fa in the model")
    refused(trained(seed=1, feedback="channel"), found, "feedback: Dense() in the configuration, Dense(per='channel')")
    refused(trained(seed=1, skip="cut"), found, "skip: 'keep'")
    refused(trained(seed=1, scale=0.1), found, "scale: 'auto' in the configuration, 0.1 in the model")
    refused(trained(seed=1, output="4"), found, "output: None")
    refused(trained(seed=1, derivative={nn.Tanh: torch.cos}), found, "derivative of '1': none in the configuration")


def test_a_part_of_a_converted_model_and_several_conversions_are_refused():
    model = trained()
    with pytest.raises(ConversionError, match="a part of what was converted"):
        rewire.config(model[2])
    with pytest.raises(ConversionError, match="2 conversions"):
        rewire.config(nn.Sequential(trained(), trained()))
    with pytest.raises(ConversionError, match="not converted"):
        rewire.config(net())


# -- feedback that is not what it was --------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*rewire.structures.NAMES, "fa", "brsf", "frsf"])
def test_another_generator_is_noticed_and_the_layers_named(rule, monkeypatch):
    structure = rule in rewire.structures.NAMES
    model = trained("dfa", feedback=rule) if structure else trained(rule)
    found = plain(rewire.config(model))
    rewire.load_config(net(), found)
    module = sys.modules["rewire.feedback"]  # rewire.feedback is the function
    usual = module.stream_key
    monkeypatch.setattr(module, "stream_key", lambda *args: usual(*args) + 1)
    refused(net(), found, "layer '2'", "layer '4'", "NumPy")
    refused(model, found, "layer '2'", "layer '4'", "NumPy")


def test_a_tampered_seed_or_name_is_noticed():
    found = plain(rewire.config(trained("fa")))
    refused(net(), {**found, "seed": 5}, "layer '0'", "layer '2'", "layer '4'")


def test_a_fingerprint_holds_for_every_dtype():
    model = trained("dfa", feedback="orthogonal")
    found = rewire.config(model)["layers"]
    model.double()
    numbers = torch.Generator().manual_seed(1)
    model(torch.randn(5, 8, generator=numbers, dtype=torch.float64)).sum().backward()
    for name, layer in rewire.config(model)["layers"].items():
        assert [fed["fingerprint"] for fed in layer["feedback"]] == [
            fed["fingerprint"] for fed in found[name]["feedback"]
        ]


def test_a_fingerprint_is_of_the_feedback_in_use():
    """For a B as small as this one: weighted sums of its entries at unit scale, by plain loops."""
    model = trained(feedback="uniform")
    B = rewire.feedback(model)["4"].double() / rewire.scales(model)["4"]
    (fed,) = rewire.config(model)["layers"]["4"]["feedback"]
    flat = B.flatten().tolist()
    for k, number in enumerate(fed["fingerprint"]):
        total = sum(b * np.cos(i * (k + 2**0.5)) for i, b in enumerate(flat, 1))
        assert number == pytest.approx(total * (2 / len(flat)) ** 0.5, abs=1e-4)


@pytest.mark.parametrize("rule", ["fa", "frsf", "dfa"])
def test_feedback_changed_in_place_has_no_config(rule):
    model = trained(rule)
    rewire.config(model)
    key = "2" if rule != "frsf" else None
    if key is None:  # what frsf uses is made in each backward; R itself is kept inside
        next(iter(model[2]._rewire.randoms.values())).mul_(2)
    else:
        rewire.feedback(model)[key].mul_(2)
    with pytest.raises(ConversionError, match=r"changed in place.*\n.*layer '2'"):
        rewire.config(model)


# -- what has no name ------------------------------------------------------------------------------------


class Halved(rewire.LocalRule):
    random = False

    def backward_weight(self, weight, random, scale):
        return weight / 2


def test_rules_and_derivatives_without_a_name_are_refused():
    with pytest.raises(ConversionError, match="register_rule"):
        rewire.config(rewire.convert(net(), Halved()))
    with pytest.raises(ConversionError, match=r"derivative of '1'.*lambdas"):
        rewire.config(rewire.convert(net(), "fa", derivative={nn.Tanh: lambda a: a}))

    def inside(a):
        return a

    with pytest.raises(ConversionError, match="no name that it could be imported by"):
        rewire.config(rewire.convert(net(), "fa", derivative={nn.Tanh: inside}))


def test_rules_with_options_come_back_with_them():
    model = rewire.convert(net(), "dfa", layers={"2": "dfa(layout='batch_first', feedback=LowRank(rank=5))"})
    other = rewire.load_config(net(), plain(rewire.config(model)))
    assert repr(other[2]._rewire.rule) == "dfa(layout='batch_first', feedback=LowRank(rank=5))"


def test_layers_that_shared_a_rule_share_it_again():
    model = rewire.load_config(net(), rewire.config(trained()))
    assert len({id(model[i]._rewire.rule) for i in (0, 2, 4)}) == 1


# -- files that are no configurations --------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", "null", "{'a': 1}", '{"format": 99, "layers": {}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    refused(net(), tmp_path / "x.json")


@pytest.mark.parametrize("source", [None, 3, b"x", [], object()])
def test_other_sources_are_refused(source):
    refused(net(), source)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        rewire.load_config(net(), tmp_path / "none.json")


def test_an_unknown_rule_or_function_is_refused():
    found = plain(rewire.config(trained(derivative={nn.Tanh: torch.cos})))
    other = copy.deepcopy(found)
    other["layers"]["2"]["rule"] = "dfaa"
    refused(net(), other, "layer '2'", "unknown rule 'dfaa'", "did you mean 'dfa'")
    refused(net(), {**found, "derivative": {"1": "nowhere:f"}}, "nowhere:f")
    refused(net(), {**found, "derivative": {"9": "torch:cos"}}, "no module '9'")
    refused(net(), {**found, "derivative": {"0": "torch:cos"}}, "'0' is a layer itself")


def test_a_file_of_a_version_that_looked_everything_up_each_time():
    """Models are pickled whole, in checkpoints of runs too."""
    model = rewire.convert(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "fa")
    wiring = model[0]._rewire.wiring
    state = wiring.__getstate__()
    del state["_counts"]
    restored = type(wiring).__new__(type(wiring))
    restored.__setstate__(state)
    assert restored.counts is False
