"""Set-up for all tests."""

from collections.abc import Iterator

import pytest
import torch

import tests.torchvision_stub  # noqa: F401
from rewire.rules.base import _registry

# Tiny tensors: a second thread only waits, and test processes run side by side.
torch.set_num_threads(1)


@pytest.fixture
def registry() -> Iterator[None]:
    """Rules that a test registers are forgotten after it."""
    before = dict(_registry)
    yield
    _registry.clear()
    _registry.update(before)
