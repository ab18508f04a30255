"""Is the difference to the baseline more than seeds make? Tests are SciPy's, the correction is statsmodels'."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

FEWEST = 3
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Comparison:
    """A rule against the baseline.

    ``difference`` is rule minus baseline, in the unit of the values; ``low`` and ``high`` are its 95 % confidence
    interval, not corrected; ``p`` is two-sided, ``corrected`` the same after Holm. All but ``difference``
    are None where no test was possible, and ``test`` says why.
    """

    difference: float
    test: str
    low: float | None = None
    high: float | None = None
    p: float | None = None
    corrected: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the corrected p-value is below 1 − ``LEVEL``."""
        return self.corrected is not None and self.corrected < 1 - LEVEL


def compare(values: Mapping[Hashable, float], baseline: Mapping[Hashable, float]) -> Comparison | None:
    """Compare ``values`` with ``baseline``, both by seed; None where one of them is empty.

    Paired t-test over the seeds both have, if these are at least three; else Welch's t-test, if each has at least
    three.
    """
    if not values or not baseline:
        return None
    shared = [seed for seed in values if seed in baseline]
    paired = len(shared) >= FEWEST
    left = [values[seed] for seed in shared] if paired else list(values.values())
    right = [baseline[seed] for seed in shared] if paired else list(baseline.values())
    difference = fmean(left) - fmean(right)
    if min(len(left), len(right)) < FEWEST:
        return Comparison(difference, "too few seeds")
    # Rounding leaves a trace of spread where there is none, and a t-test would make much of it.
    floor = 1e-9 * max(map(abs, left + right))
    samples = [np.subtract(left, right)] if paired else [np.asarray(left), np.asarray(right)]
    if all(sample.std() <= floor for sample in samples):
        return Comparison(difference, "same in every seed" if abs(difference) <= floor else "no spread over seeds")
    if paired:
        result, test = stats.ttest_rel(left, right), f"paired t-test, {len(left)} seeds"
    else:
        result = stats.ttest_ind(left, right, equal_var=False)
        test = f"Welch's t-test, {len(left)} and {len(right)} seeds"
    interval = result.confidence_interval(LEVEL)
    return Comparison(difference, test, float(interval.low), float(interval.high), float(result.pvalue))


def correct(comparisons: Sequence[Comparison | None]) -> list[Comparison | None]:
    """``comparisons`` with Holm's correction for all of them together."""
    raw = [each.p for each in comparisons if each is not None and each.p is not None]
    corrected = iter(multipletests(raw, method="holm")[1] if raw else ())
    return [
        replace(each, corrected=float(next(corrected))) if each is not None and each.p is not None else each
        for each in comparisons
    ]
