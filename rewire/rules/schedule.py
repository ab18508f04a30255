"""Rules that change in training, by the number of the pass."""

from __future__ import annotations

from rewire.errors import ConversionError
from rewire.rules.base import Rule, Schedule, register_rule, resolve


class _OfTwo(Schedule):
    """Two rules, and when it is whose turn."""

    def __init__(self, one: str | Rule, other: str | Rule) -> None:
        self._parts = _part(one), _part(other)

    def parts(self) -> tuple[Rule, ...]:
        return self._parts


def _part(rule: str | Rule) -> Rule:
    part = resolve(rule)
    if isinstance(part, Schedule):
        raise ConversionError(f"a schedule chooses between rules, not between schedules: {part!r}")
    return part


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConversionError(f"{name} is a whole number of passes, {least} or more, not {value!r}")
    return value


@register_rule("switch")
class Switch(_OfTwo):
    """One rule for the first ``at`` passes, another from then on: ``"switch(first='bp', then='dfa', at=100)"``.

    Args:
        first: a name or a rule.
        then: a name or a rule. A direct rule with ``scale="auto"`` measures its scale in its own first pass, which is
            exact backprop.
        at: the first pass of ``then``.

    Raises:
        ConversionError: for an unknown rule, a schedule in place of a rule, or a number that is none.
    """

    def __init__(self, *, first: str | Rule, then: str | Rule, at: int) -> None:
        super().__init__(first, then)
        self.first, self.then = map(repr, self.parts())
        self.at = _whole("at", at, 1)

    def now(self, passes: int) -> Rule:
        return self._parts[passes >= self.at]


@register_rule("anchored")
class Anchored(_OfTwo):
    """A rule with a pass of exact backprop now and then: ``"anchored(rule='dfa', every=20)"``.

    Passes 0, ``every``, 2 ``every``, ... are the anchors.

    Args:
        rule: a name or a rule.
        every: how many passes from one anchor to the next.
        by: the rule of the anchors.

    Raises:
        ConversionError: for an unknown rule, a schedule in place of a rule, or a number that is none.
    """

    def __init__(self, *, rule: str | Rule, every: int = 20, by: str | Rule = "bp") -> None:
        super().__init__(rule, by)
        self.rule, self.by = map(repr, self.parts())
        self.every = _whole("every", every, 1)

    def now(self, passes: int) -> Rule:
        return self._parts[passes % self.every == 0]
