"""What a layer hands back to its input: one small class per rule, beside its equation and source."""

from rewire.rules import direct, local  # noqa: F401  (importing registers the built-in rules)

# isort: split
from rewire.rules import dkp, fitted, grape, learned_local, schedule  # noqa: F401
from rewire.rules.base import (
    BP,
    DirectRule,
    LearnedDirect,
    LearnedLocal,
    LocalRule,
    Rule,
    Schedule,
    register_rule,
    resolve,
    rules,
)

__all__ = [
    "BP",
    "DirectRule",
    "LearnedDirect",
    "LearnedLocal",
    "LocalRule",
    "Rule",
    "Schedule",
    "register_rule",
    "resolve",
    "rules",
]
