"""Importing torchvision beside a torch that it was not built for.

torchvision's compiled operations belong to other builds of torch than the CPU one. Importing torchvision (as timm
does) needs no more than their names; detectors also need :func:`detectors` to be called.
"""

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

operations = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):
        operations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def detectors() -> None:
    """Let detectors run without compiled operations: suppression of boxes in plain torch, pooling of regions eagerly."""
    extension = importlib.import_module("torchvision.extension")
    if extension._has_ops():
        return
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None
    operations.impl("nms", suppressed, "CPU")
    # torchvision has one in Python for this case, which it compiles at the first call.
    pooling: Any = importlib.import_module("torchvision.ops.roi_align")
    pooling._roi_align = pooling._roi_align.__wrapped__


def suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices, best score first, of the boxes that overlap no better one by more than ``threshold``."""
    order = scores.argsort(descending=True, stable=True)
    low, high = boxes[order].chunk(2, 1)
    sides = (torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)).clamp(min=0)
    shared, area = sides.prod(2), (high - low).prod(1)
    over = (shared / (area[:, None] + area - shared) > threshold).triu(1)
    kept = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if kept[i]:
            kept &= ~over[i]
    return order[kept]
