"""The numbers that are drawn anew in every pass: normal, whatever their count, and no two of them alike."""

import numpy as np
import pytest
from scipy import stats

from rewire.feedback import quick_normal

SMALL, LARGE = (301, 101), (1024, 1023)  # the table's size lies between


def _drawn(shape: tuple[int, ...], **options: object) -> np.ndarray:
    given = {"seed": 0, "name": "layer", "draw": 1, "scale": 2.0, **options}
    return quick_normal(shape, **given).numpy().astype(np.float64)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_normal_with_the_scale_asked_for(shape):
    x = _drawn(shape).ravel() / 2
    assert stats.kstest(x, "norm").pvalue > 0.01
    assert x.std() == pytest.approx(1, abs=4 / np.sqrt(2 * x.size))
    assert stats.kurtosis(x) == pytest.approx(0, abs=4 * np.sqrt(24 / x.size))


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_neighbours_are_independent(shape):
    """Numbers come in pairs; nobody may notice."""
    x = _drawn(shape).ravel() / 2
    x = x[: x.size // 2 * 2].reshape(-1, 2)
    limit = 4 / np.sqrt(len(x))
    for a, b in ((x[:, 0], x[:, 1]), (x[:-1, 1], x[1:, 0])):
        for f in (np.asarray, np.abs, np.square):
            assert abs(np.corrcoef(f(a), f(b))[0, 1]) < limit
    for direction in ((1, 1), (1, -1), (3, 4)):  # a sum of independent normal numbers is normal
        along = x @ np.array(direction) / np.linalg.norm(direction)
        # 2^16 pairs drawn truly at random would be 0.004 from it.
        assert stats.kstest(along, "norm").statistic < max(0.004, 1.95 / np.sqrt(len(x)))


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_magnitudes_are_those_of_the_same_numbers(shape):
    assert np.array_equal(_drawn(shape, magnitude=True), np.abs(_drawn(shape)))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 4), (5, 7)])
def test_any_shape(shape):
    assert _drawn(shape).shape == shape


def test_each_draw_name_and_seed_has_numbers_of_its_own():
    draws = [_drawn(SMALL, **other) for other in ({}, {"draw": 2}, {"name": "other"}, {"seed": 1})]
    assert np.array_equal(draws[0], _drawn(SMALL))
    limit = 4 / np.sqrt(draws[0].size)
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < limit
