"""``alignment``: how far the rules' gradients are from backprop's, layer by layer, and whether that can be believed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from rewire.diagnose import trust
from rewire.diagnose.match import close, cosine, matched
from rewire.diagnose.measure import Twin, Watched
from rewire.diagnose.watch import Gradients, Randomness, Seen, bare, eagerly, layers_of
from rewire.errors import ConversionError
from rewire.roles import Role
from rewire.scale import root_mean_square


@dataclass(frozen=True)
class LayerAlignment:
    """One layer. Angles are in degrees; None is not measurable, and ``note`` says why.

    Attributes:
        name: qualified name.
        type: class, before conversion.
        rule: name of its rule.
        weight_angle: between the gradient of its weight under the rules and under backprop, as ``.backward()`` would
            leave them in ``.grad``: what the layers above hand back decides it, not this layer's own rule.
        input_angle: the same for the whole gradient at its input, all samples as one vector.
        feedback_angle: between W and the B that a local rule uses in its place.
        feedback_ratio: the norm of B by that of W.
        activation_norm: root mean square of its output; of the largest call, if it ran several times.
        norm: Euclidean norm of the weight's gradient under the rules.
        backprop_norm: the same under backprop.
        null_angle: mean of ``weight_angle`` with fresh random feedback everywhere.
        note: what could not be measured and why; what is special about the layer.
        null_spread: standard deviation of the angles ``null_angle`` is the mean of.
        growth: ``activation_norm`` by what it was at the start.
        weight_norm: Euclidean norm of the weight.
        dtype: of the weight.
        output: is an output layer.
        rounding_angle: between backprop's gradient and itself with every weight moved by one unit in its last place.
        counted: is one of those Γ is the mean over.
    """

    name: str
    type: str
    rule: str
    weight_angle: float | None = None
    input_angle: float | None = None
    feedback_angle: float | None = None
    feedback_ratio: float | None = None
    activation_norm: float | None = None
    norm: float | None = None
    backprop_norm: float | None = None
    null_angle: float | None = None
    note: str = ""
    null_spread: float | None = None
    growth: float | None = None
    rounding_angle: float | None = None
    weight_norm: float | None = None
    dtype: str = ""
    output: bool = False
    counted: bool = False


@dataclass(frozen=True)
class Alignment:
    """All converted layers. ``str()`` is a table.

    Attributes:
        title: class of the model.
        layers: one each, in registration order.
        flags: the trust checks that failed, in words, each naming layers (:mod:`rewire.diagnose.trust`).
    """

    title: str
    layers: list[LayerAlignment] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @property
    def gamma(self) -> float | None:
        """Γ: the mean over layers of cos(``weight_angle``), each layer counting once; None if there is none.

        Modelled on Launay et al. 2020 (arXiv:2006.12878), who average the cosine between the two gradients at each
        layer's output over samples. Here it is between the weights' gradients, of the whole batch: what an optimizer
        is given.

        Left out are the output layers, whose gradient is exact by definition, every other layer that no feedback
        lies above, and what was not measurable.
        """
        return trust.mean_cosine([layer.weight_angle for layer in self.layers if layer.counted])

    @property
    def ok(self) -> bool:
        """No trust check failed."""
        return not self.flags

    def record(self) -> dict[str, Any]:
        """For JSON: ``{"gamma", "flags", "layers": {name: {field: value}}}``, numbers that are not finite as None."""
        layers: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            fields = {key: _finite(value) for key, value in asdict(layer).items()}
            del fields["name"]
            layers[layer.name] = fields
        return {"gamma": _finite(self.gamma), "flags": list(self.flags), "layers": layers}

    @classmethod
    def from_record(cls, record: dict[str, Any], title: str = "") -> Alignment:
        """What :meth:`record` was made of."""
        layers = [LayerAlignment(name, **fields) for name, fields in record["layers"].items()]
        return cls(title, layers, list(record["flags"]))

    def __rich__(self) -> Table:
        gamma = "not measurable" if self.gamma is None else f"{self.gamma:.3f}"
        caption = "\n".join(self.flags) if self.flags else "all trust checks passed"
        title = f"{self.title}: Γ = {gamma}{'' if self.ok else ', NOT to be trusted'}"
        table = Table(title=Text(title), caption=Text(caption))  # names may hold what reads as markup
        for column, justify in _COLUMNS:
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for layer in self.layers:
            null = _degrees(layer.null_angle)
            if layer.null_spread is not None:
                null += f" ± {layer.null_spread:.1f}"
            cells = (
                layer.name or "(model)",
                layer.rule,
                _degrees(layer.weight_angle),
                null,
                _degrees(layer.input_angle),
                _degrees(layer.feedback_angle),
                _number(layer.feedback_ratio),
                _number(layer.norm),
                _number(layer.backprop_norm),
                _number(layer.activation_norm),
                "-" if layer.growth is None else f"×{layer.growth:.3g}",
                layer.note,
            )
            table.add_row(*map(Text, cells))
        return table

    def __str__(self) -> str:
        console = Console(width=150, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


_COLUMNS = (
    ("layer", "left"),
    ("rule", "left"),
    ("∠ weight", "right"),
    ("by chance", "right"),
    ("∠ input", "right"),
    ("∠ W, B", "right"),
    ("|B|/|W|", "right"),
    ("norm", "right"),
    ("backprop's", "right"),
    ("activation", "right"),
    ("growth", "right"),
    ("note", "left"),
)


def alignment(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    *,
    null: int = 8,
    baseline: Alignment | None = None,
) -> Alignment:
    """Per layer, the angle between the rules' gradients and backprop's on ``inputs``, and what makes it believable.

    Works on one deep copy, with the random state put back afterwards: parameters, gradients, buffers, feedback, modes
    and random numbers of ``model`` are as before. Each of the ``null`` + 3 passes starts from the same random
    numbers and buffers, so that dropout drops the same everywhere. A model that has not been trained yet is given its
    first, measuring passes on the copy.

    Args:
        model: a converted model, in the mode it is to be measured in. Of a compiled one the code that was compiled is
            run; of a DistributedDataParallel the module inside, on this process's inputs, and other processes need
            not take part.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        loss_fn: from the model's output to a scalar loss; called once per pass. What it makes of parameters that are
            not the copy's stays out of it. Rules that read targets find them as in training: ``with
            rewire.targets(y): rewire.alignment(...)``.
        null: how often to measure with fresh random feedback in place of the feedback in use: for local rules ``fa``'s,
            for direct rules their own (of ``dfa``, if it is learned). A pure function of the conversion's seed. With
            less than 3 no layer is flagged as chance.
        baseline: an earlier alignment of the same model, to compare activations with. None: with the first
            call of each layer that ran with gradients on after ``convert``.

    Returns:
        An :class:`Alignment`: ``.layers``, ``.gamma``, ``.flags``, ``.ok``, ``.record()``, and ``str()`` or rich to
        read it.

    Raises:
        ConversionError: if ``model`` is not converted, or cannot be copied (``fully_shard``); if ``null`` is not a
            number of passes.
        PassError: what such a pass raises in training too.

    Example:
        >>> print(rewire.alignment(model, x, lambda out: F.cross_entropy(out, y)))
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"alignment needs a torch.nn.Module, not {type(model).__name__}")
    model = bare(model)
    states = {name: layer.state for name, layer in layers_of(model).items()}
    if not states:
        raise ConversionError(f"{type(model).__name__} is not converted: call rewire.convert(model, ...) first")
    if isinstance(null, bool) or not isinstance(null, int) or null < 0:
        raise ConversionError(f"null is how many times fresh feedback is drawn, not {null!r}")
    if baseline is not None and not isinstance(baseline, Alignment):
        raise ConversionError(f"baseline is what rewire.alignment returned before, not {type(baseline).__name__}")
    starts = {name: state.start for name, state in states.items()}
    if baseline is not None:
        starts = {layer.name: layer.activation_norm for layer in baseline.layers}
    random = Randomness()
    try:
        with torch.enable_grad(), eagerly():
            return _measure(model, inputs, loss_fn, null, starts, random)
    finally:
        random.put_back()


def _measure(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    null: int,
    starts: dict[str, float | None],
    random: Randomness,
) -> Alignment:
    twin = Twin(model, inputs, loss_fn, random)
    ours = twin.under_rules()
    mirrors = {name: twin.feedback(name) for name in twin.layers}
    theirs = twin.under_backprop()
    chance = {name: _Chance([], True) for name in twin.layers}
    for gradients in twin.under_fresh_feedback(null):  # one at a time: together they could be many times the model
        for name, by_chance in chance.items():
            drawn, plain = _pair(twin.weights[name], gradients, theirs.gradients)
            by_chance.angles.append(angle(drawn, plain))
            by_chance.exact &= all(map(close, drawn, plain))
    moved = twin.with_weights_moved()
    layers = [
        _layer(twin, name, ours, theirs, moved, chance[name], mirrors[name], starts.get(name)) for name in twin.layers
    ]
    layers, flags = trust.judge(layers, null)
    return Alignment(type(model).__name__, layers, flags)


@dataclass
class _Chance:
    """What fresh feedback made of one layer's weight gradient: angles to backprop's; whether all are exactly that."""

    angles: list[float | None]
    exact: bool


def _layer(
    twin: Twin,
    name: str,
    ours: Watched,
    theirs: Watched,
    moved: Gradients,
    chance: _Chance,
    mirror: tuple[Tensor, Tensor] | None,
    start: float | None,
) -> LayerAlignment:
    module, state = twin.layers[name].module, twin.states[name]
    names = twin.weights[name]
    parameters = dict(twin.model.named_parameters())
    weights = [parameters[n] for n in names]
    got, plain = _pair(names, ours.gradients, theirs.gradients)
    calls, others = ours.calls[name], theirs.calls[name]
    notes: list[str] = []

    ran = bool(calls)
    trained = any(w.requires_grad for w in weights)
    weight_angle = angle(got, plain) if trained else None
    if not ran and not any(bool(g.any()) for g in (*got, *plain)):
        notes.append("did not run in this pass")
    elif not weights:
        notes.append("no weight of its own")
    elif not trained:
        notes.append("frozen")
    elif weight_angle is None:
        notes.append(_why(got, plain))

    exact = weight_angle is not None and all(map(close, got, plain)) and chance.exact
    output = state.role is Role.OUTPUT
    if output:
        notes.append("output layer: exact by definition, not in Γ" if exact else "output layer: not in Γ")
    elif exact:
        notes.append("no feedback above it: exact by definition, not in Γ")
    if name in twin.shared:
        notes.append(f"shares its weight with {twin.shared[name]!r}, gradients are sums")

    input_angle = None
    if ran and len(calls) == len(others):
        mine, backprops = _inputs(calls, others)
        input_angle = angle(mine, backprops)
        if mine and input_angle is None:
            notes.append(f"∠ input: {_why(mine, backprops)}")

    feedback_angle = feedback_ratio = None
    if mirror is not None and mirror[0].shape == mirror[1].shape:
        W, B = mirror
        feedback_angle = angle([W], [B])
        size = norm([W])
        feedback_ratio = norm([B]) / size if size > 0 else None

    sizes = [root_mean_square(call.outputs) for call in calls if call.outputs]
    activation = max(sizes, default=None) if all(map(math.isfinite, sizes)) else math.nan
    angles = [a for a in chance.angles if a is not None] if weight_angle is not None else []
    cls: type = getattr(type(module), "_rewired_from", type(module))
    return LayerAlignment(
        name=name,
        type=cls.__name__,
        rule=repr(state.rule),
        weight_angle=weight_angle,
        input_angle=input_angle,
        feedback_angle=feedback_angle,
        feedback_ratio=feedback_ratio,
        activation_norm=activation,
        norm=norm(got) if trained else None,
        backprop_norm=norm(plain) if trained else None,
        null_angle=statistics.fmean(angles) if angles else None,
        note="; ".join(notes),
        null_spread=statistics.stdev(angles) if len(angles) > 1 else None,
        growth=activation / start if activation is not None and start and math.isfinite(start) else None,
        rounding_angle=angle(*_pair(names, moved, theirs.gradients)) if trained else None,
        weight_norm=norm(weights) if weights else None,
        dtype=str(weights[0].dtype).removeprefix("torch.") if weights else "",
        output=output,
        counted=weight_angle is not None and not exact and not output and name not in twin.shared,
    )


# -- vectors -----------------------------------------------------------------------------------------


def angle(a: Sequence[Tensor], b: Sequence[Tensor]) -> float | None:
    """Between two lists of tensors taken as one vector each, in degrees; None if either is zero or not finite."""
    cos = cosine(matched(a, b))
    if cos is None or not math.isfinite(cos):
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, cos))))


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean, of all of them as one vector."""
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach().double())) for t in tensors))


def _pair(names: Sequence[str], a: Gradients, b: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of some parameters in two passes; where one has none, zeros."""
    return _with_zeros([a.get(name) for name in names], [b.get(name) for name in names])


def _with_zeros(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    mine: list[Tensor] = []
    others: list[Tensor] = []
    for x, y in zip(a, b, strict=True):
        like = y if x is None else x
        if like is not None:
            mine.append(torch.zeros_like(like) if x is None else x)
            others.append(torch.zeros_like(like) if y is None else y)
    return mine, others


def _inputs(calls: Sequence[Seen], others: Sequence[Seen]) -> tuple[list[Tensor], list[Tensor]]:
    """The whole gradients at the inputs of all calls."""
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for call, other in zip(calls, others, strict=True):
        theirs = {place.leaf: place for place in other.places}
        found += [(place.at_input, theirs[place.leaf].at_input) for place in call.places if place.leaf in theirs]
    return _with_zeros([a for a, _ in found], [b for _, b in found])


def _why(got: Sequence[Tensor], plain: Sequence[Tensor]) -> str:
    """Why there is no angle."""
    for tensors, whose in ((plain, "backprop's gradient"), (got, "the rule's gradient")):
        if not all(bool(t.isfinite().all()) for t in tensors):
            return f"not measurable: {whose} is not finite"
    for tensors, whose in ((plain, "backprop's gradient"), (got, "the rule's gradient")):
        if not any(bool(t.any()) for t in tensors):
            return f"not measurable: {whose} is zero"
    return "not measurable"


# -- words -------------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _degrees(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}°"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
