"""Step time of a rule against backprop's, measured so that a busy machine does not decide it.

Wall times of two training runs cannot be compared: the machine drifts between them. Here both take turns
on the same batches, swapping who goes first, and what counts is the median of the ratios within a turn.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .cell import Cell
from .data import load
from .random_state import seeded
from .trainer import make_trainer

Step = Callable[[Tensor, Tensor], object]
Batch = tuple[Tensor, Tensor]

WARM_UP = 5  # the first pass is exact backprop under scale="auto", and allocators settle
PAIRS = 20
SECONDS = 5.0


def step_ratio(cell: Cell, *, pairs: int = PAIRS, seconds: float = SECONDS) -> float:
    """Time of a training step under ``cell.rule`` over that under backprop; 1 for ``bp`` by definition.

    A step is everything :meth:`.trainer.Trainer.step` does: zeroing, forward, backward and the optimizer. No new turn
    begins after so many ``seconds``: the steps of large models need no average over many.
    """
    if cell.plain:
        return 1.0
    data = load(cell.data, cell.data_dir)
    order = torch.Generator().manual_seed(0)
    size = min(cell.batch_size, len(data.x_train))
    picks = (torch.randperm(len(data.x_train), generator=order)[:size] for _ in range(WARM_UP + pairs))
    batches = [(data.x_train[pick], data.y_train[pick]) for pick in picks]

    rule, reference = (make_trainer(each, data).step for each in (cell, replace(cell, rule="bp", layers=(), blocks=())))
    began = time.perf_counter()
    with seeded(cell.seed):
        for x, y in batches[:WARM_UP]:
            reference(x, y)
            rule(x, y)
        taken = itertools.takewhile(lambda _: time.perf_counter() - began < seconds, batches[WARM_UP + 1 :])
        return paired_ratio(rule, reference, itertools.chain(batches[WARM_UP : WARM_UP + 1], taken))


def paired_ratio(
    step: Step, reference: Step, batches: Iterable[Batch], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median over batches of ``step``'s time over ``reference``'s on the same batch."""
    ratios: list[float] = []
    for turn, (x, y) in enumerate(batches):
        times: dict[bool, float] = {}
        # Who goes second finds the batch in the cache, so they swap.
        for is_reference in (True, False) if turn % 2 == 0 else (False, True):
            run = reference if is_reference else step
            began = clock()
            run(x, y)
            times[is_reference] = clock() - began
        ratios.append(times[False] / times[True])
    return statistics.median(ratios)
