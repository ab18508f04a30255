"""What learned direct rules make of rows, by plain loops: runs of positions, sketches, steps of probes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rewire
from rewire.rules import resolve
from rewire.rules.base import Rows
from rewire.swap import states_of


def rows(samples: int, run: int, n: int, features: int, seed: int = 0) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Random rows; e (samples, n) and G (samples, run, features) as arrays too."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    G = torch.randn(samples * run, features, generator=generator, dtype=torch.float64)
    return Rows(e=e, exact=G, seen=None, wide=None), e.numpy(), G.reshape(samples, run, features).numpy()


def test_fitted_takes_no_more_samples_than_it_was_told() -> None:
    rule = resolve("fitted(probe=4, ridge=0.0, cap=0)")
    seen, e, G = rows(9, 2, 3, 5)
    sums = rule.gather(seen)
    S, R = np.zeros((3, 3)), np.zeros((3, 5))
    for i in range(4):
        for t in range(2):
            S += np.outer(e[i], e[i])
            R += np.outer(e[i], G[i, t])
    np.testing.assert_allclose(sums["S"], S, atol=1e-12)
    np.testing.assert_allclose(sums["R"], R, atol=1e-12)
    B = rule.learn(torch.zeros(3, 5, dtype=torch.float64), {}, sums)
    wanted = np.linalg.lstsq(np.repeat(e[:4], 2, 0), G[:4].reshape(8, 5), rcond=None)[0]
    np.testing.assert_allclose(B, wanted, atol=1e-10)


@pytest.mark.parametrize(("batch", "exact"), [(10, 2), (7, 3), (20, 1), (30, 1)])
def test_a_round_of_anchors_ends_with_the_last_sample_it_needs(batch: int, exact: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    rewire.convert(model, "fitted(probe=20, every=8)", scale=0.3)
    (state,) = states_of(model[2])
    found = []
    for _ in range(17):
        loss = nn.functional.cross_entropy(model(torch.randn(batch, 4)), torch.randint(3, (batch,)))
        found.append(state.exact)
        loss.backward()
    assert found[1:] == [number % 8 < exact for number in range(1, 17)]


def test_a_step_of_a_probe() -> None:
    """``fitted(by="jvp")``: B + sum of (u - B v) v^T / (N + features), v summed over the positions that share B."""
    rule = resolve("fitted(by='jvp')")
    seen, u, v = rows(6, 3, 2, 4)
    B = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = B.numpy().copy()
    for i in range(6):
        total = v[i].sum(0)
        wanted += np.outer(u[i] - B.numpy() @ total, total) / 3 / (6 + 4)
    np.testing.assert_allclose(rule.learn(B, {}, rule.observe(seen, B)), wanted, atol=1e-12)


def test_an_anchor_of_grape_sets_the_size_of_all_that_is_handed_back() -> None:
    rule = resolve("grape")
    seen, e, G = rows(5, 3, 2, 4)
    B = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    learned = rule.learn(B, {}, rule.gather(seen)).numpy()
    fed = np.array([[e[i] @ learned for _ in range(3)] for i in range(5)])  # the same at every position
    np.testing.assert_allclose(np.linalg.norm(fed), np.linalg.norm(G), rtol=1e-12)
    np.testing.assert_allclose(learned / np.linalg.norm(learned), B.numpy() / np.linalg.norm(B.numpy()), atol=1e-12)


def test_a_sketch_is_one_place_and_one_sign_for_each_output() -> None:
    rule = resolve("fitted(sketch=16)")
    matrix = rule.signal(torch.eye(100, dtype=torch.float64), None, 1).numpy()
    assert matrix.shape == (100, 16)
    assert all(sorted(np.abs(row)) == [0] * 15 + [1] for row in matrix)
    used = np.abs(matrix).sum(0)
    assert set(used) <= {6, 7}, "outputs are spread over all places"
    assert 30 < (matrix.sum(1) > 0).sum() < 70, "about as many of either sign"
    e = torch.randn(5, 100, 3, dtype=torch.float64)  # and the same wherever the features are
    np.testing.assert_allclose(rule.signal(e, None, 1), np.einsum("ifk,fs->isk", e, matrix), atol=1e-12)
    np.testing.assert_array_equal(matrix, resolve("fitted(sketch=16)").signal(torch.eye(100).double(), None, -1))
