"""How the feedback of direct rules learns: what passes show, and when it is taken in.

A :class:`~rewire.rules.base.LearnedDirect` rule asks some passes to be handed back exactly. In those (or, if it looks
at inputs alone, in all) each layer input gathers sums: of errors e, exact gradients G and inputs x, whatever the rule
wants of them. The next forward takes them in, summed over ranks, and the rule changes B. Nothing changes during a
pass, which may be recomputed in its backward.

Everything is said in rows. A row of e belongs to one row of x and G, or to a run of them: of tokens, or of pixels,
which all get the same feedback.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewire.buffers import memory_of, remember
from rewire.distributed import Groups, sum_tensors_over_ranks
from rewire.feedback import standard_normal
from rewire.layer_feedback import held_B
from rewire.rules.base import DirectRule, LearnedDirect, Rows
from rewire.ways import find, plan

if TYPE_CHECKING:
    from rewire.passes import OutputError
    from rewire.picks import Pick
    from rewire.state import LayerState
    from rewire.wiring import Wiring

Sums = dict[str, Tensor]


def look(state: LayerState, rule: DirectRule, x: Tensor) -> Tensor | None:
    """What the rule will want of a layer input x in the backward: x P as rows (M, r), or x itself.

    P is random, fixed, and the same for all positions.
    """
    if not isinstance(rule, LearnedDirect):
        return None
    if rule.watches:
        return x.detach()
    if not rule.context:
        return None
    with torch.no_grad():
        rows = flat(x.detach(), state.kind.axis(x.dim()))
        return rows @ glance(state, rule.context, rows.shape[1]).to(device=rows.device, dtype=rows.dtype)


def glance(state: LayerState, context: int, features: int) -> Tensor:
    """P (features, context) for :func:`look`, with entries of variance 1/features."""
    found = state.glanced
    if found is None or found.shape != (features, context):
        unit = standard_normal((features, context), seed=state.wiring.seed, name=f"{state.name}:context")
        found = state.glanced = unit / math.sqrt(features)
    return found


def flat(t: Tensor, axis: int) -> Tensor:
    """A tensor with its features at ``axis`` as rows (M, features)."""
    return (t if axis == -1 else t.movedim(axis, -1)).reshape(-1, t.shape[axis])


def unflat(rows: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """The inverse of :func:`flat`, contiguous."""
    if axis == -1:
        return rows.reshape(shape)
    lead = [n for i, n in enumerate(shape) if i != axis]
    return rows.reshape(*lead, shape[axis]).movedim(-1, axis).contiguous()


def errors_as_rows(
    state: LayerState,
    rule: LearnedDirect,
    error: OutputError,
    index: int,
    shape: torch.Size,
    dtype: torch.dtype,
    pick: Pick | None,
) -> Tensor:
    """e as rows (N, n), in the order of the rows of x; each serves a run of M/N of those.

    Args:
        shape: of x.
    """
    same = pick is not None and error.pick is not None and pick.same(error.pick)
    signal = error.signal(rule) if same else error.whole(rule)
    whole = pick.whole(shape) if pick is not None and not same else shape
    structure = state.structure(rule).routing
    route = plan(state, rule, error, whole, signal.shape, structure)
    signal = signal.to(dtype)
    if route.runs and (pick is None or same):
        return route.before(signal)
    # Whatever the way is, e of n features takes it as an x of n features would be given.
    axis = state.kind.axis(len(whole))
    n = signal.shape[error.axis]
    narrow = torch.Size([n if i == axis % len(whole) else size for i, size in enumerate(whole)])
    along = plan(state, rule, error, narrow, signal.shape, "channel")
    led = along(signal, torch.eye(n, dtype=dtype, device=signal.device))
    return flat(led if pick is None or same else pick(led), axis)


def together(
    state: LayerState,
    rule: LearnedDirect,
    errors: list[OutputError],
    index: int,
    shape: torch.Size,
    dtype: torch.dtype,
    pick: Pick | None,
) -> Tensor | None:
    """The errors of all output layers that arrived, as rows (N, n) side by side; None if there are none."""
    parts: dict[str, Tensor] = {}
    for error in errors:
        if error.error is not None and error.here():
            parts[error.state.name] = errors_as_rows(state, rule, error, index, shape, dtype, pick)
    if not parts:
        return None
    known = [output for output, i in state.shapes if i == index]
    if known == list(parts):
        rows = list(parts.values())
        if len(rows) == 1:
            return rows[0]
    most = max(len(rows) for rows in parts.values())  # errors of different grids: rows are repeated
    parts = {output: rows.repeat_interleave(most // len(rows), 0) for output, rows in parts.items()}
    first = next(iter(parts.values()))
    widths = {output: state.shapes[output, index][0] for output in known}
    return torch.cat([parts.get(o, first.new_zeros(most, widths[o])) for o in known], 1)


def context_part(e: Tensor, seen: Tensor, C: Tensor) -> Tensor:
    """What the layer's own input adds: sum over i, j of e_i c_j C_ij, as rows (M, features).

    Args:
        e: (N, n). seen: c, (M, r), M a multiple of N. C: (n, r, features).
    """
    n, r, features = C.shape
    by_run = (e @ C.reshape(n, r * features)).reshape(len(e), r, features)
    return torch.bmm(seen.reshape(len(e), -1, r), by_run).reshape(-1, features)


def find_shapes(
    state: LayerState,
    rule: LearnedDirect,
    errors: list[OutputError],
    index: int,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    pick: Pick | None,
) -> None:
    """See to it that the shape of every B that will be needed is known."""
    for error in errors:
        if error.error is not None and error.here() and (error.state.name, index) not in state.shapes:
            whole = shape if pick is None else pick.whole(shape)
            find(state, rule, error, index, whole, error.whole(rule).shape, dtype, device)


def hand_back(
    state: LayerState,
    rule: DirectRule,
    errors: list[OutputError],
    index: int,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    pick: Pick | None,
    seen: Tensor,
) -> Tensor | None:
    """Feedback under a rule that looked at the layer's input: e B, and what its context adds."""
    assert isinstance(rule, LearnedDirect)
    e = None
    C = memory_of(state, index).get("C")
    if C is not None or rule.watches:
        find_shapes(state, rule, errors, index, shape, dtype, device, pick)
    if C is not None and rule.context:
        e = together(state, rule, errors, index, shape, dtype, pick)
    if rule.watches and not state.wiring.rests:
        gather(state, rule, errors, index, shape, None, pick, seen, dtype)
    fed = state.hand_back(rule, errors, index, shape, dtype, device, pick)  # lets go of e
    if e is None or fed is None or C is None:
        return fed
    added = context_part(e, seen.to(dtype), C.to(dtype=dtype, device=device))
    return fed + unflat(added, shape, state.kind.axis(len(shape)))


def study(
    state: LayerState,
    rule: DirectRule,
    errors: list[OutputError],
    index: int,
    exact: Tensor,
    pick: Pick | None,
    seen: Tensor | None,
) -> None:
    """Let a rule whose feedback learns see the exact gradient of a pass."""
    assert isinstance(rule, LearnedDirect)
    find_shapes(state, rule, errors, index, exact.shape, exact.dtype, exact.device, pick)
    gather(state, rule, errors, index, exact.shape, exact, pick, seen, exact.dtype)


def gather(
    state: LayerState,
    rule: LearnedDirect,
    errors: list[OutputError],
    index: int,
    shape: torch.Size,
    exact: Tensor | None,
    pick: Pick | None,
    seen: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Let the rule sum up what this pass shows of one layer input. Called in the backward.

    Args:
        exact: backprop's own gradient of the input; None in passes that the rule fed back.
        seen: what :func:`look` made of the input.
    """
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    with torch.no_grad():
        e = together(state, rule, errors, index, shape, wide, pick)
        if e is None:
            return
        axis = state.kind.axis(len(shape))
        whole = has_values_for_elements(state, index)
        if whole:
            e = per_image(e, shape[0] if axis == 1 else 1)
        wanted = exact if seen is None or not rule.watches else seen
        rows = Rows(
            e=e,
            exact=None if exact is None else flat(exact.detach().to(wide), axis),
            seen=None if seen is None else (flat(seen, axis) if rule.watches else seen).to(wide),
            wide=wanted.detach().to(wide).reshape(len(e), -1) if whole and wanted is not None else None,
        )
        sums = rule.gather(rows)
        add(state, index, {**sums, "samples": e.new_full((), len(e))})


def has_values_for_elements(state: LayerState, index: int) -> bool:
    """Whether B has a value for every element of an image, and not only for every channel."""
    return any(len(needed) > 2 for (_, i), needed in state.shapes.items() if i == index)


def per_image(e: Tensor, images: int) -> Tensor:
    """Rows of e (N, n) as one for each of as many ``images``, which it has one for several of, or several for each."""
    if len(e) < images:
        return e.repeat_interleave(images // len(e), 0)
    return e if len(e) == images else e.reshape(images, -1, e.shape[1])[:, 0]


def add(state: LayerState, index: int, sums: Sums) -> None:
    """Add to what is gathered for one input, until the next forward takes it in."""
    so_far = state.gathered.setdefault(index, {})
    for name, value in sums.items():
        so_far[name] = so_far[name] + value if name in so_far else value


def step(wiring: Wiring) -> bool:
    """Take in what the passes since the last forward have shown.

    Returns:
        Whether some layer's passes are now handed back differently (exactly, or not any more).
    """
    wiring.passes += 1
    learners = [state for state in wiring.layers.values() if isinstance(state.rule, LearnedDirect)]
    _sum_over_ranks(learners, wiring.groups)
    samples = [
        sums["samples"] for state in learners if state.exact for sums in state.gathered.values() if "samples" in sums
    ]
    wiring.sampled = wiring.sampled + max(int(number) for number in samples) if samples else 0
    for state in learners:
        rule = state.rule
        assert isinstance(rule, LearnedDirect)
        for index, sums in state.gathered.items():
            _learn(state, rule, index, sums)
        state.gathered = {}
    changed = False
    for state in learners:
        assert isinstance(state.rule, LearnedDirect)
        exact = not wiring.rests and state.rule.exact(wiring.passes, wiring.sampled)
        changed |= exact != state.exact
        state.exact = exact
    return changed


def _sum_over_ranks(learners: list[LayerState], groups: Groups) -> None:
    places = [(state, index) for state in learners for index in sorted(state.gathered)]
    tensors = [value for state, index in places for _, value in sorted(state.gathered[index].items())]
    summed = iter(sum_tensors_over_ranks(tensors, groups))
    for state, index in places:
        state.gathered[index] = {name: next(summed) for name in sorted(state.gathered[index])}


def joined(state: LayerState, index: int) -> Tensor:
    """B of one input, (n, features or elements), of all output layers side by side."""
    held = [held_B(state, output, index) for output, i in state.shapes if i == index]
    return torch.cat([b.flatten(1) for b in held])


def _learn(state: LayerState, rule: LearnedDirect, index: int, sums: Sums) -> None:
    if not all(map(_finite, sums.values())):
        state.wiring.warn_once(
            f"learn:{state.name}",
            f"layer {state.label}: a pass from which its feedback was to learn is not finite, and is left out (usual "
            "for the first steps under a gradient scaler)",
        )
        return
    held = [held_B(state, output, index) for output, i in state.shapes if i == index]
    B = joined(state, index).to(next(iter(sums.values())).dtype)
    memory = memory_of(state, index)
    made = rule.learn(B, memory, sums)
    for b, part in zip(held, torch.split(made, [len(b) for b in held]), strict=True):
        b.copy_(part.reshape(b.shape))
    remember(state, index, memory)


def _finite(value: Tensor) -> bool:
    """Whether all entries are. A sum that is finite says so by itself; one that is not may have run over."""
    return math.isfinite(float(value.sum())) or bool(value.isfinite().all())
