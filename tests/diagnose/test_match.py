"""Comparisons that keep numbers in place of tensors: against NumPy on the tensors themselves."""

import math

import numpy as np
import pytest
import torch

from rewire.diagnose import match
from rewire.diagnose.match import Match, alike, all_close, close, cosine, matched
from rewire.diagnose.samples import _nearest, compare


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return a.to(dtype), (a + 0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("piece", [1 << 20, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers(piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "PIECE", piece)
    a, b = pair(4, 9, dtype=dtype)
    found = Match.of(a.t(), b.t())
    x, y = a.double().numpy(), b.double().numpy()
    assert found.dot == pytest.approx((x * y).sum()) and found.squares == pytest.approx(((x * x).sum(), (y * y).sum()))
    assert (found.most, found.size) == pytest.approx((np.abs(x).max(), np.abs(y).max()))
    assert found.gap == pytest.approx(np.abs(x - y).max(), rel=1e-2 if dtype is torch.bfloat16 else 1e-6)
    assert cosine([found]) == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert not found.close() and not found.nothing and Match.of(b, b).close()
    assert Match.of(torch.zeros(3), torch.ones(3)).nothing


def test_the_cosine_of_a_list_is_that_of_one_vector() -> None:
    (a, b), (c, d) = pair(5), pair(2, 3)
    x, y = torch.cat([a, c.flatten()]), torch.cat([b, 3 * d.flatten()])
    assert cosine(matched([a, c], [b, 3 * d])) == pytest.approx(float(torch.cosine_similarity(x, y, 0)), rel=1e-6)
    assert cosine(matched([a, None], [b, d])) is None
    assert cosine(matched([a], [torch.zeros(5)])) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 8])
def test_what_is_not_finite_is_close_to_nothing(bad: float, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "PIECE", 4)
    a = torch.ones(9)
    b = a.clone()
    b[at] = bad
    for got, wanted in [(a, b), (b, a), (b, b)]:
        assert not close(got, wanted) and not Match.of(got, wanted).close() and not alike(got, wanted)


def test_tolerance() -> None:
    a = torch.tensor([1.0, 1e3])
    for error, same in [(0.1, True), (0.5, False)]:
        b = a + torch.tensor([error, 0.0])
        assert close(b, a) is Match.of(b, a).close() is same  # 2,000 units in the last place of the largest
    assert not close(a.bfloat16() * 1.1, a.bfloat16())
    assert not close(torch.full((1,), 1e-6), torch.zeros(1)) and close(
        torch.full((1,), 1e-6), torch.zeros(1), least=1.0
    )
    assert Match.of(a * 1.001, a).close(torch.bfloat16) and not Match.of(a * 1.001, a).close()
    assert not close(torch.zeros(2), torch.zeros(3)) and not Match.of(torch.zeros(2), torch.zeros(3)).close()
    assert close(torch.zeros(0, 3), torch.zeros(0, 3))
    assert close(torch.tensor([3 + 4j]), torch.tensor([3 + 4j])) and not close(torch.tensor([3j]), torch.tensor([4j]))


def test_nothing_is_as_good_as_zeros() -> None:
    assert alike(None, None) and alike(None, torch.zeros(2)) and alike(torch.zeros(2), None)
    assert not alike(None, torch.ones(2)) and not alike(torch.ones(2), None)
    assert all_close([]) and not all_close([None])


@pytest.mark.parametrize("piece", [1 << 20, 5])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 6), -1), ((4, 3, 2, 2), 1)])
def test_factors_by_row(shape: tuple[int, ...], axis: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewire.diagnose.samples.PIECE", piece)
    a, _ = pair(*shape, dtype=torch.float64)
    rows = a.reshape(-1, shape[-1]) if axis == -1 else a.flatten(1)
    wanted = torch.arange(1, len(rows) + 1).double()
    b = rows * wanted[:, None]
    b[1, 0] += 1
    found = compare(a, b.reshape(shape), axis, 0)
    assert found.clear.tolist() == [i != 1 for i in range(len(rows))]
    torch.testing.assert_close(found.factor[found.clear], wanted[found.clear])


def test_nearest_as_by_looking_at_all() -> None:
    known, factors = torch.tensor([0.5, 1.2, 0.9]), torch.linspace(0.3, 1.5, 40)
    torch.testing.assert_close(_nearest(known, factors), (factors[:, None] - known).abs().min(1).values)
