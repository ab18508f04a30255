"""Feedback of local rules that learns: what a layer keeps for it, and when that changes.

What is *trained* is a Parameter of the layer. Its gradient is made of the weight's own by one small autograd node: the
layer's operation is given a stand-in for its weight, of the same values, whose backward hands the gradient on to the
weight and, as the rule says, to the feedback. So it reaches both through one graph, as hooks, gradient accumulation
and wrappers expect.

Everything else is a buffer, and changes in forwards, not when they are run again in a backward: what passes have shown
is summed over ranks when the next forward of the model begins, and taken in by the layer's next call, as mirror steps
are. A buffer is replaced, not changed in place: a pass hands back what its forward found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewire.distributed import sum_tensors_over_ranks, unknown_to_wrapper
from rewire.errors import PassError, some
from rewire.feedback import quick_normal, standard_normal
from rewire.followed import Kept, apart, follow
from rewire.layers.form import Form
from rewire.layers.kinds import BackwardWeight
from rewire.learning import flat
from rewire.modes import outside_of_modes
from rewire.passes import backward_id
from rewire.rules.base import LearnedLocal
from rewire.structures.dense import semi_orthogonal

if TYPE_CHECKING:
    from rewire.state import LayerState
    from rewire.wiring import Wiring

_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active

_STEPS = "mirrored"  # buffer: number of mirror steps, which the next one's noise is keyed with
_PASSES = "passes"  # buffer: number of passes, which decide when the next mirror step is due
_PATIENCE = 3  # optimizer steps that change the weight alone, before that is said
_LONG = 300  # changes of the feedback after which it should have come nearer to the weight
_UNMIRRORED = 100  # passes without any mirror step, before that is said


class _Draw:
    """Random numbers for one layer; none for a layer without values."""

    def __init__(self, seed: int, name: str, nothing: bool) -> None:
        self.seed, self.name, self.nothing = seed, name, nothing

    def _stream(self, what: str) -> str:
        return self.name if what == "B" else f"{self.name}:{what}"  # B starts as fa's R

    def normal(self, what: str, shape: tuple[int, ...]) -> Tensor:
        if self.nothing:
            return torch.empty(shape, device="meta")
        return standard_normal(shape, seed=self.seed, name=self._stream(what))

    def orthogonal(self, what: str, shape: tuple[int, int]) -> Tensor:
        if self.nothing:
            return torch.empty(shape, device="meta")
        unit: Tensor = semi_orthogonal(shape, seed=self.seed, name=self._stream(what))
        return unit / math.sqrt(max(shape))  # rows or columns of length 1


class Learner:
    """The feedback of one layer under a :class:`~rewire.rules.base.LearnedLocal` rule, for as long as it is converted.

    It goes on under :func:`rewire.use_rule`: what is trained gets its gradient in passes under other rules too.

    Attributes:
        rule: the rule it was converted to.
        form: of the layer's weight.
        steps: how many mirror steps there were.
    """

    def __init__(self, state: LayerState, rule: LearnedLocal, form: Form) -> None:
        self.state = state
        self.rule = rule
        self.form = form
        self.names: tuple[str, ...] = ()
        self.steps = 0
        self._undrawn = False
        self._wrapped = False  # it is known that whatever is around the model knows of the Parameters
        self._entered_at = -1
        self._mirrored_at = -1
        self._sums: dict[str, Tensor] = {}  # of the passes since the last forward, on this rank
        self._taken: dict[str, Tensor] = {}  # of earlier ones, on all ranks: to be taken in by the next call
        self._versions: tuple[Any, ...] = ()
        self._alone = 0  # times in a row that the weight changed and the feedback did not
        self._changes = 0
        self._gap: float | None = None
        self._shapes: dict[str, torch.Size] = {}  # of what the rule gathers
        self._device: torch.device | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_versions": (), "_alone": 0, "_wrapped": False}

    # -- in the module -------------------------------------------------------------------------------

    def begin(self, module: nn.Module) -> None:
        """Put everything into ``module``, as it is at the start."""
        weight = self._weight(module)
        self._undrawn = weight.is_meta
        with outside_of_modes():
            made = self._start(weight)
        self.names = tuple(made)
        for name, tensor in made.items():
            full = self.state.tag + name
            if name in self.rule.trained:
                # What is frozen gets no gradient, so wrappers must not wait for one.
                module.register_parameter(full, nn.Parameter(tensor, requires_grad=weight.requires_grad))
            else:
                module.register_buffer(full, tensor)
        if self.rule.watches:
            with torch.no_grad():
                nothing = weight.new_zeros((0, self.form.rows))
                shown = self.rule.gather(
                    nothing.to(torch.promote_types(nothing.dtype, torch.float32)), made, slice(None)
                )
            self._shapes = {name: t.shape for name, t in shown.items()}
        if self.rule.every is not None:
            for name in (_STEPS, _PASSES):
                module.register_buffer(self.state.tag + name, torch.zeros((), dtype=torch.int64, device=weight.device))

    def _start(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state
        scale = 1.0 if weight.is_meta else state.local_scale(weight.detach())
        with torch.no_grad():
            made = self.rule.start(self.form, scale, _Draw(state.wiring.seed, state.name, weight.is_meta))
            wide = torch.promote_types(weight.dtype, torch.float32)  # small steps vanish in formats of two bytes
            return {
                name: t.to(device=weight.device, dtype=weight.dtype if name in self.rule.trained else wide).contiguous()
                for name, t in made.items()
            }

    def kept(self, module: nn.Module) -> dict[str, Tensor]:
        """What the rule keeps, by the rule's names."""
        found: dict[str, Tensor] = {}
        for name in self.names:
            full = self.state.tag + name
            tensor = module._parameters.get(full)
            found[name] = module._buffers[full] if tensor is None else tensor  # type: ignore[assignment]
        return found

    def feedback(self, module: nn.Module) -> Tensor:
        """B, of the weight's shape, as the next pass will use it."""
        self.take_in(module)
        with apart(self._weight(module).device):
            return self.rule.feedback(self.kept(module), self.form).detach()

    def size(self, module: nn.Module) -> int:
        """Bytes of all that is kept."""
        return sum(t.numel() * t.element_size() for t in self.kept(module).values())

    def describe(self, module: nn.Module) -> str:
        """What is kept, for tables."""
        kinds = {True: "Parameter", False: "buffer"}
        return "learns: " + ", ".join(
            f"{self.state.tag}{name} {'×'.join(map(str, t.shape))} ({kinds[name in self.rule.trained]})"
            for name, t in self.kept(module).items()
        )

    def save(self, module: nn.Module) -> None:
        """Before saving: what passes have shown is taken in, and counts are in the module."""
        self.take_in(module)
        for name, value in ((_STEPS, self.steps), (_PASSES, self.state.wiring.passes)):
            buffer = module._buffers.get(self.state.tag + name)
            if buffer is not None and not buffer.is_meta:
                buffer.fill_(value)

    def loaded(self, module: nn.Module, there: bool) -> None:
        """After loading. ``there``: the checkpoint had feedback."""
        self._sums, self._taken, self._versions, self._gap, self._changes = {}, {}, (), None, 0
        if not there:
            return
        self._undrawn = False
        self._mirrored_at = -1
        steps, passes = (module._buffers.get(self.state.tag + name) for name in (_STEPS, _PASSES))
        if steps is not None and passes is not None and not steps.is_meta:
            self.steps = int(steps)
            self.state.wiring.passes = int(passes)

    def _weight(self, module: nn.Module) -> Tensor:
        weight = module._parameters.get(self.state.kind.parameter)
        return self.state.kind.look(module) if weight is None else weight

    # -- in a call -----------------------------------------------------------------------------------

    def enter(self, module: nn.Module) -> None:
        """A call of the layer begins: take in what there is, if the time is right."""
        wiring = self.state.wiring
        # Run again in a backward, it has to find everything as it was; unless its first run was without gradients, as
        # under re-entrant activation checkpointing.
        again = backward_id() != -1 and self._entered_at == wiring.passes
        if wiring.still or again:
            return
        self._entered_at = wiring.passes
        if _transforming():
            if self.rule.watches or self.rule.every:
                wiring.warn_once(
                    "learned:transform",
                    f"layer {self.state.label} and others like it: under torch.func transforms the feedback of "
                    f"{self.rule!r} is used, but learns nothing from passes or noise: run ordinary passes too, or "
                    "rewire.mirror(model, steps=...)",
                )
            return
        if not self._wrapped:
            self._wrapped = True
            for name in self.rule.trained:
                if unknown_to_wrapper(self.kept(module)[name]):
                    raise PassError(
                        f"layer {self.state.label}: its feedback is a Parameter, made after DistributedDataParallel "
                        "was put around the model, and so not summed over ranks: convert first, then wrap"
                    )
        if self._undrawn and not self._weight(module).is_meta:
            self._undrawn = False
            with torch.no_grad():
                for name, tensor in self._start(self._weight(module)).items():
                    self.kept(module)[name].copy_(tensor)
        self.take_in(module)
        if not isinstance(self.state.rule, LearnedLocal):
            return
        every = self.rule.every
        if every and wiring.passes % every == 0 and self._mirrored_at != wiring.passes:
            self._mirrored_at = wiring.passes
            self.mirror(module)
        self._look(module)

    def stand_in(self, module: nn.Module, weight: Tensor) -> Tensor:
        """What the operation is given in place of the weight: the same values, and gradients for what is trained."""
        if not self.rule.trained or not weight.requires_grad:
            return weight
        kept = self.kept(module)
        return follow(weight, self.rule, self.form, tuple(kept), *kept.values())

    def backward(self, module: nn.Module, weight: Tensor | None) -> BackwardWeight:
        """The backward weight of one call. ``weight``: the stand-in its operation is given, if that is made already."""
        return Kept(self.rule, self.form, self.kept(module), weight)

    def watch(self, module: nn.Module, y: Any, axis: int | None, index: int) -> None:
        """Look at delta, if the rule wants it.

        Args:
            y: what the layer's operation gave.
            axis: its dimension that holds the features; None: not known.
            index: 1 + the first of the weight's rows that were used, where another module uses a part; else 0.
        """
        wiring = self.state.wiring
        if not self.rule.watches or wiring.still or _transforming():
            return
        if not isinstance(y, Tensor) or not y.requires_grad:
            return
        if axis is None:
            raise PassError(
                f"layer {self.state.label}: {self.rule!r} has to know where the features of its output are, and a "
                f"module around it uses its weight in an einsum: use another rule, layers={{{self.state.name!r}: 'fa'}}"
            )
        kept, first = self.kept(module), max(index - 1, 0)
        self._device = y.device

        def see(delta: Tensor) -> None:
            with apart(delta.device):
                rows = flat(delta, axis)
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                for name, value in self.rule.gather(rows, kept, slice(first, first + rows.shape[1])).items():
                    self._sums[name] = self._sums[name] + value if name in self._sums else value

        hook: Callable[..., Any] = y.register_hook
        hook(see)

    # -- between passes ------------------------------------------------------------------------------

    def take_in(self, module: nn.Module) -> None:
        """Let the rule learn what passes have shown."""
        if self._taken and not self.state.wiring.still:
            taken, self._taken = self._taken, {}
            with outside_of_modes(), apart(self._weight(module).device):
                self._replace(module, self.rule.learn(self.kept(module), taken))

    def mirror(self, module: nn.Module, steps: int = 1) -> None:
        """Mirror steps; nothing but what the rule keeps is touched."""
        weight = _whole(self.state.kind.look(module))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for _ in range(steps):
            self.steps += 1

            def noise(samples: int) -> Tensor:
                return quick_normal(
                    (samples, self.form.columns),
                    seed=self.state.wiring.seed,
                    name=f"{self.state.name}:mirror",
                    draw=self.steps,
                    scale=1.0,
                ).to(device=weight.device, dtype=dtype)

            with outside_of_modes(), apart(weight.device):
                self._replace(module, self.rule.mirror(weight, self.kept(module), self.form, noise))

    def angle(self, module: nn.Module) -> float:
        """Between W and B, in degrees."""
        W, B = _whole(self.state.kind.look(module)).double(), self.feedback(module).double()
        cosine = float((W * B).sum() / (W.norm() * B.norm()).clamp_min(torch.finfo(torch.float64).tiny))
        return float(torch.rad2deg(torch.acos(torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1))))

    def _replace(self, module: nn.Module, changed: Mapping[str, Tensor]) -> None:
        for name, tensor in changed.items():
            full = self.state.tag + name
            before = module._buffers[full]
            assert before is not None
            module._buffers[full] = tensor.to(device=before.device, dtype=before.dtype)

    # -- nothing silent ------------------------------------------------------------------------------

    def _look(self, module: nn.Module) -> None:
        """Notice feedback that does not learn."""
        wiring = self.state.wiring
        if self.rule.every is not None and not self.steps and wiring.passes >= _UNMIRRORED:
            wiring.complain("mirror", self.state)
        weight = module._parameters.get(self.state.kind.parameter)
        if not self.rule.trained:
            return
        if weight is None:
            wiring.complain("reparametrized", self.state)
            return
        kept = self.kept(module)
        versions = (weight._version, *(kept[name]._version for name in self.rule.trained))
        before, self._versions = self._versions, versions
        if not before or versions[0] == before[0]:
            return
        if versions[1:] == before[1:]:
            self._alone += 1
            if self._alone == _PATIENCE:
                wiring.complain("optimizer", self.state)
            return
        self._alone = 0
        self._changes += 1
        if self._changes in (1, _LONG):
            with apart(weight.device):
                gap = self.rule.gap(weight, kept, self.form)
            size = None if gap is None else float(gap.double().norm())
            if self._changes == 1:
                self._gap = size
            elif size is not None and self._gap is not None and size > 0.999 * self._gap > 0:
                wiring.complain("decay", self.state)

    # -- all ranks together --------------------------------------------------------------------------

    def shown(self, device: torch.device) -> list[Tensor]:
        """What this rank's passes have shown since the last forward: zeros if nothing, in the same shapes."""
        found, self._sums = self._sums, {}
        return [
            found.get(name, torch.zeros(shape, device=self._device or device)) for name, shape in self._shapes.items()
        ]

    def take(self, sums: list[Tensor]) -> None:
        """What all ranks' have, to be taken in by the layer's next call."""
        for name, value in zip(self._shapes, sums, strict=True):
            self._taken[name] = self._taken[name] + value if name in self._taken else value


def step(wiring: Wiring) -> None:
    """Between two passes: what one has shown is summed over ranks, and what went wrong is said."""
    learners = [s.learner for s in wiring.layers.values() if s.learner is not None and s.learner.rule.watches]
    if learners:
        device = next((d for learner in learners if (d := learner._device) is not None), torch.device("cpu"))
        shown = [learner.shown(device) for learner in learners]
        summed = iter(sum_tensors_over_ranks([t for tensors in shown for t in tensors], wiring.groups))
        for learner, tensors in zip(learners, shown, strict=True):
            learner.take([next(summed) for _ in tensors])
    for what, names in wiring.complaints.items():
        wiring.warn_once(f"learned:{what}", f"layers {some([*map(repr, names)], 6)}: {_COMPLAINTS[what]}")
    wiring.complaints = {}


_COMPLAINTS = {
    "optimizer": "their weights change, and their learned feedback does not: it is a Parameter (rewire_...) that the "
    "optimizer has to hold. Build the optimizer after convert(), or add those parameters to it",
    "decay": f"their feedback is as far from the weight as it was {_LONG} steps ago. It comes nearer by weight "
    "decay alone: give the optimizer a weight_decay, or a larger one, for feedback and weights alike. Under pfa (as "
    "under ldfa) use SGD, with or without momentum: Adam and AdamW scale each entry's step by itself, and feedback and "
    "weight then take steps that do not belong together",
    "reparametrized": "their weight is made of other parameters since they were converted (pruning, a "
    "parametrization), and so their feedback gets no gradient: it learns no more. Take that off again "
    "(prune.remove), or keep them on another rule, layers={...: 'fa'}",
    "mirror": f"under 'wm' for {_UNMIRRORED} passes without a mirror step: call rewire.mirror(model, steps=...), or "
    "convert with wm(every=1)",
}


def _whole(weight: Tensor) -> Tensor:
    """All of a weight that may be sharded."""
    gather: Callable[[], Tensor] | None = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()
