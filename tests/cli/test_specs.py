"""Models by name: what is built, with what inputs and loss, and how wrong names are refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rewire.errors import InputError
from rewire.preview import call
from rewire.specs import resolve
from rewire.specs.losses import default_loss

MODULE = """
import torch
from torch import nn

def alone():
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30, 5))

def words():
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))

def with_inputs():
    return nn.Linear(4, 2), torch.ones(3, 4)

def with_loss():
    return nn.Linear(4, 2), (torch.ones(3, 4),), lambda y: 5 * y.sum()

def broken():
    raise KeyError("no data here")

def nothing():
    return nn.ReLU()

def a_number():
    return 3

def no_parts():
    return ()

class Net:
    small = staticmethod(lambda: nn.Linear(2, 2))

constant = 4
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory that holds a module called ``given_models``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "given_models", raising=False)
    importlib.invalidate_caches()
    (tmp_path / "given_models.py").write_text(MODULE)
    return tmp_path


def run_once(spec: str, batch: int = 2) -> tuple[nn.Module, float]:
    model, inputs, loss_fn = resolve(spec).build(batch)
    assert model.training
    loss = loss_fn(call(model, inputs))
    assert loss.dim() == 0
    loss.backward()
    return model, float(loss.detach())


@pytest.mark.parametrize(
    ("spec", "kind", "most"),
    [
        ("torchvision:resnet18", "ResNet", 12e6),
        ("torchvision:lraspp_mobilenet_v3_large", "LRASPP", 4e6),
        ("torchvision:ssdlite320_mobilenet_v3_large", "SSD", 4e6),
        ("timm:vit_tiny_patch16_224", "VisionTransformer", 6e6),
        ("hf:bert", "BertForMaskedLM", 1e5),
        ("hf:t5", "T5ForConditionalGeneration", 1e5),
        ("hf:wav2vec2", "Wav2Vec2ForCTC", 1e5),
        ("hf:clip", "CLIPModel", 1e5),
        ("hf:mixtral", "MixtralForCausalLM", 1e5),
        ("hf:mamba", "MambaForCausalLM", 1e5),
    ],
)
def test_each_source_gives_a_model_that_trains(spec: str, kind: str, most: float) -> None:
    model, loss = run_once(spec)

    assert type(model).__name__ == kind
    assert sum(p.numel() for p in model.parameters()) < most
    assert np.isfinite(loss) and loss > 0
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_same_seed_gives_the_same_model_and_the_global_random_state_stays() -> None:
    spec = resolve("hf:bert")
    before = torch.get_rng_state()
    one, two, other = spec.build(seed=3), spec.build(seed=3), spec.build(seed=4)

    assert torch.equal(torch.get_rng_state(), before)
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[key])
    assert all(torch.equal(one.inputs[name], two.inputs[name]) for name in one.inputs)
    assert not torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1", "hf:gpt2"])
def test_the_batch_is_as_large_as_asked_for(spec: str) -> None:
    inputs = resolve(spec).build(batch=5).inputs
    tensors = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    assert {len(t) for t in tensors} == {5}


def test_trying_inputs_leaves_batch_statistics_alone() -> None:
    model = resolve("torchvision:resnet18").build().model
    assert int(model.bn1.num_batches_tracked) == 0
    assert not model.bn1.running_mean.any()


def test_a_tiny_configuration_is_the_default_one_but_for_sizes() -> None:
    transformers = pytest.importorskip("transformers")
    plain, config = transformers.BertConfig(), resolve("hf:bert").build().model.config

    different = {
        f.name for f in dataclasses.fields(plain) if getattr(plain, f.name, None) != getattr(config, f.name, None)
    }
    assert {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"} <= different
    assert different <= {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "use_cache",
        "dtype",
    }
    assert config.hidden_size % config.num_attention_heads == 0


def test_a_part_of_a_configuration_keeps_what_was_set_for_it_on_purpose() -> None:
    transformers = pytest.importorskip("transformers")
    from rewire.specs.shrink import Sizes, tiny

    plain = transformers.DetrConfig()
    assert tiny(plain, Sizes())["backbone_config"]["backbone"] == plain.backbone_config.backbone


def test_special_tokens_move_into_the_small_vocabulary() -> None:
    config = resolve("hf:gpt2").build().model.config
    assert 0 <= config.eos_token_id < config.vocab_size
    assert config.bos_token_id == config.eos_token_id


@pytest.mark.parametrize("name", ["config.json", ""])
def test_a_configuration_on_disk_is_built_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "bert",
                "architectures": ["BertForSequenceClassification"],
                "hidden_size": 24,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 20,
                "vocab_size": 50,
            }
        )
    )
    model = resolve(f"hf:{tmp_path / name}").build().model

    assert type(model).__name__ == "BertForSequenceClassification"
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (24, 3, 50)


@pytest.mark.parametrize(
    ("name", "shape"), [("alone", (2, 3, 32)), ("words", (2, 11)), ("with_inputs", (3, 4)), ("Net.small", (2, 2))]
)
def test_a_function_in_the_current_directory(here: Path, name: str, shape: tuple[int, ...]) -> None:
    assert tuple(resolve(f"given_models:{name}").build().inputs.shape) == shape


def test_a_function_may_bring_its_loss(here: Path) -> None:
    model, inputs, loss_fn = resolve("given_models:with_loss").build()
    expected = 5 * (model.weight.detach().numpy().sum() * 3 + model.bias.detach().numpy().sum() * 3)
    assert float(loss_fn(call(model, inputs)).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("torchvision:resnet19", "did you mean 'resnet18'"),
        ("timm:resnett18", "did you mean 'resnet"),
        ("hf:berrt", "did you mean 'bert'"),
        ("tim:resnet18", "did you mean 'timm'"),
        ("torchvison:resnet18", "did you mean 'torchvision'"),
        ("timm", "names no model"),
        ("timm:", "names no model"),
        ("hf:no/such/config.json", "no file or folder"),
        ("given_models:alon", "did you mean 'alone'"),
        ("given_models:constant", "not a function"),
        ("given_modules:alone", "no source or module 'given_modules'"),
        ("torchvision:quantized_resnet18", "for inference"),
        ("given_models:broken", "KeyError: 'no data here'"),
        ("given_models:nothing", "no layer to guess inputs from"),
        ("given_models:a_number", "returned int"),
        ("given_models:no_parts", "returned tuple, not a module"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_one(here: Path, spec: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(spec).build()
    assert says in str(caught.value)


def _absent(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _other_build(name: str) -> None:
    raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize(("fails", "says"), [(_absent, "pip install timm"), (_other_build, "another build of torch")])
def test_a_library_that_cannot_be_imported_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], None], says: str
) -> None:
    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(InputError) as caught:
        resolve("timm:resnet18")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_refuses_all_inputs_is_an_input_error_that_says_why(here: Path) -> None:
    (here / "given_models.py").write_text(
        "from torch import nn\n\nclass Net(nn.Linear):\n    def forward(self, x):\n"
        "        raise IndexError('only mine')\n"
        "\ndef make():\n    return Net(2, 2)\n"
    )
    with pytest.raises(InputError, match="IndexError: only mine"):
        resolve("given_models:make").build()


# -- the loss ------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_of_squares_over_all_tensors_of_any_structure() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.ones(2, 3, requires_grad=True), torch.full((4,), 2.0, requires_grad=True)
    targets = [torch.randn(t.shape, generator=random).numpy() for t in (a, b)]
    expected = (((a.detach().numpy() - targets[0]) ** 2).mean() + ((b.detach().numpy() - targets[1]) ** 2).mean()) / 2

    got = default_loss({"x": [a, torch.ones(3)], "deep": ({"y": b}, torch.arange(3), None)})

    assert float(got.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_a_loss_that_the_model_computed_is_taken_and_a_dict_of_losses_is_summed() -> None:
    own = torch.tensor(3.0, requires_grad=True)
    y = torch.ones(2, requires_grad=True)
    assert default_loss({"loss": own, "logits": y}) is own
    assert float(default_loss({"classification": own, "boxes": 2 * own}).detach()) == 9.0


def test_states_beside_predictions_count_only_where_there_is_nothing_else() -> None:
    y, state = torch.ones(2, requires_grad=True), torch.full((2,), 9.0, requires_grad=True)
    default_loss({"logits": y, "last_hidden_state": state}).backward()
    assert y.grad is not None and state.grad is None

    default_loss({"last_hidden_state": state}).backward()
    assert state.grad is not None


def test_an_output_without_a_gradient_is_an_error() -> None:
    with pytest.raises(InputError, match="without a floating tensor"):
        default_loss([torch.ones(2), "text"])
