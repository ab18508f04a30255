"""How the feedback of direct rules learns: what passes show, and when it is taken in.

A :class:`~rewire.rules.base.LearnedDirect` rule asks some passes to be handed back exactly. In those (or, if it looks
at inputs alone, in all) each layer input gathers sums: of errors e, exact gradients G and inputs x, whatever the rule
wants of them. The next forward takes them in, summed over ranks, and the rule changes B. Nothing changes during a
pass, which may be recomputed in its backward.

Everything is said in rows. A row of e belongs to one row of x and G, or to a run of them: of tokens, or of pixels,
which all get the same feedback. Where a sample's rows are not next to one another (a sequence that comes first, batches
behind one another), they are put so before a rule sees them, and what it learns does not depend on their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewire.agree import Member, agree
from rewire.buffers import memory_of, name_of, remember
from rewire.distributed import Groups, sum_tensors_over_ranks
from rewire.feedback import standard_normal
from rewire.layer_feedback import held_B, made_for
from rewire.rules.base import DirectRule, LearnedDirect, Rows
from rewire.structures import Feedback
from rewire.ways import find, plan

if TYPE_CHECKING:
    from rewire.passes import OutputError
    from rewire.picks import Pick
    from rewire.state import LayerState
    from rewire.wiring import Wiring

Sums = dict[str, Tensor]
Behind = tuple[int, int] | None


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


@dataclass(frozen=True)
class Like:
    """Shape, dtype and device of a layer's input x."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def wide(self) -> torch.dtype:
        """What sums are formed in."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32


def shown(state: LayerState, error: OutputError, index: int, signal: Tensor, x: Like) -> Tensor:
    """What a rule that learns is shown of a signal: what the structure of B leaves to be learned from."""
    shape = state.shapes[error.state.name, index]
    B = made_for(state, error.state.name, index, shape, (x.dtype, x.device))
    return B.shown(signal, error.axis, error.shared) if isinstance(B, Feedback) else signal


def errors_as_rows(
    state: LayerState,
    rule: LearnedDirect,
    error: OutputError,
    index: int,
    x: Like,
    dtype: torch.dtype,
    pick: Pick | None,
    behind: Behind = None,
) -> Tensor:
    """e as rows (N, n), in the order of the rows of x; each serves a run of M/N of those.

    With a structure that squeezes e, n is what is left.

    Args:
        behind: how the rows of x will be put in order before they meet those of e.
    """
    shape = x.shape
    same = pick is not None and error.pick is not None and pick.same(error.pick)
    signal = shown(state, error, index, error.signal(rule) if same else error.whole(rule), x)
    whole = pick.whole(shape) if pick is not None and not same else shape
    structure = state.structure(rule).routing
    route = plan(state, rule, error, whole, signal.shape, structure)
    signal = signal.to(dtype)
    if route.runs and route.behind == behind and (pick is None or same):
        return route.before(signal)
    # Whatever the way is, e of n features takes it as an x of n features would be given.
    axis = state.kind.axis(len(whole))
    n = signal.shape[error.axis]
    narrow = torch.Size([n if i == axis % len(whole) else size for i, size in enumerate(whole)])
    along = plan(state, rule, error, narrow, signal.shape, "channel")
    led = along(signal, torch.eye(n, dtype=dtype, device=signal.device))
    if pick is None or same:
        return flat(led, axis)
    picked = pick(led)
    rows = flat(picked, axis)
    if route.runs and len(route.before(signal)) <= math.prod(pick.lead):  # the same at all places of what was picked
        return rows.reshape(len(picked), -1, n)[:, 0]
    return rows


def together(
    state: LayerState,
    rule: LearnedDirect,
    errors: list[OutputError],
    index: int,
    x: Like,
    dtype: torch.dtype,
    pick: Pick | None,
    behind: Behind = None,
) -> Tensor | None:
    """The errors of all output layers that arrived, as rows (N, n) side by side; None if there are none."""
    known = [output for output, i in state.shapes if i == index]
    parts: dict[str, Tensor] = {}
    for error in errors:
        if error.error is not None and error.here() and error.state.name in known:
            parts[error.state.name] = errors_as_rows(state, rule, error, index, x, dtype, pick, behind)
    if not parts:
        return None
    if known == list(parts):
        rows = list(parts.values())
        if len(rows) == 1:
            return rows[0]
    most = max(len(rows) for rows in parts.values())  # errors of different grids: rows are repeated
    parts = {output: rows.repeat_interleave(most // len(rows), 0) for output, rows in parts.items()}
    first = next(iter(parts.values()))
    widths = {output: rows_of(state, output, index) for output in known}
    return torch.cat([parts.get(o, first.new_zeros(most, widths[o])) for o in known], 1)


def rows_of(state: LayerState, output: str, index: int) -> int:
    """How many rows B has for a rule that learns: what it is shown of that output layer's e."""
    return state.structures[output, index].heard(state.shapes[output, index])


def behind_one_another(
    state: LayerState, rule: LearnedDirect, errors: list[OutputError], shape: torch.Size, pick: Pick | None
) -> Behind:
    """:attr:`~rewire.routing.Route.behind` of x, if all errors that arrived agree on it; with rows picked, None."""
    if pick is not None:
        return None
    structure = state.structure(rule).routing
    found = {
        route.behind if route.runs else None
        for error in errors
        if error.error is not None and error.here()
        for route in [plan(state, rule, error, shape, error.whole(rule).shape, structure)]
    }
    return found.pop() if len(found) == 1 else None


def in_order(rows: Tensor, behind: Behind) -> Tensor:
    """Rows of x (M, ...), or its images, with those of a sample next to one another."""
    if behind is None:
        return rows
    return rows.reshape(*behind, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def context_part(e: Tensor, seen: Tensor, C: Tensor) -> Tensor:
    """What the layer's own input adds: sum over i, j of e_i c_j C_ij, as rows (M, features).

    Args:
        e: (N, n), or wider: of output layers seen after C was learned. seen: c, (M, r), M a multiple of N.
        C: (n, r, features).
    """
    n, r, features = C.shape
    by_run = (e[:, :n] @ C.reshape(n, r * features)).reshape(len(e), r, features)
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
    x = Like(shape, dtype, device)
    if C is not None and rule.context:
        e = together(state, rule, errors, index, x, dtype, pick)
    if rule.watches and not state.wiring.rests:
        gather(state, rule, errors, index, x, None, pick, seen)
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
    pick = None if pick is None else pick.found()
    find_shapes(state, rule, errors, index, exact.shape, exact.dtype, exact.device, pick)
    gather(state, rule, errors, index, Like(exact.shape, exact.dtype, exact.device), exact, pick, seen)


def gather(
    state: LayerState,
    rule: LearnedDirect,
    errors: list[OutputError],
    index: int,
    x: Like,
    exact: Tensor | None,
    pick: Pick | None,
    seen: Tensor | None,
) -> None:
    """Let the rule sum up what this pass shows of one layer input. Called in the backward.

    Args:
        exact: backprop's own gradient of the input; None in passes that the rule fed back.
        seen: what :func:`look` made of the input.
    """
    shape, wide = x.shape, x.wide
    behind = behind_one_another(state, rule, errors, shape, pick)
    # With gradients on if they are: what is made of e on the way is kept for what is handed back.
    e = together(state, rule, errors, index, x, wide, pick, behind)
    if e is None:
        return
    with torch.no_grad():
        e = e.detach()
        axis = state.kind.axis(len(shape))
        images = shape[0] if axis == 1 else 1
        whole = has_values_for_elements(state, index)
        if whole:
            e = per_image(e, images)
        wanted = exact if seen is None or not rule.watches else seen
        if seen is not None:
            seen = (flat(seen, axis) if rule.watches else seen).to(wide)
        rows = Rows(
            e=e,
            exact=None if exact is None else in_order(flat(exact.detach().to(wide), axis), behind),
            seen=None if seen is None else in_order(seen, behind),
            wide=in_order(wanted.detach().to(wide).reshape(images, -1), behind)
            if whole and wanted is not None
            else None,
            mask=partial(mask_of, state, index),
        )
        sums = rule.gather(rows)
        add(state, index, {**sums, "samples": e.new_full((), len(e))})


def has_values_for_elements(state: LayerState, index: int) -> bool:
    """Whether B has a value for every element of an image, and not only for every channel."""
    return any(len(needed) > 2 for (_, i), needed in state.shapes.items() if i == index)


def per_image(e: Tensor, images: int) -> Tensor:
    """Rows of e (N, n), of which each place of an image may have one: at most one for each of so many ``images``."""
    return e if len(e) <= images else e.reshape(images, -1, e.shape[1])[:, 0]


def add(state: LayerState, index: int, sums: Sums) -> None:
    """Add to what is gathered for one input, until the next forward takes it in.

    What was gathered before a further output layer was seen is dropped: it is of another width.
    """
    outputs = width(state, index)
    if state.gathered_of.get(index) != outputs:
        state.gathered.pop(index, None)
        state.gathered_of[index] = outputs
    so_far = state.gathered.setdefault(index, {})
    for name, value in sums.items():
        so_far[name] = so_far[name] + value if name in so_far else value


def width(state: LayerState, index: int) -> int:
    """How many outputs B has, those of all output layers seen so far."""
    return sum(rows_of(state, output, i) for output, i in state.shapes if i == index)


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
    taught: set[Member] = set()
    for state in learners:
        rule = state.rule
        assert isinstance(rule, LearnedDirect)
        for index, sums in state.gathered.items():
            if _learn(state, rule, index, sums) and state.joint is not None:
                taught |= {(state, name_of(state, "B", index, output)) for output, i in state.shapes if i == index}
        state.gathered = {}
    if taught:
        agree(wiring, taught)
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


@dataclass(frozen=True)
class Part:
    """What learns of B for one input and one output layer, and the B it is a part of, perhaps in another dtype."""

    own: Tensor
    B: Tensor | Feedback

    @property
    def matrix(self) -> Tensor:
        """What the rule knows as B."""
        return self.B.as_matrix(self.own) if isinstance(self.B, Feedback) else self.own.flatten(1)

    def become(self, matrix: Tensor) -> None:
        """Take what the rule has made of it."""
        new = self.B.from_matrix(matrix) if isinstance(self.B, Feedback) else matrix
        self.own.copy_(new.reshape(self.own.shape))


def parts_of_B(state: LayerState, index: int) -> list[Part]:
    """Those of one input, by output layer."""
    places = [(output, index, state.shapes[output, index]) for output, i in state.shapes if i == index]
    return [
        Part(held_B(state, output, index), made_for(state, output, index, shape)) for output, index, shape in places
    ]


def joined(state: LayerState, index: int) -> Tensor:
    """B of one input, (n, features or elements), of all output layers side by side."""
    return torch.cat([part.matrix for part in parts_of_B(state, index)])


def mask_of(state: LayerState, index: int) -> Tensor | None:
    """Where :func:`joined` has entries, if not everywhere."""
    masks = [part.B.mask() if isinstance(part.B, Feedback) else None for part in parts_of_B(state, index)]
    found = [mask for mask in masks if mask is not None]
    return torch.cat(found) if found and len(found) == len(masks) else None


def _learn(state: LayerState, rule: LearnedDirect, index: int, sums: Sums) -> bool:
    """Let the rule change the feedback of one input; whether there was something to learn from."""
    if not all(map(_finite, sums.values())):
        state.wiring.warn_once(
            f"learn:{state.name}",
            f"layer {state.label}: a pass from which its feedback was to learn is not finite, and is left out (usual "
            "for the first steps under a gradient scaler)",
        )
        return False
    if state.gathered_of.get(index) != width(state, index):
        return False  # an output layer was seen for the first time since
    parts = parts_of_B(state, index)
    matrices = [part.matrix for part in parts]
    B = torch.cat(matrices).to(next(iter(sums.values())).dtype)
    mask = mask_of(state, index)
    memory = memory_of(state, index)
    for name in memory.keys() & sums.keys():  # to earlier passes the error of an output layer seen later was zero
        memory[name] = padded(memory[name], sums[name].shape)
    made = rule.learn(B, memory, sums if mask is None else {**sums, "mask": mask.to(B.device)})
    for part, new in zip(parts, torch.split(made, [len(matrix) for matrix in matrices]), strict=True):
        part.become(new)
    remember(state, index, memory)
    return True


def padded(t: Tensor, shape: torch.Size) -> Tensor:
    """``t`` with zeros behind it in every dimension in which ``shape`` is larger."""
    if t.shape == shape:
        return t
    larger = t.new_zeros(shape)
    larger[tuple(map(slice, t.shape))] = t
    return larger


def _finite(value: Tensor) -> bool:
    """Whether all entries are. A sum that is finite says so by itself; one that is not may have run over."""
    return math.isfinite(float(value.sum())) or bool(value.isfinite().all())
