"""Structures of the feedback B of direct rules: what is drawn, what is kept, how it multiplies.

``convert(model, "dfa", feedback="lowrank")`` takes one by name, ``feedback="lowrank(rank=64)"`` or
``feedback=rewire.structures.LowRank(rank=64)`` one with options, and ``DFA(feedback=...)``, of
``from rewire.rules import DFA``, gives one to the layers under that rule object. See ``docs/structures.md``.
"""

from __future__ import annotations

from rewire.errors import ConversionError, nearest
from rewire.structures.base import Feedback, Place, Structure
from rewire.structures.dense import Dense
from rewire.structures.lowrank import LowRank
from rewire.structures.seeded import Seeded
from rewire.structures.shared import Shared
from rewire.structures.sparse import Sparse

NAMES: dict[str, Structure] = {
    "dense": Dense(),
    "channel": Dense(per="channel"),
    "uniform": Dense("uniform"),
    "orthogonal": Dense("orthogonal"),
    "binary": Dense("binary"),
    "ternary": Dense("ternary"),
    "sparse": Sparse(),
    "lowrank": LowRank(),
    "shared": Shared(),
    "seeded": Seeded(),
}

CLASSES: dict[str, type[Structure]] = {cls.__name__: cls for cls in (Dense, LowRank, Seeded, Shared, Sparse)}

__all__ = ["NAMES", "Dense", "Feedback", "LowRank", "Place", "Seeded", "Shared", "Sparse", "Structure", "resolve"]


def resolve(feedback: object) -> Structure:
    """The structure for a name, or for one with options (``"lowrank(rank=64)"``, ``"LowRank(rank=64)"``), or itself.

    Raises:
        ConversionError: for an unknown name or option (with the nearest right one), or something that is no structure.
    """
    if isinstance(feedback, Structure):
        return feedback
    if isinstance(feedback, str):
        if feedback in NAMES:
            return NAMES[feedback]
        if "(" in feedback:
            from rewire.rules.written import structure  # imports this package

            return structure(feedback)
        raise unknown(feedback)
    if isinstance(feedback, type) and issubclass(feedback, Structure):
        raise ConversionError(f"{feedback.__name__} is a class: pass an instance, {feedback.__name__}()")
    raise ConversionError(
        f"feedback is a name ({', '.join(NAMES)}) or an object from rewire.structures, not {feedback!r}"
    )


def unknown(name: str) -> ConversionError:
    """What to raise where no structure has that name."""
    return ConversionError(
        f"unknown feedback {name!r}{nearest(name, NAMES)}; feedback is one of {', '.join(NAMES)}, or an object from "
        "rewire.structures"
    )
