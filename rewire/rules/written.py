"""Rules and structures as they are written: ``"fitted(every=100)"``, ``"dfa(feedback=LowRank(rank=8))"``.

What ``repr`` shows of a rule can be given to ``convert``, to the command line and to configuration files.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from rewire import structures
from rewire.errors import ConversionError, nearest

_FORM = "a rule with options is written name(option=value, ...), as in 'dfa(layout=\"sequence_first\")'"


def parse(text: str, rules: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """``name(option=value, ...)`` taken apart; options are literals, structures, torch dtypes and rules.

    Args:
        rules: names that may stand for a rule without quotes: ``switch(first=bp, then=fitted(every=50), at=100)``.

    Raises:
        ConversionError: for text of another form.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ConversionError(f"cannot read rule {text!r}: {_FORM}") from None
    if isinstance(call, ast.Name):
        return call.id, {}
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ConversionError(f"cannot read rule {text!r}: {_FORM}")
    return call.func.id, {option: _value(node, text, rules) for option, node in _options(call, text)}


def build(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """``make(**options)``, with what ``make`` takes in the message where that is impossible.

    Raises:
        ConversionError: for an option there is not, one that is missing, or one that what was made does not keep: it
            could not be written again, and would be lost from tables, configurations and checkpoints.
    """
    takes = parameters(make)
    for option in options:
        if option not in takes:
            known = f"; options: {', '.join(takes)}" if takes else "; it has none"
            raise ConversionError(f"rule {name!r} has no option {option!r}{nearest(option, takes)}{known}")
    missing = [option for option, default in takes.items() if default is _NEEDED and option not in options]
    if missing:
        shown = ", ".join(f"{option}=..." for option in missing)
        raise ConversionError(f"rule {name!r} needs {', '.join(missing)}, as in '{name}({shown})'")
    made = make(**options)
    for option, value in options.items():
        default = takes[option]
        if value != default and getattr(made, option, default) == default:  # as :func:`written` would look
            raise ConversionError(
                f"rule {name!r} does not keep its option {option!r}, so that {option}={value!r} would be lost where "
                f"the rule is written down: {type(made).__name__}.__init__ has to say self.{option} = {option}"
            )
    return made


def written(name: str, rule: object) -> str:
    """How ``rule`` is written: its name, and the options whose values are not the usual ones."""
    make: Callable[..., Any] = type(rule)
    said = {
        option: value
        for option, default in parameters(make).items()
        if (value := getattr(rule, option, default)) != default
    }
    return f"{name}({', '.join(f'{option}={value!r}' for option, value in said.items())})" if said else name


_NEEDED = object()


@cache  # a signature takes long to find, and rules that change in training are written again and again
def parameters(make: Callable[..., Any]) -> Mapping[str, Any]:
    """Options that ``make`` takes by name, with their default values."""
    try:
        signature = inspect.signature(make)
    except ValueError:
        return MappingProxyType({})
    options = {
        name: _NEEDED if parameter.default is parameter.empty else parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return MappingProxyType(options)


def _options(call: ast.Call, text: str) -> list[tuple[str, ast.expr]]:
    found: list[tuple[str, ast.expr]] = []
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ConversionError(f"cannot read rule {text!r}: {_FORM}")
        found.append((keyword.arg, keyword.value))
    return found


def _value(node: ast.expr, text: str, rules: Collection[str] = ()) -> Any:
    name = node.func if isinstance(node, ast.Call) else node
    if isinstance(name, ast.Name) and name.id in rules:
        return ast.unparse(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        kind = getattr(structures, node.func.id, None)
        if node.func.id in structures.__all__ and isinstance(kind, type) and issubclass(kind, structures.Structure):
            return kind(**{option: _value(value, text) for option, value in _options(node, text)})
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        dtype = getattr(torch, node.attr, None)
        if isinstance(dtype, torch.dtype):
            return dtype
    try:
        return ast.literal_eval(node)
    except ValueError:
        shown = ast.unparse(node)
        meant = nearest(name.id, rules) if isinstance(name, ast.Name) else ""
        raise ConversionError(
            f"cannot read {shown!r} in rule {text!r}{meant}{';' if meant else ':'} values are numbers, strings in "
            "quotes, structures or rules"
        ) from None
