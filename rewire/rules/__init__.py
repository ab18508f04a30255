"""What a layer hands back to its input: one small class per rule, beside its equation and source."""

from rewire.rules import direct, local  # noqa: F401  (importing registers the built-in rules)

# isort: split
from rewire.rules import fitted, learned_local  # noqa: F401
from rewire.rules.base import BP, DirectRule, LearnedLocal, LocalRule, Rule, register_rule, resolve, rules

__all__ = ["BP", "DirectRule", "LearnedLocal", "LocalRule", "Rule", "register_rule", "resolve", "rules"]
