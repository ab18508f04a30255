"""The passes ``alignment`` is made of, all of one copy of the model, on the same inputs and random numbers.

1. Under the rules, watched: the gradient of every parameter and of every layer's input.
2. Under backprop, watched, with every activation's own derivative: as 1.
3. Under the rules with fresh random feedback, as often as asked: gradients of parameters.
4. Under backprop with every weight moved by one unit in its last place: what rounding alone makes of 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rewire.ask import feedback
from rewire.convert import use_rule
from rewire.derivative import own_derivatives
from rewire.diagnose.verify import weights_of
from rewire.diagnose.watch import (
    Buffers,
    Gradients,
    Pass,
    Randomness,
    Seen,
    copy_of,
    gradients_of,
    layers_of,
    settle,
)
from rewire.feedback import standard
from rewire.rules.base import BP, DirectRule, LocalRule, Rule
from rewire.rules.direct import DFA
from rewire.rules.local import FA

LEARNED = "rewire_"
"""What names of parameters and buffers begin with that belong to a rule, not to the model."""


@dataclass(frozen=True)
class Watched:
    """One watched pass.

    Attributes:
        gradients: of the parameters, by name.
        calls: of each layer, with the gradients of their inputs.
    """

    gradients: Gradients
    calls: Mapping[str, list[Seen]]


class Twin:
    """A copy of a converted model, and the passes that are run on it.

    Args:
        model: is not touched.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. Each pass gets copies.

    Attributes:
        layers: the copy's converted layers by name.
        weights: for each layer the names of its weights, those of the model's own parameters.
        shared: for each layer with a weight that an earlier layer has too, that layer's name.
    """

    def __init__(self, model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], random: Randomness) -> None:
        self.model = copy_of(model)
        self.model.zero_grad(set_to_none=True)
        self.layers = layers_of(self.model)
        self.states = {name: layer.state for name, layer in self.layers.items()}
        for wiring in {state.wiring for state in self.states.values()}:
            wiring.settle_if_alone()  # feedback is that of the next training step
        self._inputs, self._loss_fn, self._random = inputs, loss_fn, random
        self._buffers = Buffers(self.model)
        self._learned = [(p, p.detach().clone()) for name, p in self.model.named_parameters() if belongs_to_rule(name)]
        self._draws = {state: state.draws for state in self.states.values()}
        self.weights, self.shared = self._names()
        settle(self.states.values(), self._plainly)

    def under_rules(self) -> Watched:
        """1."""
        return self._watched()

    def feedback(self, name: str) -> tuple[Tensor, Tensor] | None:
        """W and B of a layer under a local rule, as 1 used them."""
        module, state = self.layers[name].module, self.states[name]
        B = feedback(module).get(state.name)
        if not isinstance(state.rule, LocalRule) or B is None:
            return None
        return (state.kind.look(module) if state.used is None else state.used), B

    def under_fresh_feedback(self, count: int) -> Iterator[Gradients]:
        """3."""
        before = {state: (state.rule, state.wiring.seed) for state in self.states.values()}
        for number in range(count):
            for layer in self.layers.values():
                state = layer.state
                rule, seed = before[state]
                state.rule = _by_chance(rule, layer.module)
                state.wiring.seed = _seed(seed, number)
                state.wiring.common = {}
                state.forget_feedback()
                state.refresh()
            if any(state.ran and not state.settled for state in self.states.values()):
                settle(self.states.values(), self._plainly)  # a rule that learns may have had no scale
            yield self._plainly()
        for state, (rule, seed) in before.items():
            state.rule, state.wiring.seed, state.wiring.common = rule, seed, {}
            state.forget_feedback()
            state.refresh()

    def under_backprop(self) -> Watched:
        """2."""
        with use_rule(self.model, BP()), own_derivatives(self.model):
            return self._watched()

    def with_weights_moved(self) -> Gradients:
        """4. The last pass: the copy's weights are other ones afterwards."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.is_floating_point() and not belongs_to_rule(name):
                    signs = standard(p.shape, seed=0, name=name, distribution="binary")
                    p.addcmul_(p, signs.to(p), value=torch.finfo(p.dtype).eps)
        with use_rule(self.model, BP()), own_derivatives(self.model):
            return self._plainly()

    # -- parts ---------------------------------------------------------------------------------------

    def _again(self) -> tuple[Any, list[Tensor]]:
        """Before each pass: everything as before the first one. The inputs to use, and what may get a ``.grad``."""
        self._random.put_back()
        self._buffers.put_back()
        with torch.no_grad():
            for p, value in self._learned:
                p.copy_(value)
        for state, draws in self._draws.items():
            state.draws = draws
        fresh: list[Tensor] = []

        def copied(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.detach().clone().requires_grad_(x.requires_grad)
            if x.requires_grad:
                fresh.append(x)
            return x

        inputs = dict(self._inputs) if isinstance(self._inputs, Mapping) else self._inputs
        inputs = tree_map(copied, inputs)
        # Nothing else gets one: a loss function may have parameters of its own, which are being trained.
        return inputs, [*fresh, *(p for p in self.model.parameters() if p.requires_grad)]

    def _plainly(self) -> Gradients:
        inputs, leaves = self._again()
        return gradients_of(self.model, inputs, self._loss_fn, leaves)

    def _watched(self) -> Watched:
        inputs, leaves = self._again()
        cut = {n for n, s in self.states.items() if s.wiring.skip == "cut" and isinstance(s.rule, DirectRule)}
        seen = Pass(self.model, self.layers, inputs, self._loss_fn, cut, whole=True)
        return Watched(seen.backward(last=True, leaves=leaves), seen.calls)

    def _names(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        weights: dict[str, list[str]] = {}
        shared: dict[str, str] = {}
        owner: dict[str, str] = {}
        for name, layer in self.layers.items():
            known = dict.fromkeys(names[id(w)] for w in weights_of(layer) if id(w) in names)
            weights[name] = [n for n in known if not belongs_to_rule(n)]
            for n in weights[name]:
                first = owner.setdefault(n, name)
                if first != name:
                    shared[name] = first
        return weights, shared


def belongs_to_rule(name: str) -> bool:
    """Whether a parameter or buffer is feedback that a rule learns, by its qualified name."""
    return name.rpartition(".")[2].startswith(LEARNED)


def _by_chance(rule: Rule, module: nn.Module) -> Rule:
    """What a rule is compared to: random feedback that knows nothing of the weights."""
    if isinstance(rule, LocalRule):
        return FA()
    learns = any(belongs_to_rule(name) for name, _ in (*module.named_parameters(), *module.named_buffers()))
    if isinstance(rule, DirectRule) and learns:
        return DFA(layout=rule.layout, feedback=rule.feedback)
    return rule


def _seed(seed: int, number: int) -> int:
    """Of the ``number``-th fresh feedback for a conversion's seed: far from any seed that users choose."""
    digest = hashlib.blake2b(f"{seed}|null|{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
