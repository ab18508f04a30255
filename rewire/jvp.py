"""Forward-mode probes: what layers do to the outputs, without any backward.

Now and then a training forward is run once more before it is run for good: without a graph, and with a random tangent
v added at a layer's input. At the outputs the tangent is u = J v, J being the Jacobian from the layer's input to the
output, and since the entries of v are independent with variance 1, ``u v^T`` is on average J: a rank-1 estimate from
each sample, at the price of a forward. A layer that feeds each output through several paths is seen through all of
them.

What the model changes in a forward (buffers, random number generators) is put back, so that a probe leaves nothing but
what the rules have gathered. That is taken in with what the pass itself shows (:mod:`rewire.learning`).

Probes are taken by a hook on the module that was converted: parts of it that are called on their own give none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_mode
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from rewire import learning, traced
from rewire.errors import PassError
from rewire.feedback import quick_normal
from rewire.passes import OutputError, backward_id
from rewire.replay import Before
from rewire.roles import Role
from rewire.rules.base import LearnedDirect, Rows, Rule, parts_of
from rewire.state import LayerState
from rewire.wiring import Wiring

# Not annotated in PyTorch.
_unpack: Callable[[Tensor], Any] = forward_mode.unpack_dual
_dual: Callable[..., Tensor] = forward_mode.make_dual
_outside_of_graphs: Callable[..., Callable[[Callable[..., None]], Callable[..., None]]] = torch.compiler.disable
_KEY = "rewire_probe"
_ATTRIBUTE = "_rewire_probe"


def attach(model: nn.Module, rules: Sequence[Rule], wiring: Wiring) -> bool:
    """Have forwards of ``model`` probed if one of ``rules`` wants that; whether the hook is new."""
    wanted = any(isinstance(part, LearnedDirect) and part.probes for rule in rules for part in parts_of(rule))
    if not wanted or _ATTRIBUTE in model.__dict__:
        return False
    model.__dict__[_ATTRIBUTE] = wiring
    # Under a key of our own: handles count per process, and would clash after unpickling in another.
    hooks: Any = model._forward_pre_hooks
    hooks[_KEY] = _before_forward
    with_kwargs: Any = model._forward_pre_hooks_with_kwargs
    with_kwargs[_KEY] = True
    return True


def remove(module: nn.Module) -> None:
    """Take the hook off, if there is one."""
    module.__dict__.pop(_ATTRIBUTE, None)
    for table in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
        hooks: Any = table
        hooks.pop(_KEY, None)


@_outside_of_graphs(reason="rewire: a probe is a forward of its own")
def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted model: a probe, if the pass that begins is to have one."""
    if not torch.is_grad_enabled() or backward_id() != -1 or torch._C._are_functorch_transforms_active():
        return
    if traced.in_jit(model.training):
        return
    wiring: Wiring = model.__dict__[_ATTRIBUTE]
    if wiring.rests:
        return
    if wiring.unsettled:
        wiring.settle()
    if wiring.probed == wiring.passes:  # the pass is under way: several forwards before its backward
        return
    chosen = due(wiring)
    if chosen:
        wiring.probed = wiring.passes
        rule = cast(LearnedDirect, chosen[0].rule)
        if rule.samples is not None:
            args, kwargs = _slice((args, kwargs), rule.samples)
        probe(model, wiring, chosen, args, kwargs)


def due(wiring: Wiring) -> list[LayerState]:
    """The layers whose inputs get a tangent before the pass that begins."""
    able: list[LayerState] = []
    turns: list[LayerState] = []
    number = 0
    for state in wiring.layers.values():
        rule = state.rule
        if not isinstance(rule, LearnedDirect) or not rule.probes or not state.shapes:
            continue
        if state.functional or state.picks:
            why = "its weight is used by another module" if state.functional else "its input is rows picked by index"
            wiring.warn_once(
                f"probe:{state.name}",
                f"layer {state.label}: forward-mode probes do not reach it, since {why}: under {rule!r} its feedback "
                "stays as it was drawn",
            )
            continue
        turn = rule.probe_number(wiring.passes)
        if turn is not None:
            (able if rule.together else turns).append(state)
            number = turn
    return able + turns[number % len(turns) :][:1] if turns else able


class Probe:
    """One forward with tangents: those put in at layers' inputs, and those that arrive at the outputs.

    Args:
        chosen: the layers whose inputs get a tangent.
        wiring: theirs.

    Attributes:
        put: (layer, number of its input, v) for each call of a chosen layer.
        arrived: (output layer, u) for each call of an output layer that a tangent has reached.
    """

    def __init__(self, chosen: Sequence[LayerState], wiring: Wiring) -> None:
        self.put: list[tuple[LayerState, int, Tensor]] = []
        self.arrived: list[tuple[LayerState, Tensor]] = []
        self._chosen = set(chosen)
        self._wiring = wiring
        self._thread = get_ident()

    def __enter__(self) -> Probe:
        for state in self._wiring.layers.values():
            state.probe = self
        return self

    def __exit__(self, *_: object) -> None:
        for state in self._wiring.layers.values():
            state.probe = None

    def call(
        self, state: LayerState, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A layer's forward, with a tangent at each input if it is a chosen one."""
        if get_ident() != self._thread:
            return forward(module, *args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _of_one_dtype, (args, kwargs))
        if state in self._chosen:
            args, kwargs = self._put(state, args, kwargs)
        output = forward(module, *args, **kwargs)
        if state.role is Role.OUTPUT:
            for y in tree_flatten(output)[0]:
                u = _unpack(y).tangent if isinstance(y, Tensor) else None
                if u is not None:
                    self.arrived.append((state, u))
        return output

    def _put(self, state: LayerState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        known = sorted({index for _, index in state.shapes})
        if len(places) != len(known):  # a mask, say, that gets no gradient: which is which?
            self._wiring.warn_once(
                f"probe:{state.name}",
                f"layer {state.label} is called with {len(places)} tensors and hands back to {len(known)}: "
                f"forward-mode probes cannot tell which, and under {state.rule!r} its feedback stays as it was drawn",
            )
            return args, kwargs
        for index, place in zip(known, places, strict=True):
            x = leaves[place]
            v = self._tangent(state, x)
            self.put.append((state, index, v))
            primal, before = _unpack(x)
            leaves[place] = _dual(primal, v if before is None else before + v)
        return tree_unflatten(leaves, spec)

    def _tangent(self, state: LayerState, x: Tensor) -> Tensor:
        """N(0, 1) numbers, others in each probe, call and rank; no random number generator of the model's is used."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        name = f"{state.name}:tangent:{len(self.put)}:{rank}"
        v = quick_normal(x.shape, seed=self._wiring.seed, name=name, draw=self._wiring.passes, scale=1.0)
        return v.to(device=x.device, dtype=x.dtype)


def _of_one_dtype(x: Tensor) -> Tensor:
    """x, its tangent in its own dtype: under autocast PyTorch's norms make one in float32 for x in bfloat16."""
    primal, tangent = _unpack(x)
    return x if tangent is None or tangent.dtype == primal.dtype else _dual(primal, tangent.to(primal.dtype))


def probe(
    model: nn.Module, wiring: Wiring, chosen: Sequence[LayerState], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run a forward with tangents at the inputs of ``chosen``, and let their rules gather what it shows.

    Raises:
        PassError: if an operation of the model has no forward-mode derivative.
    """
    before = Before(model, (args, kwargs), wiring.layers.values())
    seen = Probe(chosen, wiring)
    try:
        # Fused attention has no forward-mode derivative; the plain one has.
        with torch.no_grad(), forward_mode.dual_level(), sdpa_kernel(SDPBackend.MATH), seen:
            model.forward(*args, **kwargs)
    except NotImplementedError as problem:
        raise PassError(
            f"{chosen[0].rule!r} looks through the model by forward-mode derivatives, which one of its operations does "
            f"not have: {problem}. Use a rule that does without, such as fitted or dfa, for the layers below it"
        ) from problem
    finally:
        before.put_back()
    wiring.probe_count += 1
    for state, index, v in seen.put:
        for arrived in _side_by_side(seen.arrived):
            _gather(state, index, v, arrived)


def _side_by_side(arrived: list[tuple[LayerState, Tensor]]) -> list[list[tuple[LayerState, Tensor]]]:
    """What came of a tangent at all output layers, each of them once in each list.

    One called less often than another is in several lists with the same: nothing there would say that the layer has no
    effect on it.
    """
    calls: dict[LayerState, list[Tensor]] = {}
    for output, u in arrived:
        calls.setdefault(output, []).append(u)
    most = max(map(len, calls.values()), default=0)
    return [[(output, of[i % len(of)]) for output, of in calls.items()] for i in range(most)]


def _gather(state: LayerState, index: int, v: Tensor, arrived: list[tuple[LayerState, Tensor]]) -> None:
    """Let the rule sum up what one tangent has become at the output layers."""
    rule = state.rule
    assert isinstance(rule, LearnedDirect)
    errors = [OutputError(output, output.kind.axis(u.dim()), None) for output, u in arrived]
    for error, (_, u) in zip(errors, arrived, strict=True):
        error.deliver(u)  # so that u takes the way of an error, from the output's rows to the input's
    x = learning.Like(v.shape, v.dtype, v.device)
    wide = x.wide
    with torch.no_grad():
        behind = learning.behind_one_another(state, rule, errors, v.shape, None)
        rows = learning.together(state, rule, errors, index, x, wide, None, behind)
        if rows is None:
            return
        v = v.to(wide)
        axis = state.kind.axis(v.dim())
        flat = learning.in_order(learning.flat(v, axis), behind)
        images = len(v) if axis == 1 else 1
        elements = None
        if learning.has_values_for_elements(state, index):
            rows = learning.per_image(rows, images)
            elements = learning.in_order(v.reshape(images, -1), behind)
        seen = Rows(e=rows, exact=flat, seen=None, wide=elements, mask=partial(learning.mask_of, state, index))
        learning.add(state, index, rule.observe(seen, learning.joined(state, index).to(wide)))


def _slice(inputs: Any, samples: int) -> Any:
    """The first ``samples`` rows of every tensor that has as many rows as the first one."""
    first = next((x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x.dim() > 0), None)
    batch = 0 if first is None else len(first)
    return tree_map(lambda x: x[:samples] if isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch else x, inputs)
