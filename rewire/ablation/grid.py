"""What a grid is: every combination of the values given, from options or from a TOML file."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rewire.errors import InputError, nearest
from rewire.words import words

from . import data
from .cell import OPTIMIZERS, Cell
from .inputs import one_of, positive

BASELINE = "bp"
CONTROLS = (BASELINE, "shallow")
# What is sensible depends on another setting, so these stand here.
EPOCHS = {"digits": 15, "fashion-mnist": 3}
LR = {"adam": 2e-3, "sgd": 0.05}
_OPTIMIZER = ("name", "lr", "momentum", "weight_decay", "schedule")
# As people write them, in a file of one model or rule.
_ALIASES = {"model": "models", "rule": "rules", "seed": "seeds", "optimizer": "optimizers"}


@dataclass(frozen=True)
class Grid:
    """All combinations of these; each field is a tuple of values unless it says otherwise.

    Attributes:
        data_dir: one folder, for the data sets that need one.
        layers: assignments of rules to patterns, each a tuple of pairs; ``()`` is none.
        blocks: each a tuple of patterns.
        optimizers: each a name with lr, momentum, weight decay and schedule, complete.
        epochs: one number, or None: what suits the data.
        alignments: one number: how often alignment is measured in each cell.
        controls: add cells of plain backprop and of ``shallow`` (random features), once per model, data, optimizer and
            seed, where the grid does not have them anyway.
        together: at most so many seeds of a cell are trained together (:mod:`.together`); 0 and 1: one by one.
        threads: torch's threads for each cell.
    """

    models: tuple[str, ...] = ("mlp", "cnn")
    rules: tuple[str, ...] = ("bp", "fa", "usf", "frsf", "dfa")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: tuple[str, ...] = ("digits",)
    data_dir: str | None = None
    layers: tuple[tuple[tuple[str, str], ...], ...] = ((),)
    blocks: tuple[tuple[str, ...], ...] = ((),)
    feedback: tuple[str, ...] = ("dense",)
    skip: tuple[str, ...] = ("keep",)
    scale: tuple[str | float, ...] = ("auto",)
    optimizers: tuple[tuple[tuple[str, Any], ...], ...] = ()
    batch_size: tuple[int, ...] = (32,)
    epochs: int | None = None
    alignments: int = 5
    controls: bool = True
    together: int = 0
    threads: int = 1

    def cells(self) -> list[Cell]:
        """Every cell, in an order that is always the same: seeds next to each other, controls first.

        Raises:
            InputError: something about a cell cannot be.
        """
        if self.data_dir is not None and not any(name in data.IN_A_FOLDER for name in self.data):
            raise InputError(f"{' and '.join(self.data)} take no data directory")
        found: dict[str, Cell] = {}
        common = itertools.product(self.data, self.models, self.optimizers, self.batch_size)
        for name, model, optimizer, batch_size in common:
            options = dict(optimizer)
            base = Cell(
                model=model,
                rule=BASELINE,
                seed=0,
                data=name,
                data_dir=Path(self.data_dir) if self.data_dir is not None and name in data.IN_A_FOLDER else None,
                epochs=EPOCHS.get(name, 10) if self.epochs is None else self.epochs,
                batch_size=batch_size,
                alignments=self.alignments,
                optimizer=options.pop("name"),
                **options,
            )
            for variant in self._variants(base):
                for seed in self.seeds:
                    cell = replace(variant, seed=seed).canonical()
                    found.setdefault(cell.id, cell)
        return list(found.values())

    def _variants(self, base: Cell) -> Iterable[Cell]:
        """``base`` under every rule and every way to assign it."""
        ways = list(itertools.product(self.layers, self.blocks, self.feedback, self.skip, self.scale))
        if self.controls:
            yield base  # plain backprop
        for rule in self.rules:
            for layers, blocks, feedback, skip, scale in ways:
                yield replace(base, rule=rule, layers=layers, blocks=blocks, feedback=feedback, skip=skip, scale=scale)
        if self.controls and "shallow" not in self.rules:
            yield replace(base, rule="shallow")

    def config(self) -> dict[str, Any]:
        """Everything :func:`read` needs to give this grid again, ready for JSON."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        found["layers"] = [dict(pairs) for pairs in self.layers]
        found["blocks"] = [list(patterns) for patterns in self.blocks]
        found["optimizers"] = [dict(options) for options in self.optimizers]
        return found


def read(given: Mapping[str, Any], where: str = "the grid") -> Grid:
    """A grid from plain values, as TOML, JSON or command-line options hold them. One value may stand for a list of one.

    Beside :class:`Grid`'s fields there are ``lr``, ``momentum``, ``weight_decay`` and ``schedule``, for all
    optimizers that do not say themselves. ``seeds = 3`` is the seeds 0, 1 and 2.

    Raises:
        InputError: a key or name is unknown, with the nearest right one; a value is of a wrong kind.
    """
    names = {field.name for field in fields(Grid)} | set(_OPTIMIZER[1:])
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = _ALIASES.get(key, key)
        if name not in names:
            raise InputError(f"{where}: unknown key {key!r}{nearest(key, names | set(_ALIASES))}")
        if name in values:
            raise InputError(f"{where}: {key!r} is given twice, under two names")
        if value is not None:
            values[name] = value
    if "data_dir" in values:
        values["data_dir"] = str(values["data_dir"])
    optimizers = _optimizers(values, where)
    for name in ("models", "rules", "data", "feedback", "skip"):
        if name in values:
            values[name] = _names(where, name, values[name])
    for name in ("epochs", "alignments", "together", "threads"):
        if name in values:
            values[name] = _number(where, name, values[name])
    for name in ("together", "alignments"):
        positive(name, values.get(name, 0), zero=True)
    positive("threads", values.get("threads", 1))
    if not isinstance(values.get("controls", True), bool):
        raise InputError(f"{where}: controls is true or false, not {values['controls']!r}")
    if "seeds" in values:
        values["seeds"] = _seeds(where, values["seeds"])
    if "batch_size" in values:
        values["batch_size"] = tuple(
            _number(where, "batch_size", n) for n in _axis(where, "batch_size", values["batch_size"])
        )
    if "scale" in values:
        values["scale"] = tuple(_scale(where, scale) for scale in _axis(where, "scale", values["scale"]))
    if "layers" in values:
        values["layers"] = tuple(_assignment(where, each) for each in _listed(values["layers"])) or ((),)
    if "blocks" in values:
        values["blocks"] = _blocks(where, values["blocks"])
    return Grid(optimizers=optimizers, **values)


def named(text: str) -> list[str]:
    """The names in ``text``, apart by spaces or commas. Quotes keep one with spaces together, and a ``.npz`` file
    that is there is one name.

    Raises:
        InputError: a parenthesis or quote is not closed.
    """
    return [text] if text.endswith(".npz") and Path(text).is_file() else [_unquoted(word) for word in words([text])]


def _unquoted(word: str) -> str:
    inner = word[1:-1]
    return inner if word[:1] in ('"', "'") and word == f"{word[0]}{inner}{word[0]}" else word


def from_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says, for :func:`read`.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        beside = [other.name for other in path.parent.iterdir() if other != path] if path.parent.is_dir() else []
        raise InputError(f"cannot read {path}: {error.strerror}{nearest(path.name, beside)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What is not the same in two grids' :meth:`Grid.config`, in words; ``ours`` is new, ``theirs`` is on disk."""
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} now" for name in names)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _axis(where: str, key: str, value: Any) -> list[Any]:
    items = _listed(value)
    if not items:
        raise InputError(f"{where}: {key} is empty")
    return items


def _names(where: str, key: str, value: Any) -> tuple[str, ...]:
    items = _axis(where, key, named(value) if isinstance(value, str) else value)
    for item in items:
        if not isinstance(item, str):
            raise InputError(f"{where}: {key} takes names, not {item!r}")
    return tuple(dict.fromkeys(items))


def _number(where: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {key} takes a whole number, not {value!r}")
    return value


def _float(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {key} takes a number, not {value!r}")
    return float(value)


def _scale(where: str, value: Any) -> str | float:
    return value if isinstance(value, str) else _float(where, "scale", value)


def _seeds(where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        positive("seeds", _number(where, "seeds", value))
        return tuple(range(value))
    return tuple(dict.fromkeys(_number(where, "seeds", seed) for seed in _axis(where, "seeds", value)))


def _assignment(where: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping) or not all(isinstance(rule, str) for rule in value.values()):
        raise InputError(f"{where}: layers takes tables of patterns and rules, such as {{'0' = 'fa'}}, not {value!r}")
    return tuple(value.items())


def _blocks(where: str, value: Any) -> tuple[tuple[str, ...], ...]:
    items = _listed(value)
    if all(isinstance(item, str) for item in items):  # one way to cut the model into blocks
        return (tuple(items),)
    for item in items:
        if not isinstance(item, list | tuple) or not all(isinstance(pattern, str) for pattern in item):
            raise InputError(f"{where}: blocks takes a list of patterns, or a list of such lists, not {value!r}")
    return tuple(tuple(item) for item in items)


def _optimizers(values: dict[str, Any], where: str) -> tuple[tuple[tuple[str, Any], ...], ...]:
    """Every optimizer with everything about it; takes their keys out of ``values``."""
    flat: dict[str, list[Any]] = {}
    for key in _OPTIMIZER[1:]:
        if key in values:
            flat[key] = _settings(where, key, values.pop(key))
    found: list[tuple[tuple[str, Any], ...]] = []
    given = values.pop("optimizers", "adam")
    for item in _axis(where, "optimizers", named(given) if isinstance(given, str) else given):
        found += _optimizer({"name": item} if isinstance(item, str) else item, flat, where)
    return tuple(dict.fromkeys(found))


def _settings(where: str, key: str, value: Any) -> list[Any]:
    if key == "schedule":
        return list(_names(where, key, value))
    return [_float(where, key, each) for each in _axis(where, key, value)]


def _optimizer(table: Any, flat: Mapping[str, Sequence[Any]], where: str) -> list[tuple[tuple[str, Any], ...]]:
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise InputError(f"{where}: an optimizer is a name or a table such as {{name = 'sgd'}}, not {table!r}")
    for key in table:
        if key not in _OPTIMIZER:
            raise InputError(f"{where}: unknown key {key!r} of an optimizer{nearest(key, _OPTIMIZER)}")
    name = one_of("optimizer", table["name"], OPTIMIZERS)
    defaults: dict[str, Any] = {"lr": LR[name], "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    axes: list[list[Any]] = []
    for key, default in defaults.items():
        axes.append(_settings(where, key, table[key]) if key in table else list(flat.get(key, [default])))
    return [(("name", name), *zip(defaults, each, strict=True)) for each in itertools.product(*axes)]
