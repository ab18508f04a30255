"""What a layer hands back to its input: one small class per rule, beside its equation and source."""

# Importing registers the built-in rules.
from rewire.rules import direct, dkp, fitted, grape, learned_local, local, schedule  # noqa: F401
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
