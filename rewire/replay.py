"""The same forward twice: random numbers, buffers and draws put back to where they were before the first one."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from rewire.errors import PassError
from rewire.learned import PREFIX
from rewire.state import LayerState


class Before:
    """What a forward changes besides its outputs, as it was before.

    - random number generators: PyTorch's on the CPU and on the devices of the model and its inputs, NumPy's and
      Python's;
    - every buffer (batch statistics, power iterations, counters) but feedback that learns, which sees to it itself that
      a pass changes it once;
    - how often the layers' rules have redrawn their feedback.

    Args:
        model: whose forward is to be run again.
        inputs: the tensors it is given; a forward that changes them in place cannot be run again.
        layers: the converted ones.
    """

    def __init__(self, model: nn.Module, inputs: Any, layers: Iterable[LayerState]) -> None:
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self._inputs = [(x, x._version) for x in tensors if not x.is_inference()]
        self._draws = [(state, state.draws) for state in layers]
        self._buffers = [BuffersOf(module._buffers) for module in model.modules()]
        self._cpu = torch.get_rng_state()
        on_devices = [*model.parameters(), *model.buffers(), *tensors]
        self._devices, self._device_states = get_device_states(*on_devices)
        self._device_type = next((t.device.type for t in on_devices if t.device.type not in ("cpu", "meta")), None)
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def put_back(self) -> None:
        """Make everything as it was.

        Raises:
            PassError: if the forward has changed an input in place.
        """
        torch.set_rng_state(self._cpu)
        if self._device_type is not None:
            set_device_states(self._devices, self._device_states, device_type=self._device_type)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        self.put_back_buffers()
        for state, draws in self._draws:
            state.draws = draws
        if any(x._version != version for x, version in self._inputs):
            raise PassError(
                "the model changes its input in place, so its forward cannot be run a second time on the same input: "
                "let it work on a copy (x.clone()), or use loss.backward()"
            )

    def put_back_buffers(self) -> None:
        """The buffers alone."""
        for buffers in self._buffers:
            buffers.put_back()


class BuffersOf:
    """Those of one module, as they are now."""

    def __init__(self, owner: dict[str, Tensor | None]) -> None:
        self._owner = owner
        self._before = {name: buffer for name, buffer in owner.items() if not name.startswith(PREFIX)}
        self._values = {name: _once(b.detach()).clone() for name, b in self._before.items() if b is not None}

    def put_back(self) -> None:
        """Give them the values they had, and the module no others."""
        for name in [name for name in self._owner if name not in self._before and not name.startswith(PREFIX)]:
            del self._owner[name]
        self._owner.update(self._before)
        for name, value in self._values.items():
            buffer = self._before[name]
            assert buffer is not None
            # Not a change in autograd's eyes (as batch statistics are not): an older graph may have saved the buffer.
            _once(buffer.data).copy_(value)


def _once(t: Tensor) -> Tensor:
    """Each number of t once: along expanded dimensions, the first of them."""
    if t.layout is not torch.strided:
        return t
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(dim, 0, 1)
    return t
