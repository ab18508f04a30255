"""The two kinds of rule, and the table of names.

A layer computes ``y = W x + b``. Its weight and bias gradients are always exact given the gradient
``delta`` at its own output; a rule only decides what the layer hands back to ``x``:

- a *local* rule uses ``delta`` and a backward weight in place of ``W``;
- a *direct* rule uses the output error ``e`` and a feedback ``B`` that leads straight to ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from torch import Tensor

from rewire import structures
from rewire.errors import ConversionError, nearest
from rewire.routing import LAYOUTS


class Rule:
    """What a layer hands back to its input. Subclass :class:`LocalRule` or :class:`DirectRule`.

    Attributes:
        name: how users write it; set by :func:`register_rule`.
        source: the publication the rule comes from.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def __repr__(self) -> str:
        return self.name or type(self).__name__


class BP(Rule):
    """Backpropagation: ``W^T delta``, the layer's own gradient."""


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
        raise NotImplementedError


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
        >>> from rewire.rules.direct import DFA
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

    def __repr__(self) -> str:
        plain = super().__repr__()
        said = [f"{what}={value!r}" for what in ("layout", "feedback") if (value := getattr(self, what)) is not None]
        return f"{plain}({', '.join(said)})" if said else plain

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        """What is projected, in the output's shape.

        Args:
            error: e = dL/dy at the output layer's output y.
            targets: what :func:`rewire.targets` was given, or None.
            axis: the dimension of e that holds the n output features.

        Returns:
            A tensor of e's shape.
        """
        raise NotImplementedError


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
    if not name.isidentifier() or name != name.lower():
        raise ConversionError(f"a rule's name is a lower-case identifier, not {name!r}")
    if name in _registry:
        raise ConversionError(f"a rule named {name!r} is registered already")

    def register(cls: type[R]) -> type[R]:
        if not (isinstance(cls, type) and issubclass(cls, (LocalRule, DirectRule, BP))):
            raise ConversionError(
                f"rule {name!r} must be a subclass of rewire.LocalRule or rewire.DirectRule, not {cls!r}"
            )
        cls.name = name
        _registry[name] = cls
        return cls

    return register


def rules() -> tuple[str, ...]:
    """Names of all rules, in the order they were registered."""
    return tuple(_registry)


def resolve(rule: str | Rule) -> Rule:
    """The rule for a name, or the rule itself.

    Raises:
        ConversionError: for an unknown name (with the nearest right one), or something that is no rule.
    """
    if isinstance(rule, (LocalRule, DirectRule, BP)):
        return rule
    if isinstance(rule, str):
        if rule in _registry:
            return _registry[rule]()
        raise ConversionError(f"unknown rule {rule!r}{nearest(rule, _registry)} rules: {', '.join(_registry)}")
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise ConversionError(f"{rule.__name__} is a class: pass an instance, {rule.__name__}()")
    raise ConversionError(f"a rule is a name or an instance of rewire.LocalRule or rewire.DirectRule, not {rule!r}")


register_rule("bp")(BP)
