"""Seeds of one cell trained together: their models stacked, one ``vmap`` step for all.

Each model has its own initial weights, its own feedback and its own order of the data, so its numbers are those it
has when trained alone, up to the rounding of batched matrix products. The first steps are done one model after the
other: they find the output layers and measure the scales. The first stacked step is checked against ordinary backward
passes before it counts.

What gains: on small models most of a step is not arithmetic but the cost of calling operations one at a time, which a
stack pays once. The step is traced into a flat list of operations (``make_fx``), so that transforms cost nothing after
the first of its kind.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import rewire
from rewire.errors import ConversionError
from rewire.stacked import Stack, check_rules

from . import checkpoint, models, random_state
from .cell import Cell, Result
from .data import Dataset, load
from .memory import peak_mb, reset_peak
from .models import Net, logits
from .progress import History, Progress, measure, measured_after
from .timing import step_ratio
from .trainer import accuracy, converted, loss, make_optimizer, steps_per_epoch

NAME = "together.pt"
_FIRST = 2  # ordinary steps that may be needed for roles and scales to be known
_CLOSE = 1e-3  # of a gradient's norm; a rule that is not what it should be is off by far more

Gradients = Callable[..., tuple[dict[str, Tensor], Tensor]]


class NotTogether(Exception):
    """These cells cannot be trained together, and why."""


def run_together(
    cells: Sequence[Cell], folders: Sequence[Path | None] | None = None, *, every: float = 30.0
) -> list[Result]:
    """Train cells that differ in their seed alone; results in their order.

    Args:
        folders: of the cells, as for :func:`.train.run_cell`.
        every: seconds between checkpoints.

    Raises:
        NotTogether: the model or the rule does not allow it; nothing is left of the attempt.
        StorageError: the disk does not take a checkpoint.
    """
    data = load(cells[0].data, cells[0].data_dir)
    reset_peak()
    with random_state.seeded(cells[0].seed):
        run = _Together(cells, data, list(folders or [None] * len(cells)), every)
        run.train()
    peak, ratio = peak_mb(), step_ratio(cells[0])
    results = []
    for cell, progress in zip(cells, run.progress, strict=True):
        last = progress.history[-1]
        results.append(
            Result(
                cell=cell,
                status="done" if math.isfinite(last.loss) else "diverged",
                accuracy=last.accuracy,
                final_loss=last.loss,
                history=tuple(progress.history),
                alignment=tuple(progress.alignment),
                step_ms=1e3 * statistics.median(progress.step_times),
                step_ratio=ratio,
                memory_mb=peak,
                seconds=progress.seconds,
            )
        )
    return results


class _Together:
    def __init__(self, cells: Sequence[Cell], data: Dataset, folders: list[Path | None], every: float) -> None:
        self.cells, self.data, self.folders, self.every = cells, data, folders, every
        self.orders = [torch.Generator().manual_seed(cell.seed) for cell in cells]
        self.path = None if folders[0] is None else folders[0] / NAME
        models.check(cells[0].model)  # imports it, as a fresh worker has not and a pickle cannot by itself
        kept = None if self.path is None else checkpoint.load(self.path)
        if kept is not None and not _are_of(kept["cells"], cells):
            kept = None
        if kept is None:
            self.nets = [_converted(cell, data) for cell in cells]
            _check_rules(self.nets[0])
            self.progress = [Progress(order.get_state()) for order in self.orders]
        else:
            self.nets, self.progress = kept["nets"], kept["progress"]
            for order, progress in zip(self.orders, self.progress, strict=True):
                order.set_state(progress.order)
        self.params = _shared(self.nets)
        steps = cells[0].epochs * steps_per_epoch(cells[0], data)
        self.optimizer, self.schedule = make_optimizer(cells[0], list(self.params.values()), steps)
        if kept is not None:
            self.optimizer.load_state_dict(kept["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(kept["schedule"])
            random_state.put_back(kept["random"])
        self.stack: Stack | None = None
        self.traces: dict[tuple[int, ...], Gradients] = {}
        self.used: set[str] = set() if kept is None else kept["used"]
        self.ordinary = 0 if kept is None else kept["ordinary"]
        self.saved = time.perf_counter()
        # Only now may files be written: whoever cannot be trained together has raised before.
        self.histories = [History(f, p.history) for f, p in zip(self.folders, self.progress, strict=True)]

    # -- the loop ------------------------------------------------------------------------------------

    def train(self) -> None:
        """Every epoch that is still to be done."""
        cell = self.cells[0]
        while (alive := self._alive()) and min(self.progress[i].epoch for i in alive) <= cell.epochs:
            number = self.progress[alive[0]].epoch
            self._epoch(alive)
            for i in alive:
                if not self._diverged(i):
                    self._end(i, self.progress[i].total / len(self.data.x_train), number)
        self._save(last=True)

    def _alive(self) -> list[int]:
        return [i for i in range(len(self.cells)) if not self._diverged(i)]

    def _diverged(self, i: int) -> bool:
        history = self.progress[i].history
        return bool(history) and not math.isfinite(history[-1].loss)

    def _end(self, i: int, mean: float, number: int) -> None:
        progress, net, cell = self.progress[i], self.nets[i], self.cells[i]
        began = time.perf_counter()
        test = accuracy(net, self.data.x_test, self.data.y_test)
        progress.spent(time.perf_counter() - began)
        if math.isfinite(mean) and number in measured_after(cell) and not cell.plain:
            found = measure(net, self.data, number, number * steps_per_epoch(cell, self.data))
            if found is not None:
                progress.alignment.append(found)
        self.histories[i].add(progress.end_epoch(mean, test, self.orders[i].get_state()))

    def _epoch(self, alive: list[int]) -> None:
        """The rest of one pass over the training data, in each member's own order."""
        size, count = self.cells[0].batch_size, len(self.data.x_train)
        shuffled = torch.stack([torch.randperm(count, generator=order) for order in self.orders])
        number = self.progress[alive[0]].epoch
        for start in range(self.progress[alive[0]].step * size, count, size):
            batch = shuffled[:, start : start + size]
            x, y = self.data.x_train[batch], self.data.y_train[batch]
            began = time.perf_counter()
            losses = self._step(x, y)
            took = (time.perf_counter() - began) / len(alive)
            for i in list(alive):
                progress = self.progress[i]
                progress.step_times.append(took)
                progress.spent(took)
                if not math.isfinite(losses[i]):
                    self._end(i, losses[i], number)
                    alive.remove(i)
                    continue
                progress.total += losses[i] * batch.shape[1]
                progress.step += 1
            if not alive:
                return
            if time.perf_counter() - self.saved >= self.every:
                self._save()

    # -- one step ------------------------------------------------------------------------------------

    def _step(self, x: Tensor, y: Tensor) -> list[float]:
        """One update of every member on x (members, N, ...) and y (members, N); returns the losses before it."""
        if self.stack is None and self.ordinary >= 1:
            self.stack = self._try_to_stack()
        if self.stack is None:
            losses, gradients = self._one_by_one(x, y)
            self.used |= gradients.keys()
            self.ordinary += 1
        else:
            gradients, found = self._gradients(self.stack, x, y)
            losses = found.tolist()
        for name, parameter in self.params.items():
            parameter.grad = gradients[name] if name in self.used else None
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return losses

    def _one_by_one(self, x: Tensor, y: Tensor) -> tuple[list[float], dict[str, Tensor]]:
        """Losses and gradients by ordinary passes."""
        losses: list[float] = []
        gradients: list[dict[str, Tensor]] = []
        for net, x_i, y_i in zip(self.nets, x, y, strict=True):
            buffers = {name: buffer.clone() for name, buffer in net.model.named_buffers()}
            net.model.zero_grad()
            with rewire.targets(y_i):
                value = loss(net(x_i), y_i)
            value.backward()  # type: ignore[no-untyped-call]
            losses.append(float(value.detach()))
            gradients.append({n: p.grad for n, p in net.model.named_parameters() if p.grad is not None})
            if any(not torch.equal(buffers[name], now) for name, now in net.model.named_buffers()):
                raise NotTogether("the model keeps running statistics, which a stack would mix")
            net.model.zero_grad()
        if any(each.keys() != gradients[0].keys() for each in gradients):
            raise NotTogether("the seeds do not train the same parameters")
        return losses, {name: torch.stack([each[name] for each in gradients]) for name in gradients[0]}

    def _try_to_stack(self) -> Stack | None:
        try:
            stack = Stack([net.model for net in self.nets])
        except ConversionError as error:
            if self.ordinary >= _FIRST:
                raise NotTogether(str(error)) from error
            return None
        return stack

    def _gradients(self, stack: Stack, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        net = self.nets[0]
        members, size = x.shape[:2]
        fed = net.feed(x.flatten(0, 1))
        fed = fed if net.key is None else fed[net.key]
        inputs = fed.reshape(members, size, *fed.shape[1:])
        params = {name: parameter.detach() for name, parameter in self.params.items()}
        arguments = (params, stack.buffers, stack.feedback, inputs, y)
        step = self.traces.get(tuple(inputs.shape))
        if step is None:
            step = self.traces[tuple(inputs.shape)] = self._traced(stack, arguments)
            found = step(*arguments)
            self._check(x, y, found)
            return found
        return step(*arguments)

    def _traced(self, stack: Stack, arguments: tuple[Any, ...]) -> Gradients:
        net = self.nets[0]

        def one(
            params: dict[str, Tensor], buffers: dict[str, Tensor], feedback: dict[str, Tensor], x: Tensor, y: Tensor
        ) -> Tensor:
            with rewire.targets(y):
                if net.key is None:
                    return loss(logits(stack(params, buffers, feedback, x)), y)
                return loss(logits(stack(params, buffers, feedback, **{net.key: x})), y)

        step: Gradients = vmap(grad_and_value(one))
        try:
            with torch.no_grad():
                traced: Gradients = make_fx(step)(*arguments)
        except Exception as error:  # vmap and models refuse each other in many ways
            raise NotTogether(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
        return traced

    def _check(self, x: Tensor, y: Tensor, found: tuple[dict[str, Tensor], Tensor]) -> None:
        """The first stacked step of each batch size has to be what ordinary passes say."""
        before = random_state.state()
        _, expected = self._one_by_one(x, y)
        random_state.put_back(before)
        for name, gradient in expected.items():
            difference = float((found[0][name] - gradient).double().norm())
            size = float(gradient.double().norm())
            if math.isfinite(size) and not difference <= _CLOSE * size + torch.finfo(gradient.dtype).tiny:
                raise NotTogether(f"the stacked gradient of {name} differs from that of ordinary passes")

    # -- files ---------------------------------------------------------------------------------------

    def _save(self, last: bool = False) -> None:
        if self.path is None:
            return
        kept = {
            "cells": [cell.config() for cell in self.cells],
            "progress": self.progress,
            "nets": self.nets,
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "random": random_state.state(),
            "used": self.used,
            "ordinary": self.ordinary,
        }
        if not checkpoint.save(self.path, kept):
            self.path = None
        elif last:
            for i, folder in enumerate(self.folders):
                if folder is not None:
                    checkpoint.save(folder / checkpoint.NAME, self._alone(i))
        self.saved = time.perf_counter()

    def _alone(self, i: int) -> dict[str, Any]:
        """The checkpoint that member i would have if it had been trained alone."""
        state = self.optimizer.state_dict()
        shapes = [parameter.shape for parameter in self.params.values()]
        state["state"] = {
            number: {
                key: value[i].clone() if isinstance(value, Tensor) and value.shape == shapes[number] else value
                for key, value in entries.items()
            }
            for number, entries in state["state"].items()
        }
        return {
            "cell": self.cells[i].config(),
            "progress": self.progress[i],
            "net": copy.deepcopy(self.nets[i]),
            "optimizer": state,
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "random": random_state.state(),
        }


def _are_of(configs: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> bool:
    return len(configs) == len(cells) and all(map(checkpoint.is_of, configs, cells))


def _converted(cell: Cell, data: Dataset) -> Net:
    with random_state.seeded(cell.seed):
        return converted(cell, data)


def _check_rules(net: Net) -> None:
    """Before anything is trained: the buffers that rules of this kind keep would be taken for the model's own."""
    try:
        check_rules(net.model)
    except ConversionError as error:
        raise NotTogether(str(error)) from error


def _shared(nets: Sequence[Net]) -> dict[str, nn.Parameter]:
    """The parameters of all members in one tensor per name, (members, *shape), which theirs become views of."""
    members = [dict(net.model.named_parameters()) for net in nets]
    if any(not parameter.requires_grad for parameter in members[0].values()):
        raise NotTogether("some parameters are frozen")
    try:
        shared = {n: nn.Parameter(torch.stack([m[n].detach() for m in members])) for n in members[0]}
    except (KeyError, RuntimeError) as error:
        raise NotTogether(f"the seeds give models that differ: {error}") from error
    for i, member in enumerate(members):
        for name, parameter in member.items():
            parameter.data = shared[name].data[i]
    return shared
