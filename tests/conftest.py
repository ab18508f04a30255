"""Set-up for all tests."""

import torch

import tests.torchvision_stub  # noqa: F401

# Tiny tensors: a second thread only waits, and test processes run side by side.
torch.set_num_threads(1)
