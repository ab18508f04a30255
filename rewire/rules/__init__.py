"""What a layer hands back to its input: one small class per rule, beside its equation and source.

``from rewire.rules import DFA`` gives a rule's class, and ``LearnedDirect`` and the like what to derive one's own from.
(``rewire.rules`` as an attribute is the function :func:`rules`, which lists names.)
"""

# Importing registers the built-in rules, in this order.
from rewire.rules.direct import DFA, DRTP, SDFA, Shallow
from rewire.rules.local import BRSF, FA, FRSF, USF

# isort: split
from rewire.rules.base import (
    BP,
    DirectRule,
    Draw,
    LearnedDirect,
    LearnedLocal,
    LocalRule,
    Rows,
    Rule,
    Schedule,
    register_rule,
    resolve,
    rules,
)
from rewire.rules.dkp import DKP
from rewire.rules.fitted import Fitted
from rewire.rules.grape import Grape
from rewire.rules.learned_local import KP, LDFA, PFA, WM
from rewire.rules.schedule import Anchored, Switch

__all__ = [
    "BP",
    "BRSF",
    "DFA",
    "DKP",
    "DRTP",
    "FA",
    "FRSF",
    "KP",
    "LDFA",
    "PFA",
    "SDFA",
    "USF",
    "WM",
    "Anchored",
    "DirectRule",
    "Draw",
    "Fitted",
    "Grape",
    "LearnedDirect",
    "LearnedLocal",
    "LocalRule",
    "Rows",
    "Rule",
    "Schedule",
    "Shallow",
    "Switch",
    "register_rule",
    "resolve",
    "rules",
]
