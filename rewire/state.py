"""One converted layer: its rule and whose turn it is, its role, and all that is kept of its feedback.

Nothing here points back at the module, so copying or saving a part of a model copies no more than that, and everything
that can be made again (feedback, routes) is left out of copies. What is done with it is in other files: here is
what changes when rule, role or scale do.
"""

from __future__ import annotations

from collections.abc import Hashable
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rewire import buffers, distributed, handback, layer_feedback, learning, scale
from rewire.layer_feedback import changed_feedback
from rewire.layers.kinds import BackwardWeight, Kind
from rewire.learned import PREFIX
from rewire.ready import prepare, traceable
from rewire.roles import Role
from rewire.routing import LAYOUTS, Reading, Route
from rewire.rules.base import DirectRule, LearnedDirect, LocalRule, Rule, Schedule, parts_of, whose_turn
from rewire.scale import root_mean_square
from rewire.structures import Feedback, Structure, resolve
from rewire.ways import Way

if TYPE_CHECKING:
    from rewire.following import Learner
    from rewire.wiring import Wiring

STATE = "_rewire"  # where a module has it, in its __dict__: not a parameter, buffer or submodule


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
        hosted: it runs inside of a module that is watched for uses of weights in every call.
        functional: another module uses its weight directly (:mod:`rewire.hosts`).
        seated: one of those is PyTorch's own attention, around it (:mod:`rewire.attention`).
        watched: such uses are, or may be, watched for.
        layout: the order of its input's dimensions, where whoever uses the weight is known to have one.
        turned: the layer below whose output was seen to be transposed to be its input (:mod:`rewire.turns`); "" if
            that was no layer's, None if it was not transposed.
        follows: the layer below whose output, in the same order of dimensions, is its input; "" if none was seen.
        guess: how its shapes were read where they fit more than one way, in words; "" if they do not.
        stacked: batches that were seen to lie one behind the other in its input (:mod:`rewire.stacks`).
        picks: its input was seen to be rows picked from the batch by index, or its rows to be added up by one.
        idle: in its newest call neither it nor anything below it needed a gradient: it is frozen, and costs nothing.
        lost: who uses its weight in a way that the rule cannot be applied to, in words; "" if nobody was seen to.
        unseen: that is a guess, as its weight got a gradient before it ever ran.
        shared: another module has its weight too; ``twins``: the layers that do (:mod:`rewire.ties`).
        busy: threads in which it is running now.
        observer: called before and after each such use, as forward hooks are around a forward.
        local: what makes B in calls under a local rule, kept from call to call.
        used: the newest weight that a forward of the layer's own made, for rules that read it.
        settled: role and scale are known: ports and tickets from now on.
        steady: nothing special about its calls: a key of :data:`rewire.steady.STEADY`, the short ways through a call.
        steady_use: the same of calls by the attention it is a part of: direct, local, or none.
        called: as an output layer on the short way, since an error last arrived.
        mirror: B, if e B is all there is to its feedback: what the join multiplies with where e B is small.
        repeats: ``mirror`` is of inputs (N, positions..., features), the same at all positions.
        held: how many numbers for each sample the join may have to make for it (:class:`rewire.edges.Join`).
        written: the rule as it is written: another rule makes another compiled graph (:mod:`rewire.traced`).
        traceable: a call of it alone could be part of a compiled graph.
        plain: its feedback is there, and made of plain tensors, which is what such a graph can be given.
        in_graph: its calls are, as are those of the layers it passes errors to and from.
        joins_traced: its output is joined to the pass there.
        made_of_inputs: which of the tensors that a block returns are; None: not known.
        fed: an input of it was seen to require a gradient.
        has_feedback: there is what that graph would be given, or nothing that it needs.
        fixed: the feedback that graph is given; for direct rules, what ``fixed_as`` is made of.
        fixed_as: for each of ``fixed_inputs``, by number, one B for each of ``fixed_outputs``, output layers.
        kept_as: dtype and device of B, by (output layer, input), as the last pass needed it.
        random_as: shape, dtype and device of R, as the last pass needed it.
        exact: for feedback that learns: what is handed back now is backprop's own gradient.
        probe: the forward-mode probe that is under way (:mod:`rewire.jvp`).
        gathered: what passes have shown that is not taken in yet, by input.
        gathered_of: how many outputs B had, of all output layers together, when it was gathered.
        learned: B and whatever else its rule keeps, by the names they have in the module.
        linked: all of that is in the module.
        learner: what sees to a local rule's feedback that learns.
        made: B in each shape, dtype and place it was asked for; what learns is in ``learned`` too.
        routes: ways from e to an input, by all that may make them differ (:mod:`rewire.ways`).
        last: the newest of them, and what it was for.
        randoms: R of a local rule.
        glanced: P of :func:`rewire.learning.glance`.
        reading: the order of dimensions that it has shown.
        gone: its module is, or is converted no longer.
        looked: classes of rules whose signal of its error was looked at (:mod:`rewire.first_use`), as an output layer.
        shapes: of B as the last pass needed it, by (output layer, input); ``structures`` likewise.
    """

    def __init__(
        self, name: str, kind: Kind, rule: Rule, wiring: Wiring, *, scale: float | None, std: float | None
    ) -> None:
        self.name = name
        self.kind = kind
        self.given = rule
        self.rule = whose_turn(rule, wiring.passes)
        self.wiring = wiring
        self.role = Role.UNKNOWN
        self.scale = scale
        self.scale_note = "given" if scale is not None else ""
        self.std = std
        self.std_note = ""
        self.ran = False
        self.start: float | None = None
        self.functional = False
        self.hosted = False
        self.seated = False
        self.watched = False
        self.busy: set[int] = set()
        self.idle = False
        self.lost = ""
        self.unseen = False
        self.shared = False
        self.twins: list[LayerState] = []
        self.picks = False
        self.stacked = 1
        self.observer: tuple[Any, Any] | None = None
        self.seen = False
        self.votes = 0
        self.sums: tuple[float, float] | None = None
        self.silent_passes = 0
        self._draws: int | Tensor = 0
        self.local: object = None
        self.used: Tensor | None = None
        self.settled = False
        self.steady = ""
        self.steady_use = ""
        self.mirror: Tensor | None = None
        self.repeats = False
        self.held = 0
        self.called = False
        self.written = ""
        self.joins_traced = False
        self.traceable = False
        self.plain = True
        self.made_of_inputs: frozenset[int] | None = None
        self.fed = False
        self.has_feedback = True
        self.in_graph = False
        self.fixed: tuple[Tensor, ...] = ()
        self.fixed_as: tuple[Tensor | Feedback, ...] = ()
        self.fixed_outputs: tuple[str, ...] = ()
        self.fixed_inputs: tuple[int, ...] = ()
        self.random_as: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self.exact = False
        self.probe: Any = None
        self.gathered: dict[int, dict[str, Tensor]] = {}
        self.gathered_of: dict[int, int] = {}
        self.learned: dict[str, Tensor] = {}
        self.linked = True
        self.learner: Learner | None = None
        self.glanced: Tensor | None = None
        self.randoms: dict[tuple[Any, ...], Tensor] = {}
        self.routes: dict[tuple[Any, ...], Way] = {}
        self.made: dict[tuple[Any, ...], Tensor | Feedback] = {}
        # One attribute, read once and written once: threads may run backward side by side.
        self.looked: frozenset[type[DirectRule]] = frozenset()
        self.last: tuple[tuple[Any, ...], Route, Tensor | Feedback] | None = None
        self.gone = False
        self.reading: Reading | None = None
        self.layout: str | None = None
        self.turned: str | None = None
        self.follows = ""
        self.guess = ""
        self.shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        self.structures: dict[tuple[str, int], Structure] = {}
        self.kept_as: dict[tuple[str, int], tuple[torch.dtype, torch.device]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Fixed feedback is made again from its seed: copies and files stay small, and cannot go stale.
        made, randoms = changed_feedback(self)
        return {
            **self.__dict__,
            "_draws": self.draws,
            "randoms": randoms,
            "routes": {},
            "made": made,
            "last": None,
            "mirror": None,
            "fixed": (),
            "fixed_as": (),
            "local": None,
            "observer": None,
            "busy": set(),
            "looked": frozenset(),
            "used": None,
            "probe": None,
            "glanced": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In files of older versions there are none:
        self.unseen, self.shared, self.twins, self.looked, self.guess = False, False, [], frozenset(), ""
        self.__dict__.update(state)

    def let_go(self, *, taken_out: bool = False) -> None:
        """Its module is gone, or converted no longer. With the last one goes what would wait for a garbage collector.

        The wiring and the states of its layers refer to each other, and some of what they keep to them. Without that,
        whatever is large is gone at once, or with the last loss that still needs it.

        Args:
            taken_out: nobody asked for that: the next forward, if there is one, says so.
        """
        self.gone = True
        wiring = self.wiring
        if taken_out and self.active:
            wiring.taken_out.append(self.name)
            wiring.unsettled = True
        if all(state.gone for state in reversed(wiring.layers.values())):
            for state in wiring.layers.values():
                if isinstance(state.local, BackwardWeight):
                    state.local.exchange = None
                state.local = state.learner = state.last = None
                state.twins = []
            wiring.layers = {}

    @property
    def label(self) -> str:
        """The name, quoted, for messages; the model itself has no name."""
        return repr(self.name) if self.name else "'' (the model itself)"

    @property
    def draws(self) -> int:
        """How often its feedback was drawn anew."""
        return int(self._draws)

    @draws.setter
    def draws(self, count: int) -> None:
        if isinstance(self._draws, int):
            self._draws = count
        else:
            self._draws.fill_(count)

    def counter(self) -> Tensor:
        """``draws`` as the tensor that a compiled graph counts with, int64: from now on that is where it is kept."""
        if isinstance(self._draws, int):
            with torch.inference_mode(False):
                self._draws = torch.tensor(self._draws, device="cpu")
        return self._draws

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
        rule = whose_turn(self.given, self.wiring.passes)
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
        wiring = self.wiring
        self.exact = isinstance(rule, LearnedDirect) and not wiring.rests and rule.exact(wiring.passes, wiring.sampled)
        self.settled = known and not (isinstance(rule, DirectRule) and (self.needs_scale(rule) or self.exact))
        used = self.functional or any(twin.functional for twin in self.twins)  # and watched for
        self.watched = used or (self.watched and not (self.ran and self.wiring.looked))
        output = "output-" if self.role is Role.OUTPUT else ""
        self.steady = ""
        special = self.picks or self.wiring.guard is not None or self.learner is not None
        keeps = self.wiring.skip == "keep"
        self.steady_use = ""
        if self.seated and self.settled and not (output or special or rule.learns):
            if direct and keeps:
                self.steady_use = "direct"
            elif isinstance(rule, LocalRule) and not wiring.picks:
                self.steady_use = "local"
        special = special or self.watched or not self.kind.local
        if special or (isinstance(rule, LearnedDirect) and not self._as_fixed(rule)):
            pass  # something special about its calls; a block may be given anything
        elif direct:
            first = known and not self.fed and not rule.learns  # never measured: there is nothing to hand back to
            self.steady = f"{output}direct" if (self.settled or first) and keeps else ""
        elif isinstance(self.rule, LocalRule) and known and self.kind.exchanges and not wiring.picks:
            self.steady = f"{output}local"
        self.last = self.mirror = None
        self.written = repr(self.rule)
        self.traceable = traceable(self)
        self.wiring.prepared = False
        self.wiring.note_rules()

    def changed(self) -> None:
        """Take in something that a pass under way has shown about this layer alone."""
        self.refresh()
        if self.wiring.compiled:
            prepare(self.wiring)

    def note_picks(self) -> None:
        """Rows of its input go their own way: all layers leave their calls on the graph, to show where from."""
        self.picks = True
        first, self.wiring.picks = not self.wiring.picks, True
        for state in [*self.wiring.layers.values()] if first else [self]:
            state.changed()

    def _as_fixed(self, rule: LearnedDirect) -> bool:
        """Whether a pass that learns nothing is one as under fixed feedback."""
        return self.linked and not rule.watches and not rule.context

    def wake(self) -> None:
        """A layer that took no part takes part again: one that never did may turn out to be anything."""
        self.idle = False
        self.wiring.prepared = False
        if self.role is Role.UNKNOWN:
            self.wiring.certain = False

    def running(self) -> bool:
        """Whether it is running now, in this thread."""
        return get_ident() in self.busy

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

    # -- direct rules ------------------------------------------------------------------------------

    def structure(self, rule: Rule | None = None) -> Structure:
        """Of the feedback under ``rule``; None: the layer's own."""
        rule = self.rule if rule is None else rule
        own = rule.feedback if isinstance(rule, DirectRule) else None
        return self.wiring.structure if own is None else resolve(own)

    def forget_routes(self) -> None:
        """Drop feedback made so far; what is needed will be made again."""
        self.routes = {}
        self.made = {}
        self.last = None
        self.mirror = None

    def forget_feedback(self) -> None:
        """Drop feedback of either kind: after another seed was set."""
        self.forget_routes()
        self.randoms = {}
        self.local = None

    def forget(self) -> None:
        """Drop all that was made for, or shown by, passes, but in which dtype and where feedback is needed."""
        self.forget_feedback()
        self.used = None
        self.shapes, self.structures = {}, {}

    @property
    def order(self) -> Reading | None:
        """The order of dimensions that this layer has shown, or else all others that showed one."""
        if self.reading is not None:
            return self.reading
        shown = next(iter(self.wiring.readings)) if len(self.wiring.readings) == 1 else None
        if self.turned is None:
            below = self.wiring.layers.get(self.follows)
            return below.order if shown is None and below is not None and below.turned is not None else shown
        # Nothing shown: what lies below came from a loader, embeddings or convolutions, which have the batch in front.
        below = self.wiring.layers.get(self.turned)
        first = below is not None and (
            below.layout == LAYOUTS[1] if below.layout is not None else below.reading is not None and below.reading[0]
        )
        return (not first, shown is not None and shown[1])

    def note_start(self, output: Any) -> None:
        """In the first call: how large its output is before any training, for :func:`rewire.alignment`."""
        outputs = [y for y in tree_leaves(output) if isinstance(y, Tensor)]
        if all(type(y) is Tensor for y in outputs):  # others may be fake, without values
            self.start = root_mean_square(outputs)

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
    def joint(self) -> Hashable | None:
        """With which other layers' its feedback is learned as one matrix; None: with none, or it does not learn."""
        for part in (self.rule, *parts_of(self.given)):
            if isinstance(part, LearnedDirect):
                return self.structure(part).joint
        return None

    @property
    def saves(self) -> bool:
        """Whether the module's state holds more than its own, or would take more from a checkpoint."""
        return self.counts or bool(self.learned)

    @property
    def tag(self) -> str:
        """How the names of its learned feedback begin, among its module's buffers and parameters."""
        return PREFIX + (f"{self.kind.part}_" if self.kind.part else "")

    # -- what calls and backwards ask for: written where its idea is; a method of its own, as one call more is felt --

    hand_back = handback.hand_back
    project = handback.project
    done = handback.done
    measure = scale.measure
    study = learning.study
    random = layer_feedback.random
    local_scale = scale.local_scale
    link = buffers.link
    check_ranks = distributed.check_ranks
