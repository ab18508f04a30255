"""What must be the same on every rank is summed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def sum_over_ranks(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sums of each pair over the ranks that train this model together; the pairs themselves otherwise.

    "Together" is known inside a DistributedDataParallel forward, whose process group is used. Elsewhere
    an initialised process group alone does not tell that every rank trains this model, and a collective
    the others do not join would hang; so nothing is summed.
    """
    active = _active()
    if active is None:
        return list(pairs)
    table = torch.tensor(pairs, dtype=torch.float64, device=active.device)
    dist.all_reduce(table, group=active.process_group)
    return [(float(a), float(b)) for a, b in table.tolist()]


def _active() -> DistributedDataParallel | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    find: Callable[[], DistributedDataParallel | None] = DistributedDataParallel._get_active_ddp_module
    return find()


def unknown_to_wrapper(parameter: Tensor) -> bool:
    """Whether a DistributedDataParallel forward is running that was wrapped before it could see ``parameter``."""
    active = _active()
    if active is None:
        return False
    known: list[Tensor] = active._module_parameters
    return not any(parameter is other for other in known)


def sum_tensors_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over the ranks that train this model together; the tensors themselves otherwise.

    Every rank has to give as many, of the same shapes.
    """
    active = _active()
    if active is None or not tensors:
        return list(tensors)
    flat = torch.cat([t.reshape(-1).double() for t in tensors])
    dist.all_reduce(flat, group=active.process_group)
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]
