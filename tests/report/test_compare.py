"""Significance against formulas written out here: integrals of the t distribution, Holm by hand."""

from __future__ import annotations

import gc
import math
import random
from statistics import fmean, variance

import pytest
from scipy import stats

from rewire.report.compare import Comparison, compare, correct


def tail(t: float, df: float) -> float:
    """Two-sided tail of Student's t by Simpson's rule on its density, substituting t = tan(u)."""
    const = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)

    def density(u: float) -> float:
        x = math.tan(u)
        return const * (1 + x * x / df) ** (-(df + 1) / 2) / math.cos(u) ** 2

    low, high, n = math.atan(abs(t)), math.pi / 2 - 1e-9, 20_000
    h = (high - low) / n
    inner = sum((4 if i % 2 else 2) * density(low + i * h) for i in range(1, n))
    return 2 * h / 3 * (density(low) + inner + density(high))


def test_the_integral_itself() -> None:
    # Two degrees of freedom have a closed form.
    assert tail(3.0, 2) == pytest.approx(1 - 3 / math.sqrt(11), rel=1e-6)


def test_paired_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2√3 with two degrees of freedom, whose 97.5 % point is 4.302653."""
    found = compare({0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0})

    assert found is not None and found.test == "paired t-test, 3 seeds"
    assert found.difference == pytest.approx(2)
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-9)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


def test_only_seeds_that_both_have_are_paired() -> None:
    left = {0: 1.0, 1: 2.5, 2: 3.0, 3: 5.0, 9: 1000.0}
    right = {0: 0.5, 1: 1.0, 2: 3.5, 3: 3.0, 8: -1000.0}
    found = compare(left, right)

    assert found is not None and found.test == "paired t-test, 4 seeds"
    assert found.difference == pytest.approx(fmean([0.5, 1.5, -0.5, 2.0]))
    assert found.p == pytest.approx(stats.ttest_1samp([0.5, 1.5, -0.5, 2.0], 0).pvalue)


def test_welch_where_seeds_do_not_match() -> None:
    left, right = [4.0, 5.5, 6.0, 9.0], [1.0, 1.5, 2.5]
    found = compare(dict(enumerate(left)), dict(enumerate(right, start=10)))

    a, b = variance(left) / 4, variance(right) / 3
    df = (a + b) ** 2 / (a * a / 3 + b * b / 2)
    t = (fmean(left) - fmean(right)) / math.sqrt(a + b)
    assert found is not None and found.test == "Welch's t-test, 4 and 3 seeds"
    assert found.p == pytest.approx(tail(t, df), rel=1e-5)
    half = stats.t.ppf(0.975, df) * math.sqrt(a + b)
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half))


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_seeds_are_not_tested(count: int) -> None:
    few, many = dict(enumerate([1.0, 2.0][:count])), dict(enumerate([3.0, 4.0, 6.0]))

    for found in (compare(few, many), compare(many, few), compare(few, few)):
        assert found is not None and found.test == "too few seeds"
        assert found.p is found.low is found.high is None
    assert compare({}, many) is None and compare(many, {}) is None


def test_two_matching_seeds_of_many_fall_back_to_welch() -> None:
    found = compare({0: 1.0, 1: 2.0, 2: 4.0}, {1: 5.0, 2: 6.0, 3: 9.0})
    assert found is not None and found.test.startswith("Welch")


@pytest.mark.parametrize(("shift", "says"), [(0.0, "same in every seed"), (0.1, "no spread over seeds")])
def test_no_spread_is_no_significance(shift: float, says: str) -> None:
    """Differences equal but for rounding would give a p-value of nearly nothing."""
    values = {seed: 97.3 + 0.1 * seed for seed in range(5)}
    found = compare({seed: value + shift for seed, value in values.items()}, values)

    assert found is not None and found.p is None and found.test == says
    apart = compare({0: 1.0, 1: 1.0, 2: 1.0}, {5: 2.0, 6: 2.0, 7: 2.0})
    assert apart is not None and apart.p is None


def test_holm_by_hand() -> None:
    raw = [0.01, 0.04, 0.03, 0.005]
    comparisons: list[Comparison | None] = [Comparison(0, "t", p=p) for p in raw]
    found = correct([None, *comparisons, Comparison(0, "too few seeds")])

    # Sorted 0.005·4, 0.01·3, 0.03·2, 0.04·1 → never falling: 0.02, 0.03, 0.06, 0.06.
    assert [None if each is None else each.corrected for each in found] == [
        None,
        *[pytest.approx(each) for each in (0.03, 0.06, 0.06, 0.02)],
        None,
    ]
    assert [each is not None and each.clear for each in found] == [False, True, False, False, True, False]


def test_chance_is_called_clear_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four equal rules in 400 reports: at least one false finding in about one of twenty, not in one of six."""
    # statsmodels collects garbage at every call, which takes longer than all the rest.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    chance = random.Random(0)
    false = 0
    for _ in range(400):
        draws = [{seed: chance.gauss(0, 1) for seed in range(5)} for _ in range(5)]
        false += any(each is not None and each.clear for each in correct([compare(d, draws[0]) for d in draws[1:]]))
    assert false / 400 < 0.08
