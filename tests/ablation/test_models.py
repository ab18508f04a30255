"""The models of the ablation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewire.ablation import InputError
from rewire.ablation.models import build, names, net


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 11, 9)])
def test_every_model_takes_images_of_any_size(name: str, shape: tuple[int, int, int]) -> None:
    assert build(name, shape, 7)(torch.randn(2, *shape)).shape == (2, 7)


def test_lenet_is_lenet() -> None:
    model = build("lenet", (1, 28, 28), 10)
    weights = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    assert weights == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 16, 5, 5), (84, 120), (10, 84)]
    assert model[0](torch.randn(1, 1, 28, 28)).shape == (1, 1, 32, 32)


def test_lenet_refuses_images_it_would_have_to_shrink() -> None:
    with pytest.raises(InputError, match="up to 32×32, got 40×32"):
        build("lenet", (1, 40, 32), 10)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "hf:vit"])
def test_a_library_s_model_takes_images_of_the_data(name: str) -> None:
    pytest.importorskip({"hf": "transformers"}.get(name.partition(":")[0], name.partition(":")[0]))
    before = torch.get_rng_state()
    made = net(name, (1, 8, 8), 10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(2, 1, 8, 8)
    assert made.size is not None and made.size[0] == 3
    assert made(x).shape == (2, 10)
    same, other = net(name, (1, 8, 8), 10, seed=3), net(name, (1, 8, 8), 10, seed=4)
    weights = [next(iter(each.model.parameters())) for each in (made, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_token_models_take_ids() -> None:
    pytest.importorskip("transformers")
    made = net("hf:gpt2", (12,), 20, seed=0)
    assert made.key == "input_ids" and made(torch.randint(20, (2, 12))).shape[:2] == (2, 12)


class Given(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 10))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "says"),
    [
        ("torchvision:resnet18", (1, 8, 8), 11, "predicts 10 classes, and the data have 11"),
        ("torchvision:resnet18", (2, 8, 8), 10, "3 channels, not 2"),
        ("torchvision:resnet18", (12,), 10, "takes images"),
        ("hf:bert", (1, 8, 8), 10, r"input_ids of shape \(N, T\)"),
        ("cnn", (12,), 10, "takes images"),
        ("tests.ablation.test_models:pytest", (1, 8, 8), 10, "not a function"),
        ("tests.ablation.test_models:net", (1, 8, 8), 10, "failed: TypeError"),
    ],
)
def test_what_does_not_go_together_is_said(name: str, shape: tuple[int, ...], classes: int, says: str) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=says):
        net(name, shape, classes, seed=0)


def test_a_model_of_one_s_own_needs_no_inputs_to_be_guessed() -> None:
    """Its first layer would fit many sizes, and only that of the data fits the last."""
    assert net("tests.ablation.test_models:Given", (1, 8, 8), 10, 0)(torch.randn(2, 1, 8, 8)).shape == (2, 10)
