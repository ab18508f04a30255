"""What a layer hands back to its input: one small class per rule, beside its equation and source."""

from rewire.rules import direct, dkp, fitted, grape, local, schedule  # noqa: F401  (importing registers the built-in rules)
from rewire.rules.base import BP, DirectRule, LocalRule, Rule, Schedule, register_rule, resolve, rules

__all__ = ["BP", "DirectRule", "LocalRule", "Rule", "Schedule", "register_rule", "resolve", "rules"]
