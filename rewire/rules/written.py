"""Rules and structures as they are written: ``"fitted(every=100)"``, ``"lowrank(rank=8)"``.

What ``repr`` shows of them can be given to ``convert``, to the command line and to configuration files.
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

# By what is written.
_FORM = {
    "rule": "a rule with options is written name(option=value, ...), as in 'dfa(layout=\"sequence_first\")'",
    "feedback": "a structure with options is written name(option=value, ...), as in 'lowrank(rank=8)'",
}


def parse(text: str, rules: Collection[str] = (), what: str = "rule") -> tuple[str, dict[str, Any]]:
    """``name(option=value, ...)`` taken apart; options are literals, structures, torch dtypes and rules.

    Args:
        rules: names that may stand for a rule without quotes: ``switch(first=bp, then=fitted(every=50), at=100)``.
        what: ``"rule"`` or ``"feedback"``: what ``text`` should be.

    Raises:
        ConversionError: for text of another form.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise _unreadable(what, text) from None
    if isinstance(call, ast.Name):
        return call.id, {}
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise _unreadable(what, text)
    return call.func.id, {option: _value(node, text, rules, what) for option, node in _options(call, text, what)}


@cache  # a rule of one's own may have it in a class attribute, which is read in every pass
def structure(text: str) -> structures.Structure:
    """The structure of feedback that is written with options, by its name or its class's.

    Raises:
        ConversionError: for text of another form, and an unknown name or option.
    """
    return _structure(*parse(text, what="feedback"))


def build(name: str, make: Callable[..., Any], options: Mapping[str, Any], what: str = "rule") -> Any:
    """``make(**options)``, with what ``make`` takes in the message where that is impossible.

    Args:
        name: what was written before the options.
        what: ``"rule"`` or ``"feedback"``: what is made.

    Raises:
        ConversionError: for an option there is not, one that is missing, or one that what was made does not keep: it
            could not be written again, and would be lost from tables, configurations and checkpoints.
    """
    takes = parameters(make)
    for option in options:
        if option not in takes:
            known = f"; options: {', '.join(takes)}" if takes else "; it has none"
            raise ConversionError(f"{what} {name!r} has no option {option!r}{nearest(option, takes)}{known}")
    missing = [option for option, default in takes.items() if default is _NEEDED and option not in options]
    if missing:
        shown = ", ".join(f"{option}=..." for option in missing)
        raise ConversionError(f"{what} {name!r} needs {', '.join(missing)}, as in '{name}({shown})'")
    made = make(**options)
    for option, value in options.items():
        default = takes[option]
        if value != default and getattr(made, option, default) == default:  # as :func:`written` would look
            raise ConversionError(
                f"{what} {name!r} does not keep its option {option!r}, so that {option}={value!r} would be lost where "
                f"it is written down: {type(made).__name__}.__init__ has to say self.{option} = {option}"
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


def _unreadable(what: str, text: str) -> ConversionError:
    return ConversionError(f"cannot read {what} {text!r}: {_FORM[what]}")


def _structure(name: str, options: Mapping[str, Any]) -> structures.Structure:
    known = structures.NAMES.get(name)
    if known is None and name not in structures.CLASSES:
        raise structures.unknown(name)
    make, said = (structures.CLASSES[name], {}) if known is None else (type(known), known.said)
    made: structures.Structure = build(name, make, {**said, **options}, "feedback")
    return made


def _options(call: ast.Call, text: str, what: str) -> list[tuple[str, ast.expr]]:
    found: list[tuple[str, ast.expr]] = []
    for keyword in call.keywords:
        if keyword.arg is None:
            raise _unreadable(what, text)
        found.append((keyword.arg, keyword.value))
    return found


def _value(node: ast.expr, text: str, rules: Collection[str], what: str) -> Any:
    name = node.func if isinstance(node, ast.Call) else node
    if isinstance(name, ast.Name) and name.id in rules:
        return ast.unparse(node)
    kinds = structures.NAMES.keys() | structures.CLASSES.keys()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and not node.args:
        options = {option: _value(value, text, (), what) for option, value in _options(node, text, what)}
        return _structure(node.func.id, options)
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
            f"cannot read {shown!r} in {what} {text!r}{meant}{';' if meant else ':'} values are numbers, strings in "
            "quotes, dtypes (torch.bfloat16), structures or rules"
        ) from None
