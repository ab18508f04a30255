"""What belongs to one conversion: the layers' states, the output layers found, the newest output errors.

Nothing here points back at the modules, so copying or saving a part of a model copies no more than that,
and everything that can be made again (errors of past passes) is left out of copies.
"""

from __future__ import annotations

import itertools
import uuid
import warnings
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from rewire import following, learning, ready, roles
from rewire.distributed import Groups, groups_of, in_parallel_forward, several
from rewire.errors import RewireWarning, some
from rewire.guard import Guard
from rewire.modes import outside_of_modes
from rewire.passes import backward_id
from rewire.routing import Reading
from rewire.rules.base import DirectRule
from rewire.scale import settle_scales
from rewire.structures import Structure

if TYPE_CHECKING:
    from rewire.state import LayerState

# Every conversion alive, by number. Compiled graphs can name a conversion, but not hold one.
conversions: WeakValueDictionary[int, Wiring] = WeakValueDictionary()
_keys = itertools.count()


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
        probe_count: how many were taken.
        certain: the role of every layer is known.
        picks: rows of some layer's input were seen to be picked from the batch by index, or to be added up by one.
        pours: rows of some layer were seen to be added up by index (:mod:`rewire.pours`).
        unclear: names of layers whose rows were picked by an index that could not be followed.
        local: there is one output layer, and nobody is handed its error.
        looked: a pass has been taken in: uses of weights by other modules have been seen.
        reentered: in a pass not taken in yet the output layer ran inside of a backward.
        compiled: some of its calls have been part of a compiled graph (:mod:`rewire.ready`).
        prepared: all layers are ready for such a graph, and nothing has changed since.
        held: numbers for each sample that joins may have to make for all layers together, and for how many samples
            that is few enough (``held_rows``).
        unnamed: output layers of the backward under way that ``asked`` does not name.
        unready: why, in words, layers under direct rules cannot be part of such graphs now; "" if they can.
        swapped: the newest forward has given operations other numbers to keep (:func:`rewire.exchange.swapped`).
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
        taken_out: names of layers that went from the model, of which nothing has been said.
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
        self._counts: bool | None = None  # not looked up since a rule changed
        self.probed = -1
        self.probe_count = 0
        self.looked = False
        self.reentered = False
        self.compiled = False
        self.prepared = False
        self.held = self.held_rows = 0
        self.unready = ""
        self.unnamed: list[str] = []
        self.apart = False
        self.swapped = False
        self.certain = False
        self.local = False
        self.picks = False
        self.pours = False
        self.unclear: set[str] = set()
        self.bypassed: set[Tensor] = set()
        self._weights: dict[Tensor, LayerState] = {}  # in passes not taken in yet
        self.readings: set[Reading] = set()
        self.common: dict[Hashable, Any] = {}
        self.groups: Groups = ()
        self.wrapped = False
        self.still = False
        self.complaints: dict[str, list[str]] = {}
        self.taken_out: list[str] = []
        self._warned: set[str] = set()
        self.origin = uuid.uuid4().hex
        self._register()

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
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
        self._counts, self.taken_out = None, []  # in files of older versions there are none
        self.reentered = False
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
        if self._counts is None:
            self._counts = not self.rests and any(state.counts for state in self.layers.values())
        return self._counts

    def note_rules(self) -> None:
        """A layer's rule, or whether anything is learned, may be another now."""
        self._counts = None

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

    def note_weight(self, state: LayerState, weight: Tensor | None) -> None:
        """In a first pass: whose weight is whose, of layers that ran if there are some."""
        if weight is not None and (state.ran or weight not in self._weights):
            self._weights[weight] = state

    def say_unclear(self) -> None:
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

    def say_hidden(self, state: LayerState) -> None:
        """A layer whose rows may get the feedback of other samples' errors: activation checkpointing has the index."""
        self.warn_once(
            f"rows:{state.name}",
            f"layer {state.label}: rows of its input are picked from the batch, or added up, by an index that this "
            "version of PyTorch hides under activation checkpointing, so feedback may come from other samples' errors "
            f"than their own. Run it without; or use a local rule, layers={{{state.name!r}: 'fa'}}, or the module "
            "around it as a block, blocks=[...], which need no index",
        )

    def _say_bypassed(self) -> None:
        """Weights given to operations that nobody but the graph sees: kernels of somebody's own."""
        for weight in self.bypassed:
            state = self._weights.get(weight)
            if state is not None and not state.lost:
                state.dead("its weight is also used by an operation of another module's own")
        self.bypassed, self._weights = set(), {}

    def _say_taken_out(self) -> None:
        """Layers whose module went while others stay: replaced, as a new head is, or left out."""
        names, self.taken_out = some([*map(repr, self.taken_out)], 6), []
        self.warn_once(
            f"taken out:{names}",
            f"taken out of the model since it was converted: {names}. What stands in such a layer's place, if anything "
            "does, has no rule and keeps backprop: convert again to give it one",
        )

    error_reached = roles.error_reached  # a method, as every backward calls it

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
        with outside_of_modes():
            self._settle()

    def _settle(self) -> None:
        self.unsettled = self.reentered = False
        changed = False
        if self.taken_out:
            self._say_taken_out()
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
        roles.take_in(self)
        settle_scales(self)
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
            ready.prepare(self)
