"""Importing torchvision beside a torch that it was not built for.

torchvision's compiled operations belong to other builds of torch than the CPU one. Importing torchvision (as timm
does) needs no more than their names.
"""

import contextlib

import torch

operations = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):
        operations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
