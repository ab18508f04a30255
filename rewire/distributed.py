"""What must be the same on every rank is summed over the ranks that train one model together.

An initialised process group alone does not tell which ranks those are, and a collective that the others do not join
would hang. So the groups are those of whoever reduces the gradients: the DistributedDataParallel whose forward is
running, or the ``fully_shard`` (or ``replicate``) that a layer's parameters are under.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rewire.errors import PassError
from rewire.rules.base import DirectRule

if TYPE_CHECKING:
    from rewire.state import LayerState

Groups = tuple[Any, ...]  # of process groups: one for each dimension of the mesh that data is split over


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_parallel_forward() -> bool:
    """Whether the forward of a DistributedDataParallel is running, which every rank runs."""
    return _active() is not None


def groups_of(module: nn.Module) -> Groups:
    """The process groups whose ranks train a layer together, called in its forward; none if nobody says so."""
    if not several():
        return ()
    active = _active()
    if active is not None:
        return (active.process_group,)
    return _sharding_groups(module)


def stage_of_pipeline() -> tuple[int, int] | None:
    """Number of the pipeline stage whose forward is running, and of all stages; None outside of pipelines.

    A stage is an ordinary model to itself. Only who called it shows that there are others; looked for in first passes.
    """
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    kind = getattr(pipelining, "_PipelineStageBase", None)
    frame = sys._getframe() if kind is not None else None
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):  # type: ignore[arg-type]
            return int(caller.stage_index), int(caller.num_stages)
        frame = frame.f_back
    return None


def is_split(module: nn.Module) -> bool:
    """Whether a layer's parameters are split over ranks while it runs, as tensor parallelism leaves them."""
    tensor = sys.modules.get("torch.distributed.tensor")
    kind = getattr(tensor, "DTensor", None)
    return kind is not None and any(isinstance(p, kind) for p in module._parameters.values())


def sum_over_ranks(tensor: Tensor, groups: Groups) -> Tensor:
    """The sum of each rank's ``tensor``, which has the same shape on all; in place, and returned."""
    for group in groups:
        device = _device_of(group)
        if device is None or device.type == tensor.device.type:
            dist.all_reduce(tensor, group=group)
        else:
            there = tensor.to(device)
            dist.all_reduce(there, group=group)
            tensor.copy_(there)
    return tensor


def sum_pairs(pairs: Sequence[tuple[float, float]], groups: Groups) -> list[tuple[float, float]]:
    """:func:`sum_over_ranks` for numbers."""
    if not groups or not pairs:
        return list(pairs)
    table = sum_over_ranks(torch.tensor(pairs, dtype=torch.float64), groups)
    return [(float(a), float(b)) for a, b in table.tolist()]


def check_ranks(state: LayerState, module: nn.Module) -> None:
    """In first passes: whether its rule can be followed on this rank."""
    if is_split(module):
        raise PassError(
            f"layer {state.label}: its weight is split over ranks (a DTensor, as tensor parallelism makes it), and "
            f"rule {state.rule!r} knows no feedback that is split with it. Keep the layer on backprop, "
            f"layers={{{state.name!r}: 'bp'}}, or shard it with fully_shard instead"
        )
    stage = stage_of_pipeline() if isinstance(state.rule, DirectRule) and not state.rule.silent else None
    if stage is not None and stage[0] < stage[1] - 1:
        raise PassError(
            f"layer {state.label} is in stage {stage[0]} of a pipeline of {stage[1]}, and rule {state.rule!r} needs "
            "the output error, which only the last stage has. Use a local rule in this stage, "
            f"layers={{{state.name!r}: 'fa'}}, or backprop, or train without a pipeline"
        )


def _active() -> DistributedDataParallel | None:
    if not dist.is_available():
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


def sum_tensors_over_ranks(tensors: Sequence[Tensor], groups: Groups) -> list[Tensor]:
    """Each tensor summed over ranks. Every rank has to give as many, of the same shapes."""
    if not groups or not tensors:
        return list(tensors)
    flat = sum_over_ranks(torch.cat([t.reshape(-1).double() for t in tensors]), groups)
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def _device_of(group: Any) -> torch.device | None:
    """Where a group's backend wants its tensors; None: anywhere."""
    kinds: Callable[[Any], Iterable[torch.device]] = lambda g: g._device_types  # noqa: E731
    try:
        types = [torch.device(kind) for kind in kinds(group)]
    except (AttributeError, RuntimeError):
        return None
    if not types or any(kind.type == "cpu" for kind in types):
        return None
    return torch.device(types[0].type, torch.accelerator.current_device_index())


def _sharding_groups(module: nn.Module) -> Groups:
    """Of the ``fully_shard`` that holds a parameter of ``module``.

    In a forward the parameters are gathered, plain tensors, so only PyTorch's own table of sharded modules knows.
    """
    try:
        from torch.distributed._composable_state import _module_state_mapping as table
    except ImportError:
        return ()
    for found in list(table.values()):
        for part in getattr(found(), "_fsdp_param_groups", ()):
            infos = (parameter._module_info for parameter in part.fsdp_params)
            if any(module is owner for info in infos for owner in (info.module, *info.shared_modules)):
                names = ("shard_process_group", "replicate_process_group")
                return tuple(group for name in names if (group := getattr(part.mesh_info, name, None)) is not None)
    return ()
