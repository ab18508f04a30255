"""Times of steps as ratios to a reference, measured so that a drifting machine does not decide them.

Each step takes turns with the reference, swapping who goes first, and what counts is the ratio within a turn.
Contenders are visited again and again in short blocks of turns, so that all see the same stretch of time, and within a
block only two steps compete for the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], object]
Clock = Callable[[Step], float]

BLOCK_SECONDS = 0.25
ALREADY_SLOW = 0.05  # a step of this many seconds does not notice what the one before it left in the caches


def cpu_clock(step: Step) -> float:
    """Seconds one step takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def cuda_clock(step: Step) -> float:
    """Seconds between the first and the last of a step's work, on the GPU's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_for(device: str) -> Clock:
    return cuda_clock if device.startswith("cuda") else cpu_clock


def paired(
    contenders: Mapping[str, Step],
    reference: Step,
    seconds: float,
    *,
    least: int = 5,
    clock: Clock = cpu_clock,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time every contender against ``reference``.

    Args:
        contenders: step by name. All have run before.
        seconds: to spend in all, if ``least`` turns each do not take longer.
        least: fewest turns of each.

    Returns:
        ``reference_seconds``, the median, and ``contenders``: by name ``ratio`` (first quartile, median, third
        quartile of the ratio within a turn), ``seconds`` (median) and ``turns``.
    """
    references: list[float] = []
    own: dict[str, list[float]] = {name: [] for name in contenders}
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    end = now() + seconds
    while True:
        for name, step in contenders.items():
            block_end = now() + BLOCK_SECONDS
            warm = clock(reference) > ALREADY_SLOW
            if not warm:
                clock(step)
            turns = 0
            while turns < 2 or now() < block_end:
                times = {}
                # Who goes second finds the batch in the cache, so they swap.
                for is_reference in (True, False) if turns % 2 else (False, True):
                    times[is_reference] = clock(reference if is_reference else step)
                references.append(times[True])
                own[name].append(times[False])
                ratios[name].append(times[False] / times[True])
                turns += 1
        if now() >= end and all(len(found) >= least for found in ratios.values()):
            break
    return {
        "reference_seconds": statistics.median(references),
        "contenders": {
            name: {
                "ratio": statistics.quantiles(ratios[name], n=4, method="inclusive"),
                "seconds": statistics.median(own[name]),
                "turns": len(ratios[name]),
            }
            for name in contenders
        },
    }
