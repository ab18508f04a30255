"""What belongs to one conversion: the layers' states, the output layers found, the newest output errors.

Nothing here points back at the modules, so copying or saving a part of a model copies no more than that,
and everything that can be made again (feedback, routes, errors of past passes) is left out of copies.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import uuid
import warnings
from collections.abc import Hashable, Iterable, Mapping
from enum import Enum
from threading import get_ident
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rewire import following, learning
from rewire.distributed import Groups, groups_of, in_parallel_forward, is_split, several, stage_of_pipeline, sum_pairs
from rewire.errors import PassError, RewireWarning, RoutingError
from rewire.feedback import quick_normal, standard_normal, streams
from rewire.guard import Guard
from rewire.layers.kinds import Kind
from rewire.learned import PREFIX
from rewire.passes import OutputError, backward_id
from rewire.picks import Pick
from rewire.routing import Reading, Route, route_to
from rewire.rules.base import DirectRule, LearnedDirect, LocalRule, Rule, Schedule
from rewire.structures import Feedback, Place, Structure, resolve
from rewire.structures.base import Cache

_SMALL = 64  # features of e up to which a product with B in the forward costs less than a node of ours in the backward
_HELD = 2**19  # numbers that all layers' feedback may have where all of it is made at once: what a cache holds


# Every conversion alive, by number. Compiled graphs can name a conversion, but not hold one.
conversions: WeakValueDictionary[int, Wiring] = WeakValueDictionary()
_keys = itertools.count()


# Names of learned tensors, after the layer's tag: what it is, of which input, of which output layer.
_NAME = re.compile(r"([A-Za-z]+)(?:_(\d+))?(?:_at_(.*))?")


class Role(Enum):
    """What the first pass showed a layer to be."""

    UNKNOWN = "not seen yet"
    HIDDEN = "hidden"
    OUTPUT = "output"


class Wiring:
    """Everything the layers of one converted model share.

    Attributes:
        seed: of all feedback.
        skip: ``"keep"`` or ``"cut"``.
        structure: of the feedback of direct rules that do not carry one of their own.
        scale: ``"auto"``, one standard deviation for all, or one by layer name.
        asked: output layers named by the user, or None to find them.
        outputs: output layers found so far, in the order that decides which feedback they use.
        layers: states by qualified name, in registration order.
        errors: the newest e of each output layer, by name.
        unsettled: a pass has shown something that the next forward has to take in.
        guard: looks at gradients that arrive at layers, if ``on_nonfinite`` asked for it.
        news: of roles and scales.
        passed: where passes count: there was one.
        passes: how many there were.
        sampled: samples shown by those of them, up to the newest, that were handed back exactly without a break.
        rests: nothing is learned now, and passes do not count: for a look at the model that is to leave it as it is.
        probed: the pass before which the newest forward-mode probe was taken.
        probe_count: how many were taken, in this process.
        certain: the role of every layer is known.
        pours: rows of some layer were seen to be added up by index (:mod:`rewire.pours`).
        unclear: names of layers whose rows were picked by an index that could not be followed.
        local: there is one output layer, and nobody is handed its error.
        looked: a pass has been taken in: uses of weights by other modules have been seen.
        compiled: some of its calls have been part of a compiled graph, which reads what :meth:`prepare` makes.
        prepared: all layers are ready for such a graph, and nothing has changed since.
        unnamed: output layers of the backward under way that ``asked`` does not name.
        unready: why, in words, layers under direct rules cannot be part of such graphs now; "" if they can.
        apart: they have run outside of one, and stay there.
        bypassed: parameters that met an activation outside of any call, in passes not taken in yet.
        readings: orders of sequence and batch dimension that passes have shown.
        key: a number of its own in this process: its name in compiled graphs.
        origin: the same in all copies.
        common: what structures of feedback keep once for all layers.
        groups: process groups of the ranks that train these layers together, as measuring passes showed.
        wrapped: they were those of a wrapper whose forward has to be running for ranks to meet.
        still: a copy that is only looked at: local feedback does not learn.
        complaints: names of layers with something to be said about, by what that is.
    """

    def __init__(
        self,
        *,
        seed: int,
        skip: str,
        structure: Structure,
        scale: str | float | Mapping[str, float],
        asked: tuple[str, ...] | None,
        guard: Guard | None = None,
    ) -> None:
        self.guard = guard
        self.seed = seed
        self.skip = skip
        self.structure = structure
        self.scale = scale
        self.asked = asked
        self.outputs: list[str] = list(asked or ())
        self.layers: dict[str, LayerState] = {}
        self.errors: dict[str, Tensor] = {}
        self.unsettled = False
        self.news = False
        self.passed = False
        self.passes = 0
        self.sampled = 0
        self.rests = False
        self.probed = -1
        self.probe_count = 0
        self.looked = False
        self.compiled = False
        self.prepared = False
        self.unready = ""
        self.unnamed: list[str] = []
        self.apart = False
        self.certain = False
        self.local = False
        self.pours = False
        self.unclear: set[str] = set()
        self.bypassed: set[Tensor] = set()
        self._weights: dict[Tensor, LayerState] = {}  # of layers that ran in passes not taken in yet
        self.readings: set[Reading] = set()
        self.common: dict[Hashable, Any] = {}
        self.groups: Groups = ()
        self.wrapped = False
        self.still = False
        self.complaints: dict[str, list[str]] = {}
        self._warned: set[str] = set()
        self.origin = uuid.uuid4().hex
        self._register()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {
            "errors": {},
            "unnamed": [],
            "common": {},
            "bypassed": set(),
            "_weights": {},
            "prepared": False,
            "apart": False,
        }
        return {**self.__dict__, **fresh, "groups": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def _register(self) -> None:
        self.key = next(_keys)
        conversions[self.key] = self

    def rest(self) -> None:
        """Leave the feedback as it is from now on: for copies that are looked at."""
        self.rests = self.still = True
        for state in self.layers.values():
            state.gathered = {}
            if state.counts:
                state.refresh()

    @property
    def counts(self) -> bool:
        """Whether passes count: for feedback that learns, and for rules on a schedule."""
        return not self.rests and any(state.counts for state in self.layers.values())

    def outputs_label(self) -> str:
        """Names of the output layers, for messages."""
        return ", ".join(repr(name) for name in self.outputs) or "(none seen yet)"

    def warn_once(self, key: str, message: str) -> None:
        """Warn, the first time ``key`` comes up in this conversion."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RewireWarning, stacklevel=2)

    def complain(self, what: str, state: LayerState) -> None:
        """Something is to be said about a layer when the next pass begins, of all that it is true of together."""
        names = self.complaints.setdefault(what, [])
        if state.name not in names:
            names.append(state.name)

    def warned_like(self, other: Wiring) -> None:
        """Take for said what a copy has said."""
        self._warned |= other._warned

    def met(self, state: LayerState) -> None:
        """A layer of another conversion feeds one of this. Right for two models, but not for parts of one.

        A layer that was copied out of a converted model has a conversion of its own, as any copy has. Put back beside
        the others, it takes no part in their passes.
        """
        if state.wiring.origin != self.origin or not isinstance(state.rule, DirectRule):
            return
        here, there = ({s.name for s in wiring.layers.values() if s.ran} for wiring in (self, state.wiring))
        if not here & there:  # whole copies, one feeding the other, have all layers each
            self.warn_once(
                "copied part",
                f"layer {state.label} feeds a copy of layer {min(here)!r} that was made after conversion (by an "
                "adapter library, say), and copies are models of their own: no output error passes between the two. "
                "Convert the whole model again, rewire.convert(model, ...)",
            )

    def note_weight(self, state: LayerState, module: nn.Module) -> None:
        """In a first pass: whose weight is whose."""
        weight = state.kind.own(module) if state.kind.local else None
        if weight is not None:
            self._weights[weight] = state

    def _say_unclear(self) -> None:
        """Layers whose rows may get the feedback of other samples' errors."""
        for name in self.unclear:
            self.warn_once(
                f"rows:{name}",
                f"layer {self.layers[name].label}: rows of its input are picked from the batch by an index that could "
                "not be followed, so feedback may come from other samples' errors than their own. rewire.verify shows "
                f"whether it does; a local rule, layers={{{name!r}: 'fa'}}, or the module around it as a block, "
                "blocks=[...], needs no index",
            )
        self.unclear = set()

    def _say_bypassed(self) -> None:
        """Weights given to operations that nobody but the graph sees: kernels of somebody's own."""
        for weight in self.bypassed:
            state = self._weights.get(weight)
            if state is not None and not state.lost:
                state.dead("its weight is also used by an operation of another module's own")
        self.bypassed, self._weights = set(), {}

    def error_reached(self, state: LayerState, error: OutputError, gradient: Tensor) -> bool:
        """The gradient at the output of ``state`` is here. Whether it is the output error, not a hidden layer's own.

        Called in the backward of the layer's join, before any port upstream of it runs.
        """
        is_output = error.deliver(gradient)
        if is_output and self.asked is not None and state.name not in self.asked:
            self._unasked(state)
            return is_output
        if is_output:
            if self.unclear:
                self._say_unclear()
            if self.counts:
                self.passed = self.unsettled = True
            self.errors[state.name] = gradient.detach()
            if state.name not in self.outputs:
                self.outputs.append(state.name)
        if state.role is Role.OUTPUT:
            # Roles may be known from elsewhere, while no pass of this process has been looked at.
            if not self.looked:
                self.unsettled = self.news = True
            return is_output
        # Roles are votes of passes: a side loss alone may come first and look like the output.
        if is_output != error.voted:
            state.votes += 1 if is_output else -1
            error.voted = is_output
        state.seen = True
        self.unsettled = self.news = True
        return is_output

    def _unasked(self, state: LayerState) -> None:
        """Note an output layer that ``output=`` does not name; the error comes at the end, and names all."""
        if not self.unnamed:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._refuse)
        self.unnamed.append(state.name)

    def _refuse(self) -> None:
        assert self.asked is not None
        unnamed, self.unnamed = tuple(dict.fromkeys(self.unnamed)), []
        seen = tuple(name for name in self.layers if name in unnamed or name in self.errors)
        more = f" (at other times too: output={[*self.asked, *unnamed]!r})" if set(self.asked) - set(seen) else ""
        raise PassError(
            f"the loss sees the output of layer{'s' * (len(unnamed) > 1)} {', '.join(map(repr, unnamed))}, which "
            f"output={_one_or_all(self.asked)} does not name. Write output={_one_or_all(seen)}, every layer that this "
            f"loss sees{more}; or keep what is not named on backprop, layers={dict.fromkeys(unnamed, 'bp')!r}"
        )

    def settle_if_alone(self) -> None:
        """Settle for somebody who asks between passes. With several ranks the next forward does it, on all of them."""
        if self.unsettled and not several() and backward_id() == -1:
            self.settle()

    def note_ranks(self, module: nn.Module) -> None:
        """In the forward of a first pass: who trains these layers together."""
        if several() and not self.groups:
            self.groups = groups_of(module)
            self.wrapped = in_parallel_forward()

    def settle(self) -> None:
        """Take in what the last pass showed: roles and scales. Called by the next forward, never in backward.

        A backward may run forwards of its own (activation checkpointing), which must find everything as
        the first forward did; so nothing changes before the pass is over.
        """
        if self.groups and self.wrapped and not in_parallel_forward():
            return  # a call on this rank alone, perhaps; the others would not answer
        self.unsettled = False
        changed = False
        if self.passed:
            following.step(self)
        if self.passed and not self.news:
            changed = self._next_pass()
        if self.news:
            self._settle_news()
        elif changed:
            self.refresh()

    def _next_pass(self) -> bool:
        """Take in what the pass has shown to feedback that learns; then, whose turn it is by the schedules."""
        self.passed = False
        changed = learning.step(self)
        turned = [state.turn() for state in self.layers.values()]
        return changed or any(turned)

    def _settle_news(self) -> None:
        self.news = False
        self.looked = True
        for state in self.layers.values():
            if state.seen and state.role is not Role.OUTPUT:
                state.role = Role.OUTPUT if state.votes > 0 else Role.HIDDEN
        self.certain = all(state.role is not Role.UNKNOWN or state.idle for state in self.layers.values())
        self._forget_hidden_outputs()
        self._settle_scales()
        self._say_bypassed()
        if self.passed:  # after scales are known, and feedback drawn for good
            self._next_pass()
        self.refresh()

    def refresh(self) -> None:
        """Take in what is different about layers: their rules, roles or scales."""
        for state in self.layers.values():
            state.refresh()
        self.local = len(self.outputs) == 1 and not any(isinstance(s.rule, DirectRule) for s in self.layers.values())
        if self.compiled:  # graphs made before are used again, and must not find what was put there for another rule
            self.prepare()

    def prepare(self) -> None:
        """Get all layers ready for a compiled graph."""
        self.compiled = self.prepared = True
        states = self.layers.values()
        for state in states:
            state.prepare()
        running = [state for state in states if (state.ran or not self.looked) and not state.idle]
        direct = [state for state in running if isinstance(state.rule, DirectRule)]
        # The layers of a pass find each other on one graph: all of them are part of it, or none.
        self.unready = self._unready(direct) if direct else ""
        for state in states:
            state.in_graph = state.traceable and state.plain and not (direct and (self.unready or self.apart))
            state.joins_traced = state.role is Role.OUTPUT and bool(direct)

    def _unready(self, direct: list[LayerState]) -> str:
        if not self.looked:
            return "no ordinary training pass has come before the first compiled one"
        for state in self.layers.values():
            if state.ran and state.picks:
                return f"rows of the input of layer {state.label} are picked from the batch, or added up, by an index"
        outputs = [state for state in self.layers.values() if state.ran and state.role is Role.OUTPUT]
        for state in dict.fromkeys([*direct, *outputs]):
            if not (state.traceable and state.plain):
                return (
                    f"layer {state.label} cannot be part of a compiled graph under {state.rule!r}, or no ordinary "
                    "training pass has been under that rule yet"
                )
        return ""

    def part(self) -> None:
        """A layer under a direct rule runs outside of a compiled graph: from now on all do.

        Not until the reason is gone: what was compiled meanwhile breaks at every layer, and goes on being used.
        """
        if self.apart:
            return
        self.apart = True
        for state in self.layers.values():
            state.in_graph = False
        why = self.unready or "what was compiled under another rule breaks at every layer"
        self.warn_once(
            "compile",
            f"torch.compile: {why}. So layers under direct rules run outside of compiled graphs from now on, each a "
            "graph break: gradients are right, but little time is saved. What can be compiled can be with "
            "fullgraph=True, after one ordinary training pass",
        )

    def _forget_hidden_outputs(self) -> None:
        """A side loss came first: its layer is no output after all, and no feedback is named after it."""
        outputs = [name for name in self.outputs if self.layers[name].role is not Role.HIDDEN]
        if outputs != self.outputs:
            self.outputs = outputs
            self.errors = {name: e for name, e in self.errors.items() if name in outputs}
            for state in self.layers.values():
                state.forget_routes()
                state.shapes, state.structures = {}, {}

    def _settle_scales(self) -> None:
        """Scale each measured layer's feedback so that it is as large as what backprop handed back."""
        if all(state.sums is None for state in self.layers.values()):
            return
        if several() and not self.groups:
            self.warn_once(
                "ranks",
                "there are several processes, and none of DistributedDataParallel, fully_shard or replicate around "
                "this model: scale='auto' is measured on this rank alone. If others train the same layers, give all "
                "of them the same scale=..., for instance rewire.scales(model) of one",
            )
        # Of all layers, in an order all ranks have: one may have run here and not there.
        every = list(self.layers.values())
        sums = sum_pairs([state.sums or (0.0, 0.0) for state in every], self.groups)
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
                self.warn_once(
                    f"finite:{state.name}",
                    f"layer {state.label}: the gradient of the measuring pass is not finite; it stays on backprop "
                    "until a pass gives a finite one (usual for the first steps under a gradient scaler)",
                )
            elif fed > 0:
                state.silent_passes += 1
        typical = _geometric_mean([*ratios.values(), *(s.scale for s in self.layers.values() if s.scale)])
        for state in measured:
            if state.name in ratios:
                state.set_scale(ratios[state.name], "measured")
            elif state.silent_passes and typical is not None:
                # A branch that starts at zero (a zero-initialised last norm of a residual block) hands back
                # exactly nothing in the first pass; its first small gradient would be no measure either.
                state.set_scale(typical, "backprop handed back zero; mean scale of the other layers")
            elif state.silent_passes:
                # Nor would the first gradients through an output layer that starts at zero be one: they are as
                # small as the first step.
                state.set_scale(self._initial_scale(state), "backprop handed back zero; 1/sqrt(3 fan_in) of the output")
                self.warn_once(
                    "zero",
                    "in the measuring pass backprop handed back nothing but zeros, as it does where the output layer "
                    "starts at zero. Feedback gets the scale of an output layer as PyTorch would initialise it; give "
                    "another with scale=...",
                )
        if self.groups and typical is not None and all(math.isfinite(a + b) for a, b in sums):
            # Ranks must not measure at different times: what has not run on any of them by now is not waited for.
            for state in every:
                if not state.ran and isinstance(state.rule, DirectRule) and state.needs_scale(state.rule):
                    state.set_scale(typical, "did not run in the measuring pass; mean scale of the other layers")

    def _initial_scale(self, state: LayerState) -> float:
        """Standard deviation of the weight of the output layer above ``state``, by PyTorch's initialisation."""
        output, _ = next(iter(state.shapes))
        above = self.layers[output]
        shape = above.shapes.get((output, 0)) or next(iter(state.shapes.values()))
        return 1 / math.sqrt(3 * max(math.prod(shape[1:]), 1))


# How one shape of e reaches one shape of x, the feedback on the way, and the shape of its dense equivalent.
_Way = tuple[Route, Tensor | Feedback, tuple[int, ...]]


class LayerState:
    """One converted layer: its rule, its role, its feedback.

    Attributes:
        name: qualified name in the converted model; "" for a model that is itself one layer.
        kind: how to run it with another backward weight, and where its features are.
        given: its rule, or schedule of rules (changed by ``use_rule``).
        rule: what it hands back now: the rule given, or the one whose turn it is.
        role: what passes have shown it to be.
        scale: standard deviation of the entries of a direct feedback; None while not measured.
        scale_note: where the scale comes from.
        std: standard deviation of the entries of a local feedback; None while the weight is on ``meta``.
        ran: it has run with gradients on.
        start: root mean square of its output in the first call it ever ran in; None before that.
        functional: another module uses its weight directly (:mod:`rewire.hosts`).
        watched: such uses are, or may be, watched for.
        layout: the order of its input's dimensions, where whoever uses the weight is known to have one.
        stacked: batches that were seen to lie one behind the other in its input (:mod:`rewire.stacks`).
        picks: its input was seen to be rows picked from the batch by index, or its rows to be added up by one.
        idle: in its newest call neither it nor anything below it needed a gradient: it is frozen, and costs nothing.
        lost: who uses its weight in a way that the rule cannot be applied to, in words; "" if nobody was seen to.
        busy: threads in which it is running now.
        observer: called before and after each such use, as forward hooks are around a forward.
        used: the newest weight that a forward of the layer's own made, for rules that read it.
        settled: role and scale are known: ports and tickets from now on.
        steady: nothing special about its calls: a key of :data:`rewire.run.STEADY`, the short ways through a call.
        called: as an output layer on the short way, since an error last arrived.
        mirror: B, if it is small and e B all there is to its feedback: :func:`rewire.run.steady_direct` uses it.
        hold: up to how many numbers the join hands back itself, with all other layers' (:class:`rewire.edges.Join`).
        written: the rule as it is written: another rule makes another compiled graph (:mod:`rewire.traced`).
        traceable: a call of it alone could be part of a compiled graph.
        plain: its feedback is there, and plain tensors, which is what such a graph can be given.
        in_graph: its calls are, as are those of the layers it passes errors to and from.
        joins_traced: its output is joined to the pass there.
        fed: an input of it was seen to require a gradient.
        fixed: the feedback that graph is given; for direct rules, for each input one B for each of ``fixed_outputs``.
        kept_as: dtype and device of B, by (output layer, input), as the last pass needed it.
        random_as: shape, dtype and device of R, as the last pass needed it.
        exact: for feedback that learns: what is handed back now is backprop's own gradient.
        probe: the forward-mode probe that is under way (:mod:`rewire.jvp`).
        gathered: what passes have shown that is not taken in yet, by input.
        learned: B and whatever else its rule keeps, by the names they have in the module.
        linked: all of that is in the module.
        learner: what sees to a local rule's feedback that learns.
    """

    def __init__(
        self, name: str, kind: Kind, rule: Rule, wiring: Wiring, *, scale: float | None, std: float | None
    ) -> None:
        self.name = name
        self.kind = kind
        self.given = rule
        self.rule = rule.now(wiring.passes) if isinstance(rule, Schedule) else rule
        self.wiring = wiring
        self.role = Role.UNKNOWN
        self.scale = scale
        self.scale_note = "given" if scale is not None else ""
        self.std = std
        self.std_note = ""
        self.ran = False
        self.start: float | None = None
        self.functional = False
        self.watched = False
        self.busy: set[int] = set()
        self.idle = False
        self.lost = ""
        self.picks = False
        self.stacked = 1
        self.observer: tuple[Any, Any] | None = None
        self.seen = False
        self.votes = 0
        self.sums: tuple[float, float] | None = None
        self.silent_passes = 0
        self.draws = 0
        self.local: object = None
        self.used: Tensor | None = None
        self.settled = False
        self.steady = ""
        self.mirror: Tensor | None = None
        self.hold = 0
        self.called = False
        self.written = ""
        self.joins_traced = False
        self.traceable = False
        self.plain = True
        self.fed = False
        self.in_graph = False
        self.fixed: tuple[Tensor, ...] = ()
        self.fixed_outputs: tuple[str, ...] = ()
        self.random_as: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self.exact = False
        self.probe: Any = None
        self.gathered: dict[int, dict[str, Tensor]] = {}
        self.learned: dict[str, Tensor] = {}
        self.linked = True
        self.learner: following.Learner | None = None
        self._glance: Tensor | None = None
        self._random: dict[tuple[Any, ...], Tensor] = {}
        self._routes: dict[tuple[Any, ...], _Way] = {}
        self._made: dict[tuple[Any, ...], Tensor | Feedback] = {}
        # One attribute, read once and written once: threads may run backward side by side.
        self._last: tuple[tuple[Any, ...], Route, Tensor | Feedback] | None = None
        self.reading: Reading | None = None
        self.layout: str | None = None
        self.shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        self.structures: dict[tuple[str, int], Structure] = {}
        self.kept_as: dict[tuple[str, int], tuple[torch.dtype, torch.device]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Fixed feedback is made again from its seed: copies and files stay small, and cannot go stale.
        return {
            **self.__dict__,
            "_random": {},
            "_routes": {},
            "_made": {},
            "_last": None,
            "mirror": None,
            "fixed": (),
            "local": None,
            "observer": None,
            "busy": set(),
            "used": None,
            "probe": None,
            "_glance": None,
        }

    @property
    def label(self) -> str:
        """The name, quoted, for messages; the model itself has no name."""
        return repr(self.name) if self.name else "'' (the model itself)"

    @property
    def active(self) -> bool:
        """Whether the rule is anything but backprop."""
        return isinstance(self.rule, (LocalRule, DirectRule))

    @property
    def joins(self) -> bool:
        """Whether its output may be what the loss sees: until a pass shows otherwise, and then if it is.

        With output layers named by the user, a layer kept on backprop may sit above them.
        """
        role = self.role
        if role is not Role.UNKNOWN:
            return role is Role.OUTPUT
        return self.wiring.asked is None or self.active

    def needs_scale(self, rule: DirectRule) -> bool:
        """Whether the layer still waits for a pass to measure its feedback's scale."""
        return self.scale is None and not rule.silent

    def use(self, rule: Rule) -> None:
        """Hand back what ``rule`` says from now on."""
        self.given = rule
        self.turn()
        self.refresh()

    def turn(self) -> bool:
        """See whose turn it is, by the schedule; whether another rule's now. To be followed by :meth:`refresh`."""
        rule = self.given.now(self.wiring.passes) if isinstance(self.given, Schedule) else self.given
        if rule is self.rule:
            return False
        if rule.learns or self.rule.learns:  # their B is not what other rules make of the same seed
            self.forget_routes()
        self.rule = rule
        return True

    def refresh(self) -> None:
        """Recompute ``settled`` after role, scale or rule changed."""
        known = self.role is not Role.UNKNOWN
        direct = isinstance(self.rule, DirectRule)
        rule = self.rule
        learns = isinstance(rule, LearnedDirect)
        wiring = self.wiring
        self.exact = isinstance(rule, LearnedDirect) and not wiring.rests and rule.exact(wiring.passes, wiring.sampled)
        self.settled = known and not (isinstance(rule, DirectRule) and (self.needs_scale(rule) or self.exact))
        self.watched = self.functional or (self.watched and not (self.ran and self.wiring.looked))
        output = "output-" if self.role is Role.OUTPUT else ""
        self.steady = ""
        special = self.watched or self.picks or self.wiring.guard is not None or self.learner is not None
        if special or not self.kind.local or (learns and not self._as_fixed(rule)):
            pass  # something special about its calls; a block may be given anything
        elif direct:
            first = known and not self.fed and not learns  # never measured: there is nothing to hand back to
            self.steady = f"{output}direct" if (self.settled or first) and self.wiring.skip == "keep" else ""
        elif isinstance(self.rule, LocalRule) and known and self.kind.exchanges:
            self.steady = f"{output}local"
        self._last = self.mirror = None
        self.written = repr(self.rule)
        self.traceable = self._traceable()
        self.wiring.prepared = False

    def changed(self) -> None:
        """Take in something that a pass under way has shown about this layer alone."""
        self.refresh()
        if self.wiring.compiled:
            self.wiring.prepare()

    def _as_fixed(self, rule: Rule) -> bool:
        """Whether a pass that learns nothing is one as under fixed feedback."""
        return self.linked and isinstance(rule, LearnedDirect) and not rule.watches and not rule.context

    def _traceable(self) -> bool:
        """Whether a call of the layer can be part of a compiled graph (:mod:`rewire.traced`)."""
        rule = self.rule
        if not self.wiring.looked or self.watched or self.counts:
            return False
        if self.wiring.guard is not None or self.learner is not None:
            return False
        if self.idle:
            return True
        if isinstance(rule, LocalRule):
            return self.kind.exchanges and not rule.redraw and self.std is not None
        if isinstance(rule, DirectRule):
            known = self.settled or (self.role is not Role.UNKNOWN and not self.shapes)  # nothing to hand back to
            return known and self.wiring.skip == "keep" and not rule.needs_targets
        return True

    def prepare(self) -> None:
        """Put the feedback in order for a compiled graph: ``fixed``, for each input one B for each output layer."""
        rule = self.rule
        self.fixed, self.fixed_outputs, self.plain = (), (), True
        if isinstance(rule, DirectRule) and not rule.silent:
            structure = self.structure(rule)
            if any(other != structure for other in self.structures.values()) or (self.fed and not self.shapes):
                self.plain = False  # no pass has shown yet what shape B has
                return
            made = {place: self._made_for(*place, shape) for place, shape in self.shapes.items()}
            self.fixed_outputs = tuple(dict.fromkeys(output for output, _ in made))
            places = [(output, index) for index in sorted({i for _, i in made}) for output in self.fixed_outputs]
            self.fixed = tuple(B for place in places if isinstance(B := made.get(place), Tensor))
            self.plain = len(self.fixed) == len(places)
        elif isinstance(rule, LocalRule) and rule.random and not rule.redraw:
            if self.random_as is not None:
                self.fixed = (self.random(rule, *self.random_as),)
            self.plain = bool(self.fixed) or not self.fed

    def keeps_tensors(self) -> bool:
        """Whether all its direct feedback is plain tensors."""
        return all(isinstance(self._made_for(*place, shape), Tensor) for place, shape in self.shapes.items())

    def _made_for(self, output: str, index: int, shape: tuple[int, ...]) -> Tensor | Feedback:
        """B for one input and output layer, as the last pass needed it."""
        key = (self.structures[output, index], output, index, shape, *self.kept_as[output, index])
        if key not in self._made:
            self._made[key] = self.direct_feedback(*key)
        return self._made[key]

    def check_ranks(self, module: nn.Module) -> None:
        """In first passes: whether its rule can be followed on this rank."""
        if is_split(module):
            raise PassError(
                f"layer {self.label}: its weight is split over ranks (a DTensor, as tensor parallelism makes it), and "
                f"rule {self.rule!r} knows no feedback that is split with it. Keep the layer on backprop, "
                f"layers={{{self.name!r}: 'bp'}}, or shard it with fully_shard instead"
            )
        stage = stage_of_pipeline() if isinstance(self.rule, DirectRule) and not self.rule.silent else None
        if stage is not None and stage[0] < stage[1] - 1:
            raise PassError(
                f"layer {self.label} is in stage {stage[0]} of a pipeline of {stage[1]}, and rule {self.rule!r} needs "
                "the output error, which only the last stage has. Use a local rule in this stage, "
                f"layers={{{self.name!r}: 'fa'}}, or backprop, or train without a pipeline"
            )

    def wake(self) -> None:
        """A layer that took no part takes part again: it may turn out to be anything."""
        self.idle = False
        self.wiring.certain = False

    def running(self) -> bool:
        """Whether it is running now, in this thread."""
        return get_ident() in self.busy

    def index_of(self, view: Tensor, weight: Tensor, mixes: int | None) -> int:
        """Number of the input that meets ``view`` of ``weight``: 0 for all of it, else 1 + the row it begins with.

        So each part of a weight that packs several layers (queries, keys, values) has a feedback of its own, and so
        has the other direction of a weight that is used in both (1), as a tied decoder does.

        Args:
            mixes: the dimension of ``view`` that meets x's features; None if it is as in the layer.
        """
        if view is not weight and view.numel() != weight.numel():
            return 1 + int(view.storage_offset() - weight.storage_offset()) // max(int(weight.stride(0)), 1)
        usual = 0 if self.kind.transposed else 1
        flat = mixes is not None and view.dim() == weight.dim() == 2
        return 1 if flat and view.stride(mixes) != weight.stride(usual) else 0

    def dead(self, use: str) -> None:
        """Its weight was used in a way the rule cannot be applied to; ``use`` says who used it how."""
        self.lost = use
        if self.active:
            self.wiring.warn_once(
                f"dead:{self.name}",
                f"layer {self.label} is converted to {self.rule!r}, but {use}, which the rule cannot be applied to: "
                f"what is handed back there is backprop's. Say so with layers={{{self.name!r}: 'bp'}}, or feed the "
                "module around it back as one, blocks=[...]",
            )

    def set_scale(self, scale: float, note: str) -> None:
        """Fix the scale. Feedback drawn with unit scale is drawn again, so that copies have the same bits."""
        self.scale, self.scale_note = scale, note
        passes = f"{self.tag}passes"
        self.learned = {name: tensor for name, tensor in self.learned.items() if name == passes}
        self.forget_routes()

    # -- direct rules ------------------------------------------------------------------------------

    def hand_back(
        self,
        rule: DirectRule,
        errors: list[OutputError],
        index: int,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        pick: Pick | None = None,
        seen: Tensor | None = None,
    ) -> Tensor | None:
        """Feedback of all errors that arrived in this backward pass: a gradient for input ``index``.

        Args:
            pick: how the rows of the input were picked from the batch, if they were.
            seen: what a rule whose feedback learns looked at in the forward.
        """
        if seen is not None:
            return learning.hand_back(self, rule, errors, index, shape, dtype, device, pick, seen)
        if len(errors) == 1:  # nearly every pass: no other output could have run this port
            error = errors[0]
            if error.error is None:
                return None
            if pick is None and error.pick is None:
                fed = self.project(rule, error, error.signal(rule), index, shape, dtype, device)
            else:
                fed = self._picked(rule, error, index, shape, dtype, device, pick)
            error.used()
            return fed
        total: Tensor | None = None
        for error in errors:
            if error.here() and error.error is not None:
                fed = self._picked(rule, error, index, shape, dtype, device, pick)
                total = fed if total is None else total + fed
                error.used()
        return total

    def _picked(
        self,
        rule: DirectRule,
        error: OutputError,
        index: int,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        pick: Pick | None,
    ) -> Tensor:
        """Feedback where rows of the input, or of e, may have been picked from the batch."""
        if pick is None:
            return self.project(rule, error, error.whole(rule), index, shape, dtype, device)
        if error.pick is not None and pick.same(error.pick):  # the same rows: nothing lies between
            return self.project(rule, error, error.signal(rule), index, shape, dtype, device)
        return pick(self.project(rule, error, error.whole(rule), index, pick.whole(shape), dtype, device))

    def project(
        self,
        rule: DirectRule,
        error: OutputError,
        signal: Tensor,
        index: int,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        shared: Cache | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """``signal B`` as a tensor of ``shape`` and ``dtype``.

        Args:
            shared: what layers have made of the signal in this pass; None: ``error``'s own.
            given: another B in place of the layer's own, of its shape.
        """
        if rule.silent:
            return torch.zeros(shape, dtype=dtype, device=device)
        # Nearly every call is like the one before it.
        key = (rule, error.state, index, shape, signal.shape, dtype, device)
        last = self._last
        if last is not None and last[0] == key:
            _, route, feedback = last
        else:
            route, feedback = self.find(rule, error, index, shape, signal.shape, dtype, device)
            self._last = key, route, feedback
            self.mirror = None
            if route.plain and len(self.wiring.outputs) == 1 and type(feedback) is Tensor:
                self.mirror = feedback if feedback.shape[0] <= _SMALL else None
                # An output layer's feedback is what the backward goes on with: it never waits.
                self.hold = sys.maxsize if self.role is Role.OUTPUT else _HELD // len(self.wiring.layers)
        if given is not None:
            fed = route(signal, given)
        elif type(feedback) is Tensor:
            fed = route(signal, feedback)
        else:
            fed = self._through(route, feedback, signal, error, shared)
        return fed if fed.dtype is dtype else fed.to(dtype)

    def _through(
        self,
        route: Route,
        feedback: Tensor | Feedback,
        signal: Tensor,
        error: OutputError,
        shared: Cache | None,
    ) -> Tensor:
        if isinstance(feedback, Tensor):  # a subclass of Tensor, from a structure of the user's
            return route(signal, feedback)
        ready = feedback.prepare(signal, error.axis, error.shared if shared is None else shared)
        return route.through(ready, feedback)

    def structure(self, rule: Rule | None = None) -> Structure:
        """Of the feedback under ``rule``; None: the layer's own."""
        rule = self.rule if rule is None else rule
        own = rule.feedback if isinstance(rule, DirectRule) else None
        return self.wiring.structure if own is None else resolve(own)

    def find(
        self,
        rule: DirectRule,
        error: OutputError,
        index: int,
        shape: torch.Size,
        e_shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Route, Tensor | Feedback]:
        structure = self.structure(rule)
        key = (error.state.name, index, shape, e_shape, dtype, device, rule.layout, self.order, structure, self.stacked)
        found = self._routes.get(key)
        if found is None:
            found = self._routes[key] = self._route(rule, structure, error, index, shape, e_shape, dtype, device)
        route, feedback, needed = found
        self.shapes[error.state.name, index] = needed
        self.structures[error.state.name, index] = structure
        self.kept_as[error.state.name, index] = dtype, device
        return route, feedback

    def forget_routes(self) -> None:
        """Drop feedback made so far; what is needed will be made again."""
        self._routes = {}
        self._made = {}
        self._last = None
        self.mirror = None

    def forget_feedback(self) -> None:
        """Drop feedback of either kind: after another seed was set."""
        self.forget_routes()
        self._random = {}
        self.local = None

    def forget(self) -> None:
        """Drop all that was made for, or shown by, passes."""
        self.forget_routes()
        self._random = {}
        self.local = self.used = self.random_as = None
        self.shapes, self.structures, self.kept_as = {}, {}, {}

    def touched(self) -> bool:
        """Whether somebody changed its fixed feedback in place, so that it is not what the seed gives."""
        kept = [] if self.learns else [*self._random.values(), *self._made.values()]
        return any(isinstance(B, Tensor) and not B.is_inference() and B._version > 0 for B in kept)

    @property
    def order(self) -> Reading | None:
        """The order of dimensions that this layer has shown, or else all others that showed one."""
        if self.reading is not None or len(self.wiring.readings) != 1:
            return self.reading
        return next(iter(self.wiring.readings))

    def plan(
        self, rule: DirectRule, error: OutputError, shape: torch.Size, e_shape: torch.Size, structure: str
    ) -> Route:
        """The way from a signal of ``e_shape`` to an input of ``shape``."""
        above = error.state.rule
        return route_to(
            tuple(shape),
            self.kind.axis(len(shape)),
            tuple(e_shape),
            error.axis,
            structure=structure,
            layout=rule.layout,
            e_layout=above.layout if isinstance(above, DirectRule) else rule.layout,
            seen=self.order,
            stacked=self.stacked,
            hint=self.layout,
        )

    def _route(
        self,
        rule: DirectRule,
        structure: Structure,
        error: OutputError,
        index: int,
        shape: torch.Size,
        e_shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> _Way:
        wiring = self.wiring
        try:
            route = self.plan(rule, error, shape, e_shape, structure.routing)
        except RoutingError as problem:
            raise RoutingError(
                f"layer {self.label} (output layer {error.state.label}): {problem}. Keep the layer on backprop or a "
                f"local rule, layers={{{self.name!r}: 'bp'}}, or feed back a larger unit that has the batch in "
                "front, blocks=[...]"
            ) from None
        if route.reading is not None:
            self.reading = route.reading
            wiring.readings.add(route.reading)
            for state in wiring.layers.values():  # what one layer shows may decide what another's shapes mean
                state._last = None
        if route.ambiguous is not None:
            make = f"{type(rule).__name__}(layout='sequence_first')"
            wiring.warn_once(
                f"layout:{self.name}",
                f"layer {self.label}: its input of shape {tuple(shape)}, for an output error of shape "
                f"{tuple(e_shape)}, is {route.ambiguous}. Say which it is with the rule's layout, 'batch_first' or "
                f"'sequence_first': convert(model, {make}), or layers={{{self.name!r}: {make}}}; or keep the layer "
                f"on backprop, layers={{{self.name!r}: 'bp'}}",
            )
        needed = route.feedback_shape
        # All shapes of x that need the same B share it: a short last batch, another sequence length.
        key = (structure, error.state.name, index, needed, dtype, device)
        feedback = self._made.get(key)
        if feedback is None:
            feedback = self._made[key] = self.direct_feedback(*key)
        if isinstance(feedback, Feedback) and feedback.width != needed[0]:
            features = error.axis % len(e_shape)
            e_shape = torch.Size([*e_shape[:features], feedback.width, *e_shape[features + 1 :]])
            route = self.plan(rule, error, shape, e_shape, structure.routing)
        return route, feedback, needed

    def direct_feedback(
        self,
        structure: Structure,
        output: str,
        index: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor | Feedback:
        """B of a direct rule: its entries have standard deviation ``scale``, or 1 while that is not known."""
        if self.learns:
            name = self._name("B", index, output)
            held = self.learned.get(name)
            if held is None or held.shape != shape:
                wide = torch.promote_types(dtype, torch.float32)
                made = self._drawn(structure, output, index, shape, wide, device)
                held = self.learned[name] = learning.plain(made, self.rule, self.label)
                self.unlink()
            return held.to(device=device, dtype=dtype)
        return self._drawn(structure, output, index, shape, dtype, device)

    def _drawn(
        self,
        structure: Structure,
        output: str,
        index: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor | Feedback:
        wiring = self.wiring
        stream, suffix = streams(self.name, index, output, wiring.outputs)
        scale = 1.0 if self.scale is None else self.scale
        return structure.make(Place(wiring.seed, stream, suffix, shape, scale, dtype, device, wiring.common))

    def direct_feedbacks(self, module: nn.Module) -> dict[tuple[str, int], Tensor]:
        """The dense B by (output layer, input), as used last; made again where a copy of the model dropped it."""
        used: dict[tuple[str, int], Tensor | Feedback] = {}
        for (structure, output, index, shape, *_), feedback in self._made.items():
            place = (output, index)
            if (structure, shape) == (self.structures.get(place), self.shapes.get(place)):
                used[place] = feedback
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        for (output, index), shape in self.shapes.items():
            if (output, index) not in used:
                structure = self.structures[output, index]
                used[output, index] = self.direct_feedback(structure, output, index, shape, like.dtype, like.device)
        return {place: B.dense() if isinstance(B, Feedback) else B for place, B in used.items()}

    def note_start(self, output: Any) -> None:
        """In the first call: how large its output is before any training, for :func:`rewire.alignment`."""
        outputs = [y for y in tree_leaves(output) if isinstance(y, Tensor)]
        if all(type(y) is Tensor for y in outputs):  # others may be fake, without values
            self.start = root_mean_square(outputs)

    def measure(
        self, rule: DirectRule, errors: list[OutputError], index: int, exact: Tensor, pick: Pick | None
    ) -> None:
        """Note how large the exact gradient is, and how large unit feedback would be, on this pass."""
        fed = self.hand_back(rule, errors, index, exact.shape, exact.dtype, exact.device, pick)
        if fed is None:
            return
        # float64: squares of tiny float16 or bfloat16 gradients must not vanish.
        sums = torch.stack([exact.detach().double().square().sum(), fed.detach().double().square().sum()]).tolist()
        before = self.sums or (0.0, 0.0)
        self.sums = (before[0] + sums[0], before[1] + sums[1])
        self.wiring.unsettled = self.wiring.news = True

    def study(
        self,
        rule: DirectRule,
        errors: list[OutputError],
        index: int,
        exact: Tensor,
        pick: Pick | None,
        seen: Tensor | None,
    ) -> None:
        """Let a rule whose feedback learns see the exact gradient of a pass."""
        assert isinstance(rule, LearnedDirect)
        learning.find_shapes(self, rule, errors, index, exact.shape, exact.dtype, exact.device, pick)
        learning.gather(self, rule, errors, index, exact.shape, exact, pick, seen, exact.dtype)

    def done(self, errors: list[OutputError]) -> None:
        """The layer will not ask for the errors of this pass any more."""
        for error in errors:
            if error.here() and error.error is not None:
                error.used()

    # -- feedback that learns ------------------------------------------------------------------------

    @property
    def learns(self) -> bool:
        """Whether the layer's feedback changes in training."""
        return self.rule.learns

    @property
    def counts(self) -> bool:
        """Whether what it hands back depends on the number of the pass."""
        return self.rule.learns or isinstance(self.given, Schedule)

    @property
    def saves(self) -> bool:
        """Whether the module's state holds more than its own, or would take more from a checkpoint."""
        return self.counts or bool(self.learned)

    @property
    def tag(self) -> str:
        """How the names of its learned feedback begin, among its module's buffers and parameters."""
        return PREFIX + (f"{self.kind.part}_" if self.kind.part else "")

    def _name(self, what: str, index: int, output: str = "") -> str:
        """Name of one tensor of it; every output layer but the first has feedback of its own."""
        further = f"_at_{output.replace('.', '_')}" if output and self.wiring.outputs.index(output) > 0 else ""
        return f"{self.tag}{what}{f'_{index}' if index else ''}{further}"

    def held(self, output: str, index: int) -> Tensor:
        """The B that learns; every other copy is made from it."""
        name = self._name("B", index, output)
        if name not in self.learned:
            self._made_for(output, index, self.shapes[output, index])
        return self.learned[name]

    def memory(self, index: int) -> dict[str, Tensor]:
        """What the rule keeps besides B, by name."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.learned.items():
            parts = _NAME.fullmatch(name.removeprefix(self.tag))
            if parts is not None and parts[1] not in ("B", "passes") and int(parts[2] or 0) == index:
                found[parts[1]] = tensor
        return found

    def remember(self, index: int, memory: dict[str, Tensor]) -> None:
        """Keep what the rule has changed, and let nobody use an older B."""
        kept = {self._name(what, index): tensor for what, tensor in memory.items()}
        kept[f"{self.tag}passes"] = self._counts()  # kept up to date by count()
        for name, tensor in kept.items():
            before = self.learned.get(name)
            if before is not None and before.shape == tensor.shape and before.dtype == tensor.dtype:
                if before is not tensor:
                    before.copy_(tensor)
            else:
                self.learned[name] = tensor
                self.unlink()
        self.drop_copies()

    def keep_count(self) -> None:
        """From now on the number of passes is saved with the module."""
        self.learned.setdefault(f"{self.tag}passes", self._counts())
        self.unlink()

    def _counts(self) -> Tensor:
        return torch.tensor([self.wiring.passes, self.wiring.sampled])

    def count(self, module: nn.Module) -> None:
        """Before saving: everything is in the module, and so is the number of passes."""
        if self.learner is not None:
            self.learner.save(module)
            return
        passes = self.learned.get(f"{self.tag}passes")
        if passes is not None:
            passes.copy_(self._counts())
        self.link(module)

    def unlink(self) -> None:
        """There is something new to be linked by the layer's next call."""
        self.linked = False
        self.steady = ""

    def drop_copies(self) -> None:
        """Forget copies of B in other dtypes or on other devices."""
        ours = {id(tensor) for tensor in self.learned.values()}
        if any(id(B) not in ours for B in self._made.values()):
            self.forget_routes()

    def link(self, module: nn.Module) -> None:
        """Make what was learned a part of the module."""
        for name, tensor in self.learned.items():
            if module._buffers.get(name) is not tensor:
                module.register_buffer(name, tensor)
        self.linked = True

    def relink(self, module: nn.Module) -> None:
        """The module's tensors may be others now: moved, cast, loaded."""
        if not self.saves or self.learner is not None:
            return
        found = {name: t for name, t in module._buffers.items() if name.startswith(self.tag) and t is not None}
        if not found:
            return
        self.learned = found
        passes = found.get(f"{self.tag}passes")
        if passes is not None:
            self.wiring.passes, self.wiring.sampled = (int(number) for number in passes)
        if self.scale is None and any(name.startswith(f"{self.tag}B") for name in found):
            self.scale, self.scale_note = 1.0, "learned, and loaded"
        self.forget_routes()
        self.turn()
        self.refresh()

    def glance(self, context: int, features: int) -> Tensor:
        """P for :func:`rewire.learning.look`."""
        found = self._glance
        if found is None or found.shape != (features, context):
            found = self._glance = learning.glance(self.wiring.seed, self.name, context, features)
        return found

    # -- local rules -------------------------------------------------------------------------------

    def random(
        self, rule: LocalRule, shape: torch.Size, dtype: torch.dtype, device: torch.device, draw: int = 0
    ) -> Tensor:
        """R of a local rule: N(0, std^2), or its magnitude. Kept, unless it is a redraw."""
        assert self.std is not None
        if draw:
            drawn = quick_normal(
                shape, seed=self.wiring.seed, name=self.name, draw=draw, scale=self.std, magnitude=rule.magnitude
            )
            return drawn.to(device=device, dtype=dtype)
        key = (shape, dtype, device, rule.magnitude)
        found = self._random.get(key)
        if found is None:
            unit = standard_normal(shape, seed=self.wiring.seed, name=self.name)
            found = ((unit.abs_() if rule.magnitude else unit) * self.std).to(device=device, dtype=dtype)
            self._random = {key: found}
        return found

    def local_scale(self, weight: Tensor) -> float:
        """s, measured now if the weight had no values at conversion."""
        if self.std is None:
            self.std, self.std_note = weight_scale(weight)
        return self.std


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


def parts_of(rule: Rule) -> tuple[Rule, ...]:
    """The rules that a layer given ``rule`` may be under."""
    return rule.parts() if isinstance(rule, Schedule) else (rule,)


def weight_scale(weight: Tensor) -> tuple[float, str]:
    """Standard deviation of a weight's entries, about their mean, and a note if it could not be used.

    A weight that is constant (zero-initialised, one number) has none, and feedback of zeros would cut
    everything below it off for good; such a layer gets PyTorch's own initial scale, 1/sqrt(3 fan_in).
    """
    if weight.numel() > 1:
        std = float(weight.detach().double().std())
        if math.isfinite(std) and std > 0:
            return std, ""
    fan_in = max(math.prod(weight.shape[1:]), 1)
    return 1 / math.sqrt(3 * fan_in), "the weight is constant; 1/sqrt(3 fan_in) instead"


def _geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else None


def _one_or_all(names: tuple[str, ...]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(list(names))
