"""Importing torchvision beside a torch that it was not built for.

torchvision's compiled operations belong to other builds of torch than the CPU one. Importing torchvision (as timm
does) needs no more than their names; detectors also need :func:`detectors` to be called.
"""

import contextlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def load() -> None:
    """The compiled operations, where they do load: to define their names once more would end the process."""
    found = importlib.util.find_spec("torchvision")
    for folder in (found and found.submodule_search_locations) or ():
        for compiled in Path(folder).glob("_C*.so"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(compiled)


load()
operations = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        operations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def detectors() -> None:
    """Put plain torch in the place of the compiled operations that detectors need, if those are missing."""
    if importlib.import_module("torchvision.extension")._has_ops():
        return
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None
    operations.impl("nms", suppressed, "CPU")
    # torchvision's own in Python is meant to be compiled, and slow otherwise.
    pooling: Any = importlib.import_module("torchvision.ops.roi_align")
    pooling._roi_align = pooled


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


def pooled(images: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool) -> Tensor:
    """``torchvision.ops.roi_align``.

    Args:
        images: (N, C, H, W).
        rois: (K, 5): number of the image, x1, y1, x2, y2.
        ratio: samples in a cell, in either direction; 0: as many as it has pixels.

    Returns:
        (K, C, height, width)
    """
    low, high = (rois[:, 1:] * scale - (0.5 if aligned else 0.0)).chunk(2, 1)
    sides = high - low if aligned else (high - low).clamp(min=1)
    ratios = torch.full((len(rois), 2), ratio)
    if ratio <= 0:
        ratios = (sides / torch.tensor([width, height])).ceil().long()
    out = images.new_zeros(len(rois), images.shape[1], height, width)
    for image, *across in torch.cat([rois[:, :1].long(), ratios], 1).unique(dim=0).tolist():
        rows = torch.where((rois[:, 0] == image) & (ratios == torch.tensor(across)).all(1))[0]
        found = cells(images[image], low[rows], sides[rows], (width, height), across)
        out = out.index_copy(0, rows, found)
    return out


def cells(image: Tensor, low: Tensor, sides: Tensor, counts: tuple[int, int], ratios: list[int]) -> Tensor:
    """Means of ``ratios`` samples (across, down) in each of ``counts`` cells of each region of one image."""

    def samples(low: Tensor, side: Tensor, cells: int, ratio: int, size: int) -> tuple[Tensor, Tensor]:
        at = low[:, None] + side[:, None] * (torch.arange(cells * ratio).to(low) + 0.5) / (cells * ratio)
        return at.clamp(0, size - 1) / max(size - 1, 1) * 2 - 1, (at >= -1) & (at <= size)

    x, x_inside = samples(low[:, 0], sides[:, 0], counts[0], ratios[0], image.shape[2])
    y, y_inside = samples(low[:, 1], sides[:, 1], counts[1], ratios[1], image.shape[1])
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    inside = y_inside[:, None, :, None] & x_inside[:, None, None, :]
    found = F.grid_sample(image[None], grid.flatten(0, 1)[None], align_corners=True)
    found = found[0].unflatten(1, (len(low), counts[1] * ratios[1])).transpose(0, 1) * inside
    return F.avg_pool2d(found, (ratios[1], ratios[0]))
