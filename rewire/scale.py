"""How large feedback is: measured against what backprop hands back, or taken from the weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewire.distributed import several, sum_pairs
from rewire.errors import some
from rewire.rules.base import DirectRule

if TYPE_CHECKING:
    from rewire.passes import OutputError
    from rewire.picks import Pick
    from rewire.state import LayerState
    from rewire.wiring import Wiring

_LITTLE = 1e-6  # of the largest scale
_ROUNDING = 100 * torch.finfo(torch.float64).eps


def measure(
    state: LayerState, rule: DirectRule, errors: list[OutputError], index: int, exact: Tensor, pick: Pick | None
) -> None:
    """Note how large the exact gradient is, and how large unit feedback would be, on this pass."""
    fed = state.hand_back(rule, errors, index, exact.shape, exact.dtype, exact.device, pick)
    if fed is None:
        return
    try:
        exact, fed = exact.detach(), fed.detach()
    except RuntimeError:
        return  # many gradients at a time (is_grads_batched): PyTorch lets nobody look at them
    # float64: squares of tiny float16 or bfloat16 gradients must not vanish.
    sums = torch.stack([exact.double().square().sum(), fed.double().square().sum()]).tolist()
    before = state.sums or (0.0, 0.0)
    state.sums = (before[0] + sums[0], before[1] + sums[1])
    state.wiring.unsettled = state.wiring.news = True


def settle_scales(wiring: Wiring) -> None:
    """Scale each measured layer's feedback so that it is as large as what backprop handed back."""
    if all(state.sums is None for state in wiring.layers.values()):
        return
    if several() and not wiring.groups:
        wiring.warn_once(
            "ranks",
            "there are several processes, and none of DistributedDataParallel, fully_shard or replicate around "
            "this model: scale='auto' is measured on this rank alone. If others train the same layers, give all "
            "of them the same scale=..., for instance rewire.scales(model) of one",
        )
    # Of all layers, in an order all ranks have: one may have run here and not there.
    every = list(wiring.layers.values())
    sums = sum_pairs([state.sums or (0.0, 0.0) for state in every], wiring.groups)
    measured: list[LayerState] = []
    ratios: dict[str, float] = {}
    for state, (exact, fed) in zip(every, sums, strict=True):
        state.sums = None
        if exact == fed == 0 or state.scale is not None:
            continue
        measured.append(state)
        if math.isfinite(exact) and math.isfinite(fed) and exact > 0 and fed > 0:
            ratios[state.name] = math.sqrt(exact / fed)
        elif not math.isfinite(exact) or not math.isfinite(fed):
            wiring.warn_once(
                f"finite:{state.name}",
                f"layer {state.label}: the gradient of the measuring pass is not finite; it stays on backprop "
                "until a pass gives a finite one (usual for the first steps under a gradient scaler)",
            )
        elif fed > 0:
            state.silent_passes += 1
    _warn_of_little(wiring, ratios)
    typical = geometric_mean([*ratios.values(), *(s.scale for s in wiring.layers.values() if s.scale)])
    for state in measured:
        if state.name in ratios:
            set_scale(state, ratios[state.name], "measured")
        elif state.silent_passes and typical is not None:
            # A branch that starts at zero (a zero-initialised last norm of a residual block) hands back
            # exactly nothing in the first pass; its first small gradient would be no measure either.
            set_scale(state, typical, "backprop handed back zero; mean scale of the other layers")
        elif state.silent_passes:
            # Nor would the first gradients through an output layer that starts at zero be one: they are as
            # small as the first step.
            set_scale(state, _initial_scale(wiring, state), "backprop handed back zero; 1/sqrt(3 fan_in) of the output")
            wiring.warn_once(
                "zero",
                f"in the measuring pass nothing but zeros came down, as it does where the output layer starts at zero"
                f"{_or_under_silence(every)}. Feedback gets the scale of an output layer as PyTorch would initialise "
                "it; give another with scale=...",
            )
    if wiring.groups and typical is not None and all(math.isfinite(a + b) for a, b in sums):
        # Ranks must not measure at different times: what has not run on any of them by now is not waited for.
        for state in every:
            if not state.ran and isinstance(state.rule, DirectRule) and state.needs_scale(state.rule):
                set_scale(state, typical, "did not run in the measuring pass; mean scale of the other layers")


def _or_under_silence(states: list[LayerState]) -> str:
    """That layers which hand back nothing may be why nothing came down, if there are any."""
    silent = [state for state in states if isinstance(state.rule, DirectRule) and state.rule.silent]
    if not silent:
        return ""
    rules = ", ".join(dict.fromkeys(repr(state.rule) for state in silent))
    return f", or below layers under {rules}, which hand back zeros ({some([s.label for s in silent], 6)})"


def _warn_of_little(wiring: Wiring, ratios: dict[str, float]) -> None:
    """Say so if some layers are handed back next to nothing: under a fixed B it will stay so.

    Args:
        ratios: newly measured scales, by name of the layer.
    """
    if not ratios:
        return
    largest, smallest = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    count = sum(scale < _LITTLE * ratios[largest] for scale in ratios.values())
    if count:
        least, most = (f"{wiring.layers[name].label} {ratios[name]:.1e}" for name in (smallest, largest))
        wiring.warn_once(
            "little",
            f"{count} of {len(ratios)} layers get feedback of less than a millionth of another's (scale of layer "
            f"{least}, of layer {most}): scale='auto' makes it as large as backprop's gradient in the measuring pass, "
            "which vanishes in deep networks as PyTorch initialises them, and in blocks that start near zero. Such "
            "layers will hardly learn. Give scale=..., one number for all or {layer: number}; or start from other "
            "weights",
        )


def _initial_scale(wiring: Wiring, state: LayerState) -> float:
    """Standard deviation of the weight of the output layer above ``state``, by PyTorch's initialisation."""
    output, _ = next(iter(state.shapes))
    above = wiring.layers[output]
    shape = above.shapes.get((output, 0)) or next(iter(state.shapes.values()))
    return 1 / math.sqrt(3 * max(math.prod(shape[1:]), 1))


def set_scale(state: LayerState, scale: float, note: str) -> None:
    """Fix the scale. Feedback drawn with unit scale is drawn again, so that copies have the same bits."""
    state.scale, state.scale_note = scale, note
    passes = f"{state.tag}passes"
    state.learned = {name: tensor for name, tensor in state.learned.items() if name == passes}
    state.forget_routes()


def weight_scale(weight: Tensor) -> tuple[float, str]:
    """Standard deviation of a weight's entries, about their mean, and a note if it could not be used.

    A weight that is constant (zero-initialised, one number) has none, and feedback of zeros would cut
    everything below it off for good; such a layer gets PyTorch's own initial scale, 1/sqrt(3 fan_in).
    """
    if weight.numel() > 1:
        numbers = weight.detach().double()
        std, mean = float(numbers.std()), float(numbers.mean())
        # Of numbers that are all the same rounding makes a few units in the last place.
        if math.isfinite(std) and std > _ROUNDING * abs(mean):
            return std, ""
    fan_in = max(math.prod(weight.shape[1:]), 1)
    return 1 / math.sqrt(3 * fan_in), "the weight is constant; 1/sqrt(3 fan_in) instead"


def local_scale(state: LayerState, weight: Tensor) -> float:
    """s, measured now if the weight had no values at conversion."""
    if state.std is None:
        state.std, state.std_note = weight_scale(weight)
    return state.std


def root_mean_square(tensors: Iterable[Tensor]) -> float:
    """Over all entries of all of them that are floating point and have a value; 0 if there are none.

    Formed in float32: squares of float16 numbers may be too large for float16, or too small.
    """
    total, count = 0.0, 0
    for t in tensors:
        if t.is_floating_point() and t.numel() and not t.is_meta:
            dtype = torch.promote_types(t.dtype, torch.float32)
            total += float(torch.linalg.vector_norm(t.detach(), dtype=dtype)) ** 2
            count += t.numel()
    return math.sqrt(total / count) if count else 0.0


def geometric_mean(values: list[float]) -> float | None:
    """Of positive numbers; None if there are none."""
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else None
