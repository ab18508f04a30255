"""The two kinds of rule, and the table of names.

A layer computes ``y = W x + b``. Its weight and bias gradients are always exact given the gradient
``delta`` at its own output; a rule only decides what the layer hands back to ``x``:

- a *local* rule uses ``delta`` and a backward weight in place of ``W``;
- a *direct* rule uses the output error ``e`` and a feedback ``B`` that leads straight to ``x``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor

from rewire import structures
from rewire.errors import ConversionError, nearest
from rewire.layers.form import Form
from rewire.routing import LAYOUTS
from rewire.rules import plugins
from rewire.rules.written import build, parse, written


class Rule:
    """What a layer hands back to its input. Subclass :class:`LocalRule` or :class:`DirectRule`.

    Attributes:
        name: how users write it; set by :func:`register_rule`.
        source: the publication the rule comes from.
        learns: its feedback changes in training, and is saved with the model.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    learns: ClassVar[bool] = False

    def __repr__(self) -> str:
        return written(self.name or type(self).__name__, self)


class BP(Rule):
    """Backpropagation: ``W^T delta``, the layer's own gradient."""


class Schedule(Rule):
    """One rule for some passes and another for others. A layer that is given one is always under one of its parts."""

    def parts(self) -> tuple[Rule, ...]:
        """The rules it chooses from; none of them a schedule."""
        raise NotImplementedError

    def now(self, passes: int) -> Rule:
        """The part (the same object each time) for pass number ``passes``. The first is 0."""
        raise NotImplementedError


def parts_of(rule: Rule) -> tuple[Rule, ...]:
    """The rules that a layer given ``rule`` may be under."""
    return rule.parts() if isinstance(rule, Schedule) else (rule,)


def whose_turn(rule: Rule, passes: int) -> Rule:
    """The rule that a layer given ``rule`` is under in pass number ``passes``."""
    return rule.now(passes) if isinstance(rule, Schedule) else rule


class LocalRule(Rule):
    """Hands back the transpose of the layer's operation with a backward weight in place of ``W``.

    Attributes:
        random: whether the rule wants a random tensor ``R`` of the weight's shape, with entries
            N(0, s^2), s being ``scale`` (``"auto"``: the standard deviation of the weight at conversion).
        magnitude: whether the rule reads only ``|R|``, which it is then given in place of ``R``.
        redraw: whether ``R`` is drawn anew for every forward.
        uses_weight: whether :meth:`backward_weight` reads ``W``; if not, ``W`` is not kept for backward.
    """

    random: ClassVar[bool] = True
    magnitude: ClassVar[bool] = False
    redraw: ClassVar[bool] = False
    uses_weight: ClassVar[bool] = True

    def backward_weight(self, weight: Tensor | None, random: Tensor | None, scale: float) -> Tensor:
        """The tensor used in place of the weight in the backward pass.

        Args:
            weight: W as the forward used it; None when ``uses_weight`` is False.
            random: R (or ``|R|``), of W's shape, dtype and device; None when ``random`` is False. Read only.
            scale: s, the standard deviation described above.

        Returns:
            B, of W's shape, dtype and device.
        """
        raise NotImplementedError(f"{type(self).__name__} has no backward_weight(self, weight, random, scale)")


class Draw(Protocol):
    """Random numbers for feedback, the same for the same seed, layer, ``what`` and shape."""

    def normal(self, what: str, shape: tuple[int, ...]) -> Tensor:
        """N(0, 1)."""

    def orthogonal(self, what: str, shape: tuple[int, int]) -> Tensor:
        """Orthonormal rows, or columns if there are more rows than columns."""


class LearnedLocal(LocalRule):
    """A local rule whose feedback is kept in the layer, beside the weight, and learns.

    It keeps tensors by name. Those in ``trained`` are Parameters: in every backward they get a gradient made of the
    weight's own, and the user's optimizer changes them. The others are buffers, which change between passes: by
    :meth:`gather` and :meth:`learn`, or by :meth:`mirror`.

    Attributes:
        trained: names of the tensors that are Parameters.
        watches: wants to see delta, the gradient at the layer's output, in every pass.
        every: :meth:`mirror` runs before every that many passes; 0: only when asked for, None: never.
    """

    learns: ClassVar[bool] = True
    random: ClassVar[bool] = False
    uses_weight: ClassVar[bool] = False
    trained: tuple[str, ...] = ()
    watches: bool = False
    every: int | None = None

    def start(self, form: Form, scale: float, draw: Draw) -> dict[str, Tensor]:
        """What is kept, as it is at the start.

        Args:
            form: of the weight.
            scale: s, as for other local rules.
        """
        raise NotImplementedError

    def feedback(self, kept: Mapping[str, Tensor], form: Form) -> Tensor:
        """B, of the weight's shape."""
        raise NotImplementedError

    def follow(self, gradient: Tensor, kept: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
        """Gradients of ``trained``.

        Args:
            gradient: the weight's own, of its shape.
            kept: what is not in ``trained``.
        """
        raise NotImplementedError

    def gap(self, weight: Tensor, kept: Mapping[str, Tensor], form: Form) -> Tensor | None:
        """What weight decay alone takes away: it stays as it is if nothing decays. None: not known."""
        return None

    def gather(self, delta: Tensor, kept: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """What to add up, over passes and ranks, until it is taken in.

        Args:
            delta: (M, features), one row for each sample and position.
            rows: which of the layer's outputs these are: all, unless another module uses a part of the weight.
        """
        raise NotImplementedError

    def learn(self, kept: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values of what changes.

        Args:
            sums: what :meth:`gather` gave, added up.
        """
        raise NotImplementedError

    def mirror(
        self, weight: Tensor, kept: Mapping[str, Tensor], form: Form, noise: Callable[[int], Tensor]
    ) -> dict[str, Tensor]:
        """New values of what changes, by what the layer makes of noise.

        Args:
            noise: a number of samples n -> N(0, 1) inputs, (n, form.columns).
        """
        raise NotImplementedError

    def backward_weight(self, weight: Tensor | None, random: Tensor | None, scale: float) -> Tensor:
        assert random is not None  # B, made by feedback()
        return random


class DirectRule(Rule):
    """Hands back ``signal(e) B``: something made of the output error, projected straight to the input.

    Attributes:
        needs_targets: whether :meth:`signal` reads the targets (see :func:`rewire.targets`).
        silent: hands back zeros; no feedback is made at all.
        layout: order of the dimensions of the layer's input and output, ``"batch_first"`` (N, T, F) or
            ``"sequence_first"`` (T, N, F); None: told by the shapes, with a warning where they fit both.
        feedback: structure of B for the layers under this rule object, a name or an object from
            :mod:`rewire.structures`; None: what ``convert(feedback=...)`` says.

    Example:
        >>> from rewire.rules import DFA
        >>> rewire.convert(model, DFA(layout="sequence_first"), layers={"head": "bp"})
    """

    needs_targets: ClassVar[bool] = False
    silent: ClassVar[bool] = False
    layout: str | None = None
    feedback: str | structures.Structure | None = None

    def __init__(self, *, layout: str | None = None, feedback: str | structures.Structure | None = None) -> None:
        if layout is not None and layout not in LAYOUTS:
            raise ConversionError(f"layout is {' or '.join(map(repr, LAYOUTS))} (or None), not {layout!r}")
        self.layout = layout
        if feedback is not None:
            self.feedback = structures.resolve(feedback)

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        """What is projected, in the output's shape.

        Args:
            error: e = dL/dy at the output layer's output y.
            targets: what :func:`rewire.targets` was given, or None.
            axis: the dimension of e that holds the n output features.

        Returns:
            A tensor of e's dtype and shape; the number of features may be another, and B then has so many rows.
        """
        raise NotImplementedError(f"{type(self).__name__} has no signal(self, error, targets, axis)")

    def in_graph(self) -> DirectRule | None:
        """The rule as a compiled graph can have it; None: its layers are graph breaks.

        That is the rule itself where :meth:`signal` does nothing but compute with e. Targets given in the forward, and
        numbers that Python looks at, are there when a graph is run, but not when it is made.
        """
        return None if self.needs_targets else self


@dataclass(frozen=True)
class Rows:
    """What one pass shows of one layer input, as a :class:`LearnedDirect` rule is given it.

    Attributes:
        e: signals (N, n); with several output layers side by side, zeros where none arrived. Where B = P Q and Q learns
            (:class:`~rewire.structures.LowRank`), signals times P.
        exact: backprop's own gradient of the input, (M, features), M a multiple of N: each row of e belongs to a run of
            M/N rows. None in passes that were fed back.
        seen: x P, (M, context), or for a rule that ``watches``, x, (M, features).
        wide: ``exact`` (or, for a rule that watches, x) as (images, elements) where B has a value for every element of
            an image, and each row of e belongs to a run of images; else None.
        mask: a function: where B may have entries, (n, features) or (n, elements) bool; None: everywhere.
    """

    e: Tensor
    exact: Tensor | None
    seen: Tensor | None
    wide: Tensor | None
    mask: Callable[[], Tensor | None] = lambda: None

    @property
    def run(self) -> int:
        """How many rows of x, or images, get the feedback of one row of e."""
        rows = self._rows()
        return 1 if rows is None else len(rows) // max(len(self.e), 1)

    def summed(self) -> Tensor:
        """``wide``, or ``exact``, or without that ``seen``: one row for each row of e, summed over its run."""
        rows = self._rows()
        assert rows is not None
        return rows if self.run == 1 else rows.reshape(len(self.e), self.run, rows.shape[1]).sum(1)

    def _rows(self) -> Tensor | None:
        if self.wide is not None:
            return self.wide
        return self.exact if self.exact is not None else self.seen


class LearnedDirect(DirectRule):
    """A direct rule whose B changes in training, by what passes show: see :mod:`rewire.learning`.

    B is what the structure of the feedback lets a rule learn: all of it; or Q of B = P Q, e P being what the rule is
    shown as e; or a B some of whose entries are zero, and stay so. Where layers have one matrix in common, it becomes
    the mean of what they have learned (:mod:`rewire.agree`).

    Attributes:
        watches: wants the layer's input in every pass.
        probes: wants forward-mode probes (:mod:`rewire.jvp`) before some passes.
        together: all layers get tangents in the same probe; else one layer in each, in turn.
        samples: how many samples of the batch a probe takes; None: all.
        context: how many numbers of the layer's own input the feedback looks at; 0: none.
        keeps_norm: it turns B and leaves its size to something else. Where layers' B are learned as one matrix
            (:class:`~rewire.structures.Shared`), their mean gets back the size that they had: a mean of matrices that
            were turned differently is smaller than each.
    """

    learns: ClassVar[bool] = True
    watches: ClassVar[bool] = False
    probes: bool = False
    together: bool = False
    samples: int | None = None
    context: int = 0
    keeps_norm: ClassVar[bool] = False

    def exact(self, passes: int, sampled: int) -> bool:
        """Whether the next pass is handed back exactly, as under ``bp``.

        Args:
            passes: its number; the first is 0.
            sampled: samples that the exact passes right before it have shown; 0 if the last was not exact.
        """
        return False

    def gather(self, rows: Rows) -> dict[str, Tensor]:
        """What to add up, over passes and ranks, until it is taken in."""
        raise NotImplementedError

    def probe_number(self, passes: int) -> int | None:
        """Number of the probe to be taken before pass number ``passes``; None: none is."""
        return None

    def observe(self, rows: Rows, B: Tensor) -> dict[str, Tensor]:
        """What to add up of a probe.

        Args:
            rows: ``exact`` (and ``wide``) are tangents v at the layer's input, ``e`` is J v at the outputs.
            B: (n, features), or (n, elements).
        """
        raise NotImplementedError

    def learn(self, B: Tensor, memory: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
        """The new B.

        Args:
            B: (n, features), or (n, elements).
            memory: tensors of the rule's own to keep from one call to the next, empty at first; changed in place. Saved
                with the model.
            sums: what :meth:`gather` and :meth:`observe` gave, added up, and ``samples``, the number of rows of e that
                were gathered (absent if none were). Where B may have some entries only, ``mask``, of B's shape, says
                which: others are dropped from what is returned.
        """
        raise NotImplementedError

    def remembers(self, n: int, features: int, elements: int | None) -> dict[str, tuple[int, ...]]:
        """Shapes of what :meth:`learn` will keep in ``memory``: what it costs is told before any of it is made.

        Args:
            n: rows of B.
            features: of the layer's input.
            elements: columns of B where it has a value for every element of an image; None where it has ``features``.
        """
        return {}

    def largest(self, memory: Mapping[str, Tensor]) -> Tensor | None:
        """The norm that B may have at most; None: any.

        Asked after :meth:`learn` where layers' B have become one matrix: that is made smaller, as a whole, until each
        layer's B is small enough.
        """
        return None


_registry: dict[str, Callable[[], Rule]] = {}
R = TypeVar("R", bound=Rule)


def register_rule(name: str) -> Callable[[type[R]], type[R]]:
    """Class decorator: make a rule available by name, in ``convert`` and on the command line.

    Args:
        name: lower-case identifier, not taken yet.

    Raises:
        ConversionError: for a name that is taken or not an identifier, or a class that is no rule.

    Example:
        >>> @rewire.register_rule("halved")
        ... class Halved(rewire.LocalRule):
        ...     random = False
        ...     def backward_weight(self, weight, random, scale):
        ...         return weight / 2
    """
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise ConversionError(f"a rule's name is a lower-case identifier, not {name!r}")
    if name in _registry:
        raise ConversionError(f"a rule named {name!r} is registered already")

    def register(cls: type[R]) -> type[R]:
        if not (isinstance(cls, type) and issubclass(cls, (LocalRule, DirectRule, BP, Schedule))):
            raise ConversionError(
                f"rule {name!r} must be a subclass of rewire.LocalRule or rewire.DirectRule, not {cls!r}"
            )
        cls.name = name
        _registry[name] = cls
        return cls

    return register


def rules() -> tuple[str, ...]:
    """Names of all rules, in the order they were registered; then those that other packages ship."""
    return (*_registry, *(name for name in plugins.found() if name not in _registry))


def _known(name: str) -> bool:
    """Whether a rule is registered by that name, now that a package which ships one has been asked for it."""
    if name in _registry:
        return True
    if name not in plugins.found():
        return False
    shipped = plugins.load(name)
    if name not in _registry:  # its class has not been registered by a decorator
        try:
            if isinstance(shipped, type) and issubclass(shipped, Rule) and shipped.name in _registry:
                raise ConversionError(f"its class is registered as {shipped.name!r}")
            register: Callable[[object], object] = register_rule(name)  # type: ignore[assignment]
            register(shipped)
        except ConversionError as problem:
            raise ConversionError(f"rule {name!r} is shipped by {plugins.where(name)}: {problem}") from None
    return True


def resolve(rule: str | Rule) -> Rule:
    """The rule for a name, or for a name with options (``"fitted(every=100)"``), or the rule itself.

    Raises:
        ConversionError: for an unknown name or option (with the nearest right one), or something that is no rule.
    """
    if isinstance(rule, (LocalRule, DirectRule, BP, Schedule)):
        return rule
    if isinstance(rule, str):
        name, options = parse(rule, rules()) if "(" in rule else (rule, {})
        if not _known(name):
            raise ConversionError(f"unknown rule {name!r}{nearest(name, rules())}; rules: {', '.join(rules())}")
        made: Rule = build(name, _registry[name], options)
        return made
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise ConversionError(f"{rule.__name__} is a class: pass an instance, {rule.__name__}()")
    raise ConversionError(f"a rule is a name or an instance of rewire.LocalRule or rewire.DirectRule, not {rule!r}")


register_rule("bp")(BP)
