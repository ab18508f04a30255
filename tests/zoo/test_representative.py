"""Forty models of every kind, tiny, under a local and a direct rule: what ``make zoo`` does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rewire.specs import Example, resolve
from rewire.specs.losses import default_loss
from tests.zoo.check import check_example


def images(model: nn.Module, size: int) -> Example:
    return Example(model.train(), torch.randn(2, 3, size, size), default_loss)


def swin(version: int) -> Example:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlock,
        SwinTransformerBlockV2,
    )

    more = {} if version == 1 else {"downsample_layer": PatchMergingV2}
    return images(
        SwinTransformer(
            patch_size=[4, 4],
            embed_dim=12,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[4, 4],
            num_classes=10,
            block=SwinTransformerBlock if version == 1 else SwinTransformerBlockV2,
            **more,
        ),
        32,
    )


def vit() -> Example:
    from torchvision.models import VisionTransformer

    return images(VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), 32)


def maxvit() -> Example:
    from torchvision.models import MaxVit

    return images(
        MaxVit(
            input_size=(64, 64),
            stem_channels=16,
            partition_size=4,
            block_channels=[16, 32],
            block_layers=[1, 1],
            head_dim=8,
            stochastic_depth_prob=0.2,
            num_classes=10,
        ),
        64,
    )


def convnext() -> Example:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return images(ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], 0.1, num_classes=10), 64)


def densenet() -> Example:
    from torchvision.models import DenseNet

    return images(DenseNet(8, (2, 2), 16, num_classes=10, memory_efficient=False), 64)


TINY: dict[str, Callable[[], Example]] = {
    "torchvision swin": lambda: swin(1),
    "torchvision swin v2": lambda: swin(2),
    "torchvision vit": vit,
    "torchvision maxvit": maxvit,
    "torchvision convnext": convnext,
    "torchvision densenet": densenet,
}
SPECS = Path(__file__).with_name("representative.txt").read_text().split()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("name", [*TINY, *SPECS])
def test_a_model_is_converted_trained_verified_and_restored(name: str, rule: str) -> None:
    torch.manual_seed(0)
    example = TINY[name]() if name in TINY else resolve(name).build()
    row = check_example(example, rule)
    assert not row["problems"]
    assert row["layers"].get("live", 0) >= 3
