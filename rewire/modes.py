"""Work of the library's own inside of somebody else's modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def outside_of_modes() -> Iterator[None]:
    """Outside of inference mode, of ``torch.func`` transforms and of modes that see every operation.

    What layers learn from passes is worked out whenever somebody asks. It outlives the mode that they ask in, and is no
    part of what a checkpointing policy, say, counts.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch._C._are_functorch_transforms_active():
            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        yield
