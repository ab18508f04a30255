"""Whether a layer can be under a local rule whose feedback learns; asked when a model is converted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rewire.errors import ConversionError
from rewire.following import Learner
from rewire.layers.kinds import Kind
from rewire.layers.own_forward import OwnForward
from rewire.rules.base import LearnedLocal, Rule
from rewire.state import LayerState


def learner_for(state: LayerState, module: nn.Module, rule: Rule, shared: Mapping[int, list[str]]) -> Learner | None:
    """The learner of a layer; None under a rule whose feedback is not of this sort.

    Args:
        shared: names of all parameters, by the parameter's identity.

    Raises:
        ConversionError: where the rule would not mean what it says.
    """
    if not isinstance(rule, LearnedLocal):
        return None
    _check(state.name, state.kind, module, rule, shared)
    return Learner(state, rule, state.kind.form(module))


def _check(name: str, kind: Kind, module: nn.Module, rule: LearnedLocal, shared: Mapping[int, list[str]]) -> None:
    way_out = f"layers={{{name!r}: 'fa'}} or another rule"
    if isinstance(kind, OwnForward):
        raise ConversionError(
            f"layer {name!r}: {type(module).__name__} has a forward of its own, which may make anything of its weight, "
            f"and {rule!r} learns from the weight itself: {way_out}"
        )
    weight = module._parameters.get(kind.parameter)
    if rule.trained and (weight is None or is_parametrized(module, kind.parameter)):
        raise ConversionError(
            f"layer {name!r}: its weight is made of other parameters (weight_norm or another parametrization), and "
            f"{rule!r} needs one that is a Parameter of its own, which the optimizer changes: {way_out}"
        )
    if not kind.look(module).is_floating_point():
        raise ConversionError(f"layer {name!r}: its weight is no floating-point tensor, as {rule!r} needs: {way_out}")
    others = shared.get(id(weight), [])
    if rule.trained and len(others) > 1:
        raise ConversionError(
            f"layer {name!r}: its weight is shared ({', '.join(others)}), so that it also gets gradients that do not "
            f"pass this layer, and {rule!r} could not follow them: {way_out}"
        )


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters, by identity: more than one where modules share it."""
    found: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return found
