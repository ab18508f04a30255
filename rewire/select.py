"""Which modules, which rule: patterns, types and callables to a plan, checked before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from rewire.attention import projections
from rewire.errors import ConversionError, nearest, some
from rewire.layers.block import Block
from rewire.layers.kinds import Kind
from rewire.layers.registry import kind_of, stand_in, why_not
from rewire.rules import BP, DirectRule, LocalRule, Rule, Schedule, resolve

RuleLike = str | Rule
Pattern = str | type[nn.Module]
Layers = Mapping[Pattern, RuleLike] | Callable[[str, nn.Module], RuleLike | None]


@dataclass
class Choice:
    """One module to be converted."""

    module: nn.Module
    names: tuple[str, ...]  # a module may be registered in several places; the first name counts
    kind: Kind
    rule: Rule
    part: str = ""  # of an attention that holds several layers; "" for the module itself
    within: nn.Module | None = None  # the attention around it
    covers: tuple[str, ...] = ()  # further names that patterns may fit
    wraps: nn.Module | None = None  # the layer it stands for, whose names and type patterns may fit too

    @property
    def name(self) -> str:
        return self.names[0]


def select(
    model: nn.Module, rule: RuleLike, layers: Layers | None, blocks: Sequence[Pattern] | Pattern | None
) -> list[Choice]:
    """Everything to be converted in ``model``, in registration order.

    Raises:
        ConversionError: unknown rule, a pattern or type that fits nothing, a rule that a layer cannot have,
            a model without layers.
    """
    default = resolve(rule)
    names = _names(model)
    block_of = _blocks(model, names, _listed(blocks))
    choices: list[Choice] = []
    inside: set[nn.Module] = set()
    around: dict[nn.Module, nn.Module] = {}
    for module, aliases in names.items():
        if module in inside:
            continue
        if module in block_of:
            inside.update(module.modules())
            choices.append(Choice(module, aliases, Block(module), default))
            continue
        wrapper = stand_in(module)
        if wrapper is not None and "forward" not in module.__dict__:
            kind, wrapped = wrapper
            inside.update(module.modules())
            choices.append(Choice(module, aliases, kind, default, covers=names[wrapped], wraps=wrapped))
            continue
        if isinstance(module, nn.MultiheadAttention):
            for part, projection in projections(module).items():
                parts = tuple(f"{alias}.{part}" if alias else part for alias in aliases)
                choices.append(Choice(module, parts, projection, default, part=part, covers=aliases))
            around[module.out_proj] = module
        own = kind_of(module)
        if own is not None:
            within = around.get(module)
            choices.append(Choice(module, aliases, own, default, within=within, covers=names[within] if within else ()))
    if not choices:
        found = sorted(
            {type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
        )
        raise ConversionError(
            f"{type(model).__name__} has no layer that a rule could change (Linear, Conv1d/2d/3d, "
            f"ConvTranspose1d/2d/3d); modules with parameters: {', '.join(found) or 'none'}"
        )
    _assign(choices, layers, names)
    for choice in choices:
        _check(choice)
    return choices


def _names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def _listed(blocks: Sequence[Pattern] | Pattern | None) -> tuple[Pattern, ...]:
    if blocks is None:
        return ()
    if isinstance(blocks, (str, type)):
        return (blocks,)
    if not isinstance(blocks, Iterable):
        raise ConversionError(f"blocks: name patterns or module types are needed, not {blocks!r}")
    return tuple(blocks)


def fits(pattern: Pattern, module: nn.Module, names: Iterable[str]) -> bool:
    """Whether a qualified-name pattern (fnmatch) or a module type covers a module."""
    if isinstance(pattern, str):
        return any(fnmatchcase(name, pattern) for name in names)
    return isinstance(module, pattern)


def _fitting(pattern: Pattern, choices: list[Choice]) -> list[Choice]:
    """The layers that a pattern covers. A layer's very name is that layer, whatever else it may mean as a pattern."""
    exact = [choice for choice in choices if pattern in (*choice.names, *choice.covers)]
    return exact or [choice for choice in choices if _covers(pattern, choice)]


def _covers(pattern: Pattern, choice: Choice) -> bool:
    """Whether a pattern covers a layer, by its own name and type or those of the attention it is part of."""
    if fits(pattern, choice.module, (*choice.names, *choice.covers)):
        return True
    return any(other is not None and fits(pattern, other, ()) for other in (choice.within, choice.wraps))


def _check_pattern(pattern: object, what: str) -> None:
    if not isinstance(pattern, str) and not (isinstance(pattern, type) and issubclass(pattern, nn.Module)):
        raise ConversionError(f"{what}: a name pattern or a module type is needed, not {pattern!r}")


def _blocks(model: nn.Module, names: dict[nn.Module, tuple[str, ...]], patterns: tuple[Pattern, ...]) -> set[nn.Module]:
    found: set[nn.Module] = set()
    for pattern in patterns:
        _check_pattern(pattern, "blocks")
        fitting = [m for m, aliases in names.items() if m is not model and pattern in aliases]
        fitting = fitting or [m for m, aliases in names.items() if m is not model and fits(pattern, m, aliases)]
        # Activations and pooling that a pattern happens to cover keep their true derivative.
        fitting = [m for m in fitting if next(m.parameters(), None) is not None]
        if not fitting:
            every = [alias for aliases in names.values() for alias in aliases if alias]
            hint = nearest(pattern, every) if isinstance(pattern, str) else ""
            others = any(m is not model and fits(pattern, m, aliases) for m, aliases in names.items())
            why = " (but some without parameters)" if others else ""
            raise ConversionError(f"blocks: no module fits {_show(pattern)}{why}{hint}")
        found.update(fitting)
    return found


def _assign(choices: list[Choice], layers: Layers | None, names: dict[nn.Module, tuple[str, ...]]) -> None:
    if layers is None:
        return
    if isinstance(layers, Mapping):
        for pattern, wanted in layers.items():
            _check_pattern(pattern, "layers")
            rule = resolve(wanted)
            fitting = _fitting(pattern, choices)
            if not fitting:
                known = [name for choice in choices for name in choice.names]
                why = _other(pattern, names)
                hint = nearest(pattern, known) if isinstance(pattern, str) and not why else ""
                raise ConversionError(
                    f"layers: no layer fits {_show(pattern)}{why}{hint}; layers: {some([*map(repr, known)], 12)}"
                )
            for choice in fitting:
                choice.rule = rule
    elif callable(layers) and not isinstance(layers, (type, nn.Module)):
        for choice in choices:
            chosen = layers(choice.name, choice.module)
            if chosen is not None:
                choice.rule = resolve(chosen)
    else:
        raise ConversionError(f"layers: a dict of patterns or a callable is needed, not {type(layers).__name__}")


def _other(pattern: Pattern, names: dict[nn.Module, tuple[str, ...]]) -> str:
    """What a pattern fits that no rule can be given to, in words; "" if it fits nothing at all."""
    module = next((m for m, aliases in names.items() if pattern in aliases), None)
    if module is None:
        module = next((m for m, aliases in names.items() if fits(pattern, m, aliases)), None)
    if module is None:
        return ""
    what = f", but {names[module][0]!r}, a {type(module).__name__}"
    if next(module.parameters(), None) is None:
        return f"{what} without weights, which no rule changes"
    if kind_of(module) is not None:
        return f"{what} inside a unit that is fed back as one"
    if next(module.parameters(recurse=False), None) is None:
        return f"{what} that holds others (with '.*' after its name, those are meant)"
    return f"{what}: {why_not(module)}"


def _check(choice: Choice) -> None:
    name, module = choice.name, choice.module
    check_rule(name, choice.kind, choice.rule)
    if "forward" in module.__dict__:
        raise ConversionError(
            f"layer {name!r} has a forward set on the object itself, which would bypass any rule: convert the model "
            "before wrapping it, or leave the layer out with a model of its own"
        )
    if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
        raise ConversionError(f"layer {name!r} is lazy and has no shape yet: run one forward before converting")
    assert isinstance(choice.rule, (BP, LocalRule, DirectRule, Schedule))


def check_rule(name: str, kind: Kind, rule: Rule) -> None:
    """Refuse a local rule where there is no weight it could replace."""
    if isinstance(rule, Schedule):
        for part in rule.parts():
            check_rule(name, kind, part)
    if isinstance(rule, LocalRule) and not kind.local:
        raise ConversionError(
            f"{name!r} is fed back as one block, which has no single weight for the local rule {rule!r} to replace: "
            "use a direct rule (dfa, sdfa, drtp, shallow) for it"
        )


def _show(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else f"type {pattern.__name__}"
