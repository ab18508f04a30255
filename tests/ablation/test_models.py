"""The models of the ablation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewire.ablation import InputError
from rewire.ablation.models import build, names


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
