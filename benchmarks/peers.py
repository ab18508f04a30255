"""Other libraries on the same models, as their authors use them. Both are optional: what is not there is not timed.

BioTorch (Sanfiz and Akrout 2021) replaces Linear and Conv2d layers by its own:

    pip install --no-deps --target peers biotorch

TinyDFA (Launay et al. 2020) is not on PyPI. Its package is the folder ``TinyDFA/tinydfa`` of
github.com/lightonai/dfa-scales-to-modern-deep-learning: copy it into ``peers`` too. It is a module to be put after each
layer by hand, and one after the output; here every Linear and Conv but the first gets one in front, which is the place
where rewire feeds back.

    PYTHONPATH=peers make bench
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from models import Case, loss_of
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

RULES = {"biotorch": ("fa", "frsf", "brsf", "dfa"), "tinydfa": ("dfa",)}


def names() -> list[str]:
    """All contenders of this file."""
    return [f"{library}:{rule}" for library, rules in RULES.items() for rule in rules]


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def loss_under(library: str, rule: str, model: nn.Module, case: Case) -> Loss:
    """A function of (inputs, targets) whose result's backward is the library's.

    Args:
        model: changed in place, or taken apart.

    Raises:
        Exception: whatever the library raises on a model that it does not know.
    """
    return _biotorch(rule, model, case) if library == "biotorch" else _tinydfa(model, case)


def _biotorch(rule: str, model: nn.Module, case: Case) -> Loss:
    from biotorch.module.biomodule import BioModule

    device = next(model.parameters()).device
    converted = BioModule(model, mode=rule, copy_weights=True, output_dim=case.classes).to(device)
    if rule != "dfa":
        return lambda x, y: loss_of(converted(x), y)
    # It wants the targets in the forward, and differentiates the loss once more for e.
    return lambda x, y: loss_of(converted(x, targets=y, loss_function=loss_of), y)


def _tinydfa(model: nn.Module, case: Case) -> Loss:
    from tinydfa import DFA, DFALayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    inside = (0, 1) if case.tokens else (0,)
    points = []
    for name, layer in layers[1:]:
        parent, _, attribute = name.rpartition(".")
        points.append(DFALayer(name, batch_dims=inside))
        setattr(model.get_submodule(parent), attribute, nn.Sequential(points[-1], layer))
    top = DFA(points, batch_dims=inside)

    return lambda x, y: loss_of(top(model(x)), y)
