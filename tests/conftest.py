"""Set-up for all tests."""

import contextlib

import torch

# Tiny tensors: a second thread only waits, and test processes run side by side.
torch.set_num_threads(1)

# torchvision's compiled operations belong to other builds of torch than the CPU one. Importing torchvision (as
# timm does) needs no more than their names.
_operations = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):
        _operations.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
