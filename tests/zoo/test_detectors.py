"""The stand-ins for torchvision's compiled operations do what those do."""

import importlib
import itertools

import torch

from tests.torchvision_stub import pooled, suppressed


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_pooled_regions_are_torchvisions():
    own = importlib.import_module("torchvision.ops.roi_align")
    reference = getattr(own._roi_align, "__wrapped__", None)
    assert reference is not None, "taken before anything is replaced"
    images = randn(2, 3, 9, 12).requires_grad_()
    low, high = (randn(2, 7, 2).sigmoid() * torch.tensor([24, 18])).sort(0)[0]
    rois = torch.cat([torch.tensor([0, 1, 0, 0, 1, 1, 0])[:, None], low, high], 1)
    for aligned, ratio in itertools.product((False, True), (0, 2)):
        options = (0.5, 3, 2, ratio, aligned)
        ours, wanted = pooled(images, rois, *options), reference(images, rois, *options)
        torch.testing.assert_close(ours, wanted)
        back = randn(*ours.shape)
        torch.testing.assert_close(
            torch.autograd.grad(ours, images, back)[0], torch.autograd.grad(wanted, images, back)[0]
        )


def test_suppressed_boxes():
    corners = randn(40, 2) * 3
    boxes = torch.cat([corners, corners + 2 + randn(40, 2).abs()], 1)
    scores = randn(40)

    def overlap(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    kept = []
    for i in sorted(range(40), key=lambda i: -scores[i]):
        if all(overlap(boxes[i].tolist(), boxes[j].tolist()) <= 0.4 for j in kept):
            kept.append(i)
    assert suppressed(boxes, scores, 0.4).tolist() == kept and len(kept) < 40
