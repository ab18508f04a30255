"""The way of e to a layer's input: every row of the table, as plans and through converted models."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rewire
from rewire import rows
from rewire.routing import plan
from rewire.rules.direct import DFA, DRTP, SDFA

TOL = 1e-10


@pytest.fixture(autouse=True)
def silence_is_checked():
    """A warning of the library fails the test that does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", rewire.RewireWarning)
        yield


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(ours, expected, what=""):
    ours = ours.detach().numpy()
    assert ours.shape == expected.shape, f"{what}: {ours.shape}, expected {expected.shape}"
    assert np.max(np.abs(ours - expected), initial=0.0) <= TOL, what


# -- the table, one loop per sample and position -------------------------------------------------------
# e and B are arrays; each function returns the feedback for an x of the given shape.


def grid(shape):
    return itertools.product(*map(range, shape))


def times(e, B):
    """One error of n numbers through B (n, ...)."""
    return sum(e[k] * B[k] for k in range(len(e)))


def area(e, sizes):
    """(*grid, n) -> (*sizes, n): every new position has the mean over the old ones it overlaps."""
    old = e.shape[:-1]
    out = np.zeros((*sizes, e.shape[-1]))
    for place in grid(sizes):
        covered = [
            range(math.floor(p * s / t), math.ceil((p + 1) * s / t)) for p, s, t in zip(place, old, sizes, strict=True)
        ]
        cells = list(itertools.product(*covered))
        out[place] = sum(e[cell] for cell in cells) / len(cells)
    return out


def mean(e):
    """(*grid, n) -> (n,)."""
    cells = list(grid(e.shape[:-1]))
    return sum(e[cell] for cell in cells) / len(cells)


def per_sample(x_shape, e, B):
    """(N, F) or dense (N, C, *space), e (N, n)."""
    out = np.zeros(x_shape)
    for i in range(x_shape[0]):
        out[i] = times(e[i], B)
    return out


def broadcast(x_shape, e, B):
    """(N, *grid, F), e (N, n): the same at every position."""
    out = np.zeros(x_shape)
    for i in range(x_shape[0]):
        for place in grid(x_shape[1:-1]):
            out[(i, *place)] = times(e[i], B)
    return out


def channels(x_shape, e, B):
    """(N, C, *space), e (N, n): the same at every position, per channel."""
    out = np.zeros(x_shape)
    for i in range(x_shape[0]):
        for place in grid(x_shape[2:]):
            out[(i, slice(None), *place)] = times(e[i], B)
    return out


def per_position(x_shape, e, B):
    """(*any, F), e (*any, n)."""
    out = np.zeros(x_shape)
    for place in grid(x_shape[:-1]):
        out[place] = times(e[place], B)
    return out


def resampled(x_shape, e, B):
    """(N, C, *space), e (N, n, *space')."""
    out = np.zeros(x_shape)
    for i in range(x_shape[0]):
        here = area(np.moveaxis(e[i], 0, -1), x_shape[2:])
        for place in grid(x_shape[2:]):
            out[(i, slice(None), *place)] = times(here[place], B)
    return out


def no_batch(x_shape, e, B):
    """No batch dimension, e (N, n)."""
    fed = times(sum(e[i] for i in range(len(e))) / len(e), B)
    out = np.zeros(x_shape)
    for place in grid(x_shape[:-1]):
        out[place] = fed
    return out


def parts(x_shape, e, B, one):
    """(k N, ...): part j of sample i is row i k + j; ``one`` is the way of an x of (N, ...)."""
    N = len(e)
    k = x_shape[0] // N
    single = one((N, *x_shape[1:]), e, B)
    out = np.zeros(x_shape)
    for i in range(N):
        for j in range(k):
            out[i * k + j] = single[i]
    return out


def frames(x_shape, e, B, one):
    """(N T, ...), e (N, T, n): row i T + t is frame t of sample i."""
    N, T = e.shape[:2]
    return one(x_shape, np.stack([e[i, t] for i in range(N) for t in range(T)]), B)


def swap(a):
    return np.swapaxes(a, 0, 1)


def sequence_first(x_shape, e, B, one):
    """(T, N, ...): what ``one`` gives for (N, T, ...)."""
    return swap(one((x_shape[1], x_shape[0], *x_shape[2:]), e, B))


def tokens_of_image(x_shape, e, B, sides):
    """(N, T, F) flattened row by row from (N, *sides, F), e (N, n, *space')."""
    out = np.zeros(x_shape)
    for i in range(x_shape[0]):
        here = area(np.moveaxis(e[i], 0, -1), sides)
        for t, place in enumerate(grid(sides)):
            out[i, t] = times(here[place], B)
    return out


# x's shape, x's axis, e's shape, e's axis, the loops, B's shape without n, what else plan is told
N4 = 4
FIRST = {"layout": "batch_first", "e_layout": "batch_first"}
SECOND = {"layout": "sequence_first", "e_layout": "sequence_first"}

TABLE = {
    "vector": ((5, 3), -1, (5, N4), -1, per_sample, (3,), {}),
    "image dense": ((5, 3, 2, 4), 1, (5, N4), -1, per_sample, (3, 2, 4), {}),
    "signal dense": ((5, 3, 7), 1, (5, N4), -1, per_sample, (3, 7), {}),
    "volume dense": ((2, 3, 2, 3, 2), 1, (2, N4), -1, per_sample, (3, 2, 3, 2), {}),
    "image channel": ((5, 3, 2, 4), 1, (5, N4), -1, channels, (3,), {"structure": "channel"}),
    "tokens": ((5, 7, 3), -1, (5, 7, N4), -1, per_position, (3,), {}),
    "tokens, channel means nothing": ((5, 7, 3), -1, (5, 7, N4), -1, per_position, (3,), {"structure": "channel"}),
    "tokens pooled": ((5, 7, 3), -1, (5, N4), -1, broadcast, (3,), {}),
    "channels last pooled": ((5, 2, 6, 3), -1, (5, N4), -1, broadcast, (3,), {}),
    "channels last, same grid": ((5, 2, 6, 3), -1, (5, 2, 6, N4), -1, per_position, (3,), {}),
    "image, same grid": ((5, 3, 2, 6), 1, (5, N4, 2, 6), 1, resampled, (3,), {}),
    "image, coarser e": ((2, 3, 6, 8), 1, (2, N4, 2, 4), 1, resampled, (3,), {}),
    "image, finer e": ((2, 3, 2, 4), 1, (2, N4, 6, 8), 1, resampled, (3,), {}),
    "image, odd ratio": ((2, 3, 5, 3), 1, (2, N4, 3, 7), 1, resampled, (3,), {}),
    "signal, coarser e": ((2, 3, 9), 1, (2, N4, 4), 1, resampled, (3,), {}),
    "volume, finer e": ((2, 3, 2, 1, 2), 1, (2, N4, 4, 2, 3), 1, resampled, (3,), {}),
    "parts of vectors": ((6, 3), -1, (2, N4), -1, lambda s, e, B: parts(s, e, B, per_sample), (3,), {}),
    "windows": ((6, 4, 3), -1, (2, N4), -1, lambda s, e, B: parts(s, e, B, broadcast), (3,), {}),
    "patches, dense": ((6, 3, 2, 2), 1, (2, N4), -1, lambda s, e, B: parts(s, e, B, per_sample), (3, 2, 2), {}),
    "patches, channel": (
        ((6, 3, 2, 2), 1, (2, N4), -1, lambda s, e, B: parts(s, e, B, channels), (3,), {"structure": "channel"})
    ),
    "sequence first pooled": (
        ((7, 4, 3), -1, (4, N4), -1, lambda s, e, B: sequence_first(s, e, B, broadcast), (3,), {})
    ),
    "sequence first, per token": ((7, 4, 3), -1, (7, 4, N4), -1, per_position, (3,), {}),
    "one step of a sequence": ((1, 5, 3), -1, (1, 5, N4), -1, per_position, (3,), {}),
    "no batch, one table": ((1, 7, 7, 3), -1, (5, N4), -1, no_batch, (3,), {}),
    "no batch, one row": ((1, 3), -1, (5, N4), -1, no_batch, (3,), {}),
    "no batch, one vector": ((3,), -1, (5, N4), -1, no_batch, (3,), {}),
    "no batch, images out": (
        (
            (1, 7, 7, 3),
            -1,
            (2, N4, 3, 3),
            1,
            lambda s, e, B: no_batch(s, np.stack([mean(np.moveaxis(a, 0, -1)) for a in e]), B),
            (3,),
            {},
        )
    ),
    "unbatched vector": ((3,), -1, (N4,), -1, lambda s, e, B: times(e, B), (3,), {}),
    "unbatched tokens": ((7, 3), -1, (N4,), -1, lambda s, e, B: broadcast((1, *s), e[None], B)[0], (3,), {}),
    "unbatched image": ((3, 2, 4), 0, (N4,), -1, lambda s, e, B: times(e, B), (3, 2, 4), {}),
    "unbatched images": (((3, 2, 4), 0, (N4, 4, 4), 0, lambda s, e, B: resampled((1, *s), e[None], B)[0], (3,), {})),
    "unbatched image, pooled batch of one": (
        ((3, 2, 4), 0, (1, N4), -1, lambda s, e, B: times(e[0], B), (3, 2, 4), {})
    ),
    "tokens of an image": (
        (2, 24, 3),
        -1,
        (2, N4, 2, 3),
        1,
        lambda s, e, B: tokens_of_image(s, e, B, (4, 6)),
        (3,),
        {},
    ),
    "tokens of a coarse image": (
        ((2, 6, 3), -1, (2, N4, 4, 6), 1, lambda s, e, B: tokens_of_image(s, e, B, (2, 3)), (3,), {})
    ),
    "tokens and a class token": (
        (
            (2, 25, 3),
            -1,
            (2, N4, 2, 3),
            1,
            lambda s, e, B: broadcast(s, np.stack([mean(np.moveaxis(a, 0, -1)) for a in e]), B),
            (3,),
            {},
        )
    ),
    "flattened tokens below": (((10, 3), -1, (2, 5, N4), -1, lambda s, e, B: frames(s, e, B, per_sample), (3,), {})),
    "flattened tokens above a vector": (
        ((2, 3), -1, (10, N4), -1, lambda s, e, B: per_sample(s, e.reshape(2, 5, N4).mean(1), B), (3,), FIRST)
    ),
    "flattened tokens above a vector, sequence first": (
        ((2, 3), -1, (10, N4), -1, lambda s, e, B: per_sample(s, e.reshape(5, 2, N4).mean(0), B), (3,), SECOND)
    ),
    "regions of images": (
        (
            (2, 3, 4, 4),
            1,
            (7, N4),
            -1,
            lambda s, e, B: np.broadcast_to((mean(e) @ B)[None, :, None, None], s),
            (3,),
            {"layout": "batch_first"},
        )
    ),
    "masks of regions, as many for each image": (
        (
            (2, 3, 4, 4),
            1,
            (6, N4, 5, 5),
            1,
            lambda s, e, B: channels(s, e.mean((2, 3)).reshape(2, 3, N4).mean(1), B),
            (3,),
            {"layout": "batch_first", "structure": "channel"},
        )
    ),
    "flattened tokens above": (
        ((2, 5, 3), -1, (10, N4), -1, lambda s, e, B: per_position(s, e.reshape(2, 5, N4), B), (3,), {})
    ),
    "other length": (
        (
            (2, 6, 3),
            -1,
            (2, 4, N4),
            -1,
            lambda s, e, B: np.stack([per_position((6, 3), area(a, (6,)), B) for a in e]),
            (3,),
            {},
        )
    ),
    "pooled below": (
        ((2, 3), -1, (2, 4, N4), -1, lambda s, e, B: per_sample(s, np.stack([mean(a) for a in e]), B), (3,), {})
    ),
    "signal, tokens out": (
        ((2, 3, 8), 1, (2, 4, N4), -1, lambda s, e, B: resampled(s, np.moveaxis(e, 1, -1), B), (3,), {})
    ),
    "frames of a video": (
        ((6, 3, 2, 2), 1, (2, 3, N4), -1, lambda s, e, B: frames(s, e, B, per_sample), (3, 2, 2), {})
    ),
    "tokens of frames": (((6, 5, 3), -1, (2, 3, N4), -1, lambda s, e, B: frames(s, e, B, broadcast), (3,), {})),
    "flattened pixels below an image": (
        (
            (12, 3),
            -1,
            (2, N4, 2, 3),
            1,
            lambda s, e, B: frames(s, np.moveaxis(e, 1, -1).reshape(2, 6, N4), B, per_sample),
            (3,),
            {},
        )
    ),
    "two windows of each frame": (
        ((12, 5, 3), -1, (2, 3, N4), -1, lambda s, e, B: parts(s, e.reshape(6, N4), B, broadcast), (3,), {})
    ),
    "rows of an image": (
        (
            (8, 6, 3),
            -1,
            (2, N4, 4, 6),
            1,
            lambda s, e, B: per_position((2, 4, 6, 3), np.moveaxis(e, 1, -1), B).reshape(s),
            (3,),
            {},
        )
    ),
    "windows, tokens out": (
        (
            (6, 4, 3),
            -1,
            (2, 5, N4),
            -1,
            lambda s, e, B: parts(s, np.stack([mean(a) for a in e]), B, broadcast),
            (3,),
            {},
        )
    ),
    "image, sequence first out": (  # a CRNN: (N, C, H, W) and (T, N, n)
        (
            (5, 3, 2, 4),
            1,
            (7, 5, N4),
            -1,
            lambda s, e, B: channels(s, np.stack([mean(a) for a in swap(e)]), B),
            (3,),
            {},
        )
    ),
    "signal, sequence first out": (
        ((5, 3, 6), 1, (4, 5, N4), -1, lambda s, e, B: resampled(s, np.moveaxis(swap(e), 1, -1), B), (3,), {})
    ),
    "vector, sequence first out": (
        ((5, 3), -1, (7, 5, N4), -1, lambda s, e, B: per_sample(s, np.stack([mean(a) for a in swap(e)]), B), (3,), {})
    ),
    "transposed in between": ((7, 5, 3), -1, (5, 7, N4), -1, lambda s, e, B: per_position(s, swap(e), B), (3,), {}),
    "other length, sequence first": (
        (
            (7, 5, 3),
            -1,
            (4, 5, N4),
            -1,
            lambda s, e, B: swap(np.stack([per_position((7, 3), area(a, (7,)), B) for a in swap(e)])),
            (3,),
            {},
        )
    ),
    "batch of one, sequence first": ((6, 1, 3), -1, (1, N4), -1, lambda s, e, B: parts(s, e, B, broadcast), (3,), {}),
    "samples without rows": ((0, 3), -1, (0, N4), -1, lambda s, e, B: np.zeros(s), (3,), {}),
}


@pytest.mark.parametrize("row", TABLE)
def test_plan(row):
    x_shape, x_axis, e_shape, e_axis, loops, b_shape, told = TABLE[row]
    route = plan(x_shape, x_axis, e_shape, e_axis, **told)
    assert route.feedback_shape == (N4, *b_shape)
    assert route.ambiguous is None
    e, B = draw(*e_shape), draw(N4, *b_shape, seed=1)
    fed = route(e, B)
    close(fed, np.asarray(loops(x_shape, e.numpy(), B.numpy())), row)


def test_feedback_decides_the_dtype():
    route = plan((2, 3), -1, (2, 4), -1)
    e, B = draw(2, 4), draw(4, 3, seed=1).float()
    assert torch.equal(route(e, B), e.float() @ B)


NO_WAY = {
    "vector, other batch": ((7, 3), -1, (4, N4), -1),
    "fewer rows than samples": ((2, 3), -1, (5, N4), -1),
    "vector, other tokens": ((7, 3), -1, (2, 5, N4), -1),
    "no samples": ((4, 3, 2, 2), 1, (0, N4), -1),
    "a number": ((), -1, (4, N4), -1),
    "a number above": ((4, 3), -1, (), -1),
}


@pytest.mark.parametrize("row", NO_WAY)
def test_no_way_names_both_shapes(row):
    x_shape, _, e_shape, _ = NO_WAY[row]
    with pytest.raises(rewire.RoutingError) as problem:
        plan(*NO_WAY[row])
    assert str(x_shape) in str(problem.value) and str(e_shape) in str(problem.value)


@pytest.mark.parametrize(
    ("x", "e", "words"),
    [((2, 3), (10, N4), "2 samples, whose errors are 5 rows each"), ((2, 3, 4, 4), (7, N4), "no batch dimension")],
)
def test_a_guess_is_said(x, e, words):
    assert words in plan(x, 1 if len(x) == 4 else -1, e, -1).ambiguous


# -- shapes that fit two readings ----------------------------------------------------------------------

ERROR_SECOND = {"layout": "batch_first", "e_layout": "sequence_first"}
INPUT_SECOND = {"layout": "sequence_first", "e_layout": "batch_first"}


def pooled(e):
    return np.stack([mean(a) for a in e])


# x, axis, e, axis; the loops for what may be asked, the guess first
TWO_WAYS = {
    "as many positions as samples": (
        ((4, 4, 3), -1, (4, N4), -1),
        [(FIRST, broadcast), (SECOND, lambda s, e, B: sequence_first(s, e, B, broadcast))],
    ),
    "positions a multiple of samples": (
        ((8, 4, 3), -1, (4, N4), -1),
        [
            (SECOND, lambda s, e, B: sequence_first(s, e, B, broadcast)),
            (FIRST, lambda s, e, B: parts(s, e, B, broadcast)),
        ],
    ),
    "as many positions, tokens out": (
        ((4, 4, 3), -1, (4, 4, N4), -1),
        [
            (FIRST, per_position),
            (SECOND, per_position),
            (INPUT_SECOND, lambda s, e, B: per_position(s, swap(e), B)),
            (ERROR_SECOND, lambda s, e, B: per_position(s, swap(e), B)),
        ],
    ),
    "a longer input than output": (
        ((6, 5, 3), -1, (3, 5, N4), -1),
        [
            (SECOND, lambda s, e, B: swap(np.stack([per_position((6, 3), area(a, (6,)), B) for a in swap(e)]))),
            (FIRST, lambda s, e, B: parts(s, pooled(e), B, broadcast)),
        ],
    ),
    "one step, or none": (
        ((1, 5, 3), -1, (5, N4), -1),
        [(SECOND, lambda s, e, B: per_sample((5, 3), e, B)[None]), (FIRST, no_batch)],
    ),
    "image, square sequence out": (
        ((4, 3, 2, 2), 1, (4, 4, N4), -1),
        [
            (FIRST, lambda s, e, B: channels(s, pooled(e), B)),
            (SECOND, lambda s, e, B: channels(s, pooled(swap(e)), B)),
        ],
    ),
    "vector, square sequence out": (
        ((4, 3), -1, (4, 4, N4), -1),
        [
            (FIRST, lambda s, e, B: per_sample(s, pooled(e), B)),
            (SECOND, lambda s, e, B: per_sample(s, pooled(swap(e)), B)),
        ],
    ),
    "vector, sequence out or parts": (
        ((6, 3), -1, (3, 6, N4), -1),
        [
            (SECOND, lambda s, e, B: per_sample(s, pooled(swap(e)), B)),
            (FIRST, lambda s, e, B: parts(s, pooled(e), B, per_sample)),
        ],
    ),
    "square tokens, other length out": (
        ((4, 4, 3), -1, (4, 6, N4), -1),
        [
            (FIRST, lambda s, e, B: np.stack([per_position((4, 3), area(a, (4,)), B) for a in e])),
            (INPUT_SECOND, lambda s, e, B: swap(np.stack([per_position((4, 3), area(a, (4,)), B) for a in e]))),
        ],
    ),
}


@pytest.mark.parametrize("row", TWO_WAYS)
def test_two_readings(row):
    (x_shape, x_axis, e_shape, e_axis), ways = TWO_WAYS[row]
    e, B = draw(*e_shape), draw(N4, 3, seed=1)
    guess = plan(x_shape, x_axis, e_shape, e_axis, structure="channel")
    assert "but" in guess.ambiguous and "fits as well" in guess.ambiguous
    close(guess(e, B), ways[0][1](x_shape, e.numpy(), B.numpy()), "the guess")
    for asked, loops in ways:
        route = plan(x_shape, x_axis, e_shape, e_axis, structure="channel", **asked)
        assert route.ambiguous is None, asked
        close(route(e, B), loops(x_shape, e.numpy(), B.numpy()), str(asked))


def test_what_was_seen_decides():
    shown = plan((7, 4, 3), -1, (4, 5), -1).reading
    assert shown == (True, False)
    for shape, loops in [((4, 4, 3), broadcast), ((8, 4, 3), broadcast)]:
        route = plan(shape, -1, (4, N4), -1, seen=shown)
        e, B = draw(4, N4), draw(N4, 3, seed=1)
        assert route.ambiguous is None and route.reading is None
        close(route(e, B), sequence_first(shape, e.numpy(), B.numpy(), loops))
    shown = plan((4, 7, 3), -1, (4, 5), -1).reading
    assert shown == (False, False)
    assert plan((4, 4, 3), -1, (4, N4), -1, seen=shown).ambiguous is None
    transposed = plan((7, 5, 3), -1, (5, 7, N4), -1).reading
    route = plan((5, 5, 3), -1, (5, 5, N4), -1, seen=transposed)
    e, B = draw(5, 5, N4), draw(N4, 3, seed=1)
    assert route.ambiguous is None
    close(route(e, B), per_position((5, 5, 3), swap(e.numpy()), B.numpy()))


def test_what_was_asked_beats_what_was_seen():
    e, B = draw(4, N4), draw(N4, 3, seed=1)
    route = plan((4, 4, 3), -1, (4, N4), -1, layout="batch_first", e_layout="batch_first", seen=(True, False))
    close(route(e, B), broadcast((4, 4, 3), e.numpy(), B.numpy()))


def test_beams_of_a_sequence_are_reached_when_asked_for():
    """(T, k N, F) with T no multiple of N."""
    shape = (5, 6, 3)
    e, B = draw(2, N4), draw(N4, 3, seed=1)
    expected = swap(parts((6, 5, 3), e.numpy(), B.numpy(), broadcast))
    close(plan(shape, -1, (2, N4), -1, **SECOND)(e, B), expected)
    close(plan(shape, -1, (2, N4), -1, seen=(True, False))(e, B), expected)
    assert "no batch dimension" in plan(shape, -1, (2, N4), -1).ambiguous


def test_flattened_in_the_other_order_when_asked_for():
    shape, e, B = (10, 3), draw(5, 2, N4), draw(N4, 3, seed=1)
    close(plan(shape, -1, (5, 2, N4), -1)(e, B), per_sample(shape, e.numpy().reshape(10, N4), B.numpy()))
    route = plan(shape, -1, (5, 2, N4), -1, **ERROR_SECOND)
    close(route(e, B), per_sample(shape, swap(e.numpy()).reshape(10, N4), B.numpy()))
    images = plan((10, 3, 2, 2), 1, (5, 2, N4), -1, structure="channel", **ERROR_SECOND)
    close(images(e, B), channels((10, 3, 2, 2), swap(e.numpy()).reshape(10, N4), B.numpy()))


def test_guessing_that_there_is_no_batch_is_said():
    e, B = draw(4, N4), draw(N4, 3, seed=1)
    route = plan((7, 9, 3), -1, (4, N4), -1)
    assert "no batch dimension" in route.ambiguous
    close(route(e, B), no_batch((7, 9, 3), e.numpy(), B.numpy()))
    assert plan((7, 9, 3), -1, (4, N4), -1, **FIRST).ambiguous is None


# -- through converted models --------------------------------------------------------------------------


class Tiny(nn.Module):
    """lower -> tanh -> reshaped to x -> layer -> tanh -> reshaped -> head. x is kept to see its gradient."""

    def __init__(self, lower, layer, head, before=lambda h: h, between=lambda z: z):
        super().__init__()
        self.lower, self.layer, self.head = lower, layer, head
        self.before, self.between = before, between

    def below(self, inputs):
        return self.before(torch.tanh(self.lower(inputs)))

    def forward(self, inputs):
        self.x = self.below(inputs)
        self.x.retain_grad()
        return self.head(self.between(torch.tanh(self.layer(self.x))))


def folded(k):
    """(N, k T, F) -> (k N, T, F), windows of one sample one after the other."""
    return lambda h: h.reshape(h.shape[0] * k, h.shape[1] // k, h.shape[2])


def upsample(z):
    return nn.functional.interpolate(z, scale_factor=2)


def turned(a):
    return a.transpose(0, 1)


MODELS = {
    "mlp": (lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)), (3, 5), per_sample, {}),
    "tokens, pooled head": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(1)),
        (3, 5, 5),
        broadcast,
        {},
    ),
    "tokens, class-token head": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z[:, 0]),
        (3, 5, 5),
        broadcast,
        {},
    ),
    "tokens, head per token": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)),
        (3, 5, 5),
        per_position,
        {},
    ),
    "conv, linear head, dense": (
        lambda: Tiny(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 5, 2), nn.Linear(20, 4), between=lambda z: z.flatten(1)),
        (3, 2, 5, 5),
        per_sample,
        {},
    ),
    "conv, linear head, channel": (
        lambda: Tiny(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 5, 2), nn.Linear(20, 4), between=lambda z: z.flatten(1)),
        (3, 2, 5, 5),
        channels,
        {"feedback": "channel"},
    ),
    "segmentation, coarser inside": (
        lambda: Tiny(nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 5, 3, 1, 1), nn.Conv2d(5, 4, 1), between=upsample),
        (2, 2, 6, 8),
        resampled,
        {},
    ),
    "segmentation, finer inside": (
        lambda: Tiny(nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 5, 2, 2), nn.Conv2d(5, 4, 1)),
        (2, 2, 6, 8),
        resampled,
        {},
    ),
    "segmentation, transposed head": (
        lambda: Tiny(nn.Conv2d(2, 3, 2, 2), nn.Conv2d(3, 5, 3, 1, 1), nn.ConvTranspose2d(5, 4, 2, 2)),
        (2, 2, 6, 8),
        resampled,
        {},
    ),
    "windows folded into the batch": (
        lambda: Tiny(
            nn.Linear(5, 6),
            nn.Linear(6, 7),
            nn.Linear(7, 4),
            before=folded(3),
            between=lambda z: z.reshape(2, 12, 7).mean(1),
        ),
        (2, 12, 5),
        lambda s, e, B: parts(s, e, B, broadcast),
        {},
    ),
    "multiple choice": (  # one score per choice; a head over the choices of a sample
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(21, 3), between=lambda z: z.reshape(2, 21)),
        (6, 5),
        lambda s, e, B: parts(s, e, B, per_sample),
        {},
    ),
    "multiple choice, tokens": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(21, 3), between=lambda z: z.mean(1).reshape(2, 21)),
        (6, 4, 5),
        lambda s, e, B: parts(s, e, B, broadcast),
        {},
    ),
    "sequence first, pooled": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(0)),
        (7, 3, 5),
        lambda s, e, B: sequence_first(s, e, B, broadcast),
        {},
    ),
    "sequence first, last step": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z[-1]),
        (7, 3, 5),
        lambda s, e, B: sequence_first(s, e, B, broadcast),
        {},
    ),
    "sequence first, asked for": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(0)),
        (6, 3, 5),
        lambda s, e, B: sequence_first(s, e, B, broadcast),
        {"rule": DFA(layout="sequence_first")},
    ),
    "sequence first, as many steps as samples": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(0)),
        (3, 3, 5),
        lambda s, e, B: sequence_first(s, e, B, broadcast),
        {"rule": DFA(layout="sequence_first")},
    ),
    "sequence first inside only": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), before=turned, between=turned),
        (3, 7, 5),
        lambda s, e, B: per_position(s, swap(e), B),
        {},
    ),
    "sequence first inside only, square": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), before=turned, between=turned),
        (3, 3, 5),
        lambda s, e, B: per_position(s, swap(e), B),
        {"rule": DFA(layout="batch_first"), "layers": {"layer": DFA(layout="sequence_first")}},
    ),
    "batch first, as many steps as samples": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(1)),
        (3, 3, 5),
        broadcast,
        {"rule": DFA(layout="batch_first")},
    ),
    "one sample of tokens, unbatched": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(0)),
        (6, 5),
        lambda s, e, B: broadcast((1, *s), e[None], B)[0],
        {},
    ),
    "one vector, unbatched": (
        lambda: Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)),
        (5,),
        lambda s, e, B: times(e, B),
        {},
    ),
    "one image, unbatched": (
        lambda: Tiny(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 5, 2), nn.Linear(20, 4), between=lambda z: z.flatten()),
        (2, 5, 5),
        lambda s, e, B: times(e, B),
        {},
    ),
    "one image, unbatched, channel": (
        lambda: Tiny(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 5, 2), nn.Linear(20, 4), between=lambda z: z.flatten()),
        (2, 5, 5),
        lambda s, e, B: channels((1, *s), e[None], B)[0],
        {"feedback": "channel"},
    ),
    "tokens of an image, conv out": (
        lambda: Tiny(
            nn.Linear(5, 6),
            nn.Linear(6, 7),
            nn.Conv2d(7, 4, 1),
            between=lambda z: upsample(z.reshape(2, 2, 3, 7).movedim(-1, 1)),
        ),
        (2, 6, 5),
        lambda s, e, B: tokens_of_image(s, e, B, (2, 3)),
        {},
    ),
    "signal, linear head per frame": (
        lambda: Tiny(nn.Conv1d(5, 6, 3, 1, 1), nn.Conv1d(6, 7, 3, 2, 1), nn.Linear(7, 4), between=lambda z: z.mT),
        (2, 5, 8),
        lambda s, e, B: resampled(s, np.moveaxis(e, 1, -1), B),
        {},
    ),
    "signal, linear head per frame, sequence first": (
        lambda: Tiny(
            nn.Conv1d(5, 6, 3, 1, 1), nn.Conv1d(6, 7, 3, 1, 1), nn.Linear(7, 4), between=lambda z: z.permute(2, 0, 1)
        ),
        (3, 5, 8),
        lambda s, e, B: resampled(s, np.moveaxis(swap(e), 1, -1), B),
        {},
    ),
    "frames of a video, head per frame": (
        lambda: Tiny(
            nn.Conv2d(2, 3, 3),
            nn.Conv2d(3, 5, 2),
            nn.Linear(20, 4),
            before=lambda h: h,
            between=lambda z: z.reshape(2, 3, 20),
        ),
        (6, 2, 5, 5),
        lambda s, e, B: frames(s, e, B, per_sample),
        {},
    ),
    "flattened tokens": (
        lambda: Tiny(
            nn.Linear(5, 6),
            nn.Linear(6, 7),
            nn.Linear(7, 4),
            before=lambda h: h.flatten(0, 1),
            between=lambda z: z.reshape(2, 4, 7),
        ),
        (2, 4, 5),
        lambda s, e, B: frames(s, e, B, per_sample),
        {},
    ),
}


def check_model(model, shape, loops, *, passes=3):
    """In the first pass (probes) and later ones (ports), x gets what the loops say, and so does what is below."""
    for step in range(passes):
        inputs = draw(*shape, seed=step)
        model.zero_grad()
        y = model(inputs)
        e = draw(*y.shape, seed=10 + step)
        (y * e).sum().backward()  # dL/dy is e
        B = rewire.feedback(model)["layer"].numpy()
        expected = loops(tuple(model.x.shape), e.numpy(), B)
        close(model.x.grad, expected, f"x, pass {step}")
        below = model.below(inputs)
        want = torch.autograd.grad(below, model.lower.weight, torch.from_numpy(expected))[0]
        close(model.lower.weight.grad, want.numpy(), f"lower, pass {step}")


@pytest.mark.parametrize("row", MODELS)
def test_model(row):
    make, shape, loops, options = MODELS[row]
    torch.manual_seed(0)
    model = make().double()
    rewire.convert(model, **{"rule": "dfa", "scale": 0.3, **options})
    check_model(model, shape, loops)


class Biased(nn.Module):
    """Attention-like: a table of relative positions goes through an MLP of its own and is added to each sample.

    Args:
        followed: the graph shows that it is the same for all samples.
    """

    def __init__(self, table, followed=True):
        super().__init__()
        self.followed = followed
        self.register_buffer("table", table)
        self.lower, self.layer = nn.Linear(2, 6), nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def below(self, _):
        return torch.tanh(self.lower(self.table))

    def forward(self, inputs):
        self.x = self.below(inputs)
        self.x.retain_grad()
        rows = self.layer(self.x).flatten(0, -2)
        return self.head(torch.tanh(inputs + rows.mean(0) if self.followed else inputs @ (rows.T @ rows)))


def test_relative_position_bias_has_no_batch():
    torch.manual_seed(0)
    model = Biased(draw(1, 7, 7, 2)).double()
    rewire.convert(model, "dfa", scale=0.3)
    check_model(model, (3, 5), no_batch)


def test_a_table_without_the_leading_one_is_followed(recwarn):
    torch.manual_seed(0)
    model = rewire.convert(Biased(draw(7, 9, 2)).double(), "dfa", scale=0.3)
    check_model(model, (4, 5), no_batch)
    assert not [w for w in recwarn if issubclass(w.category, rewire.RewireWarning)]


def test_a_table_without_the_leading_one_is_said_once_where_it_cannot_be():
    torch.manual_seed(0)
    model = Biased(draw(7, 9, 2), followed=False).double()
    rewire.convert(model, "dfa", scale=0.3)
    with pytest.warns(rewire.RewireWarning) as said:
        check_model(model, (4, 5), no_batch)
    (only,) = said
    text = str(only.message)
    assert "'layer'" in text and "(7, 9, 6)" in text and "(4, 4)" in text and "no batch dimension" in text
    model = rewire.convert(model, DFA(layout="batch_first"), scale=0.3)
    check_model(model, (4, 5), no_batch)  # said to be so: no warning


def test_a_guess_is_said_once_by_layer_with_both_readings():
    torch.manual_seed(0)
    model = Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(1)).double()
    rewire.convert(model, "dfa", scale=0.3)
    with pytest.warns(rewire.RewireWarning) as said:
        check_model(model, (3, 3, 5), broadcast)
    (only,) = said
    text = str(only.message)
    for word in ("'layer'", "(3, 3, 6)", "(3, 4)", "batch first", "sequence first", "DFA(layout=", "layers="):
        assert word in text


def test_earlier_passes_decide_what_fits_twice():
    torch.manual_seed(0)
    model = Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(0)).double()
    rewire.convert(model, "dfa", scale=0.3)
    first = lambda s, e, B: sequence_first(s, e, B, broadcast)  # noqa: E731
    check_model(model, (7, 3, 5), first)
    check_model(model, (3, 3, 5), first)
    check_model(model, (6, 3, 5), first)


def test_a_guess_is_corrected_by_later_passes():
    torch.manual_seed(0)
    model = Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(0)).double()
    rewire.convert(model, "dfa", scale=0.3)
    with pytest.warns(rewire.RewireWarning, match="sequence first"):
        check_model(model, (3, 3, 5), broadcast)  # wrong, and said
    first = lambda s, e, B: sequence_first(s, e, B, broadcast)  # noqa: E731
    check_model(model, (7, 3, 5), first)
    check_model(model, (3, 3, 5), first)


@pytest.mark.parametrize("make", [DFA, SDFA, DRTP])
def test_layout_of_every_rule(make):
    assert make().layout is None
    assert make(layout="sequence_first").layout == "sequence_first"
    assert "sequence_first" in repr(make(layout="sequence_first"))
    assert repr(make()) == make.name
    with pytest.raises(rewire.ConversionError, match="batch_first"):
        make(layout="time_major")


def test_rules_with_a_constructor_of_their_own_need_no_layout():
    class Own(rewire.DirectRule):
        def __init__(self, factor):
            self.factor = factor

        def signal(self, error, targets, axis):
            return error * self.factor

    torch.manual_seed(0)
    model = Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)).double()
    rewire.convert(model, Own(2.0), scale=0.3)
    check_model(model, (3, 5), lambda s, e, B: per_sample(s, 2 * e, B))


def test_layout_through_use_rule():
    torch.manual_seed(0)
    model = Tiny(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4), between=lambda z: z.mean(0)).double()
    rewire.convert(model, DFA(layout="sequence_first"), scale=0.3)
    first = lambda s, e, B: sequence_first(s, e, B, broadcast)  # noqa: E731
    check_model(model, (3, 3, 5), first)
    with rewire.use_rule(model, DFA(layout="batch_first")):
        check_model(model, (3, 3, 5), broadcast)
    check_model(model, (3, 3, 5), first)


# -- real sequence models ------------------------------------------------------------------------------


class Captioner(nn.Module):
    """Embedding, recurrence, projection; nothing but PyTorch's own modules."""

    def __init__(self, batch_first, pool):
        super().__init__()
        self.lower = nn.LSTM(5, 6, batch_first=batch_first)
        self.layer, self.head = nn.Linear(6, 7), nn.Linear(7, 4)
        self.pool = pool

    def forward(self, inputs):
        self.x, _ = self.lower(inputs)
        self.x.retain_grad()
        return self.head(self.pool(torch.tanh(self.layer(self.x))))


@pytest.mark.parametrize(
    ("batch_first", "shape", "pool", "loops"),
    [
        (False, (6, 4, 5), lambda z: z[-1], lambda s, e, B: sequence_first(s, e, B, broadcast)),
        (False, (6, 4, 5), lambda z: z, per_position),
        (False, (6, 4, 5), lambda z: z.transpose(0, 1), lambda s, e, B: per_position(s, swap(e), B)),
        (True, (4, 6, 5), lambda z: z[:, -1], broadcast),
        (True, (4, 6, 5), lambda z: z, per_position),
    ],
)
def test_recurrent(batch_first, shape, pool, loops):
    torch.manual_seed(0)
    model = Captioner(batch_first, pool).double()
    rewire.convert(model, "dfa", scale=0.3)
    for step in range(2):
        y = model(draw(*shape, seed=step))
        e = draw(*y.shape, seed=5)
        (y * e).sum().backward()
        B = rewire.feedback(model)["layer"].numpy()
        close(model.x.grad, loops(tuple(model.x.shape), e.numpy(), B))


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_encoder(batch_first):
    """PyTorch's own, sequence first by default: the feed-forward layers' inputs get their sample's feedback."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), "head": nn.Linear(6, 4)}
    )
    model = model.double()
    rewire.convert(model, "dfa", scale=0.3)
    seen = {}
    feed = model["encoder"].layers[0].linear2
    feed.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), seen.update(x=args[0]))[0])
    shape = (3, 7, 6) if batch_first else (7, 3, 6)
    for step in range(2):
        y = model["head"](model["encoder"](draw(*shape, seed=step)).mean(1 if batch_first else 0))
        e = draw(*y.shape, seed=5)
        (y * e).sum().backward()
        B = rewire.feedback(model)["encoder.layers.0.linear2"].numpy()
        x_shape = tuple(seen["x"].shape)
        expected = broadcast(x_shape, e.numpy(), B) if batch_first else sequence_first(x_shape, e.numpy(), B, broadcast)
        close(seen["x"].grad, expected)


# -- no way --------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """``layer`` works on a set of 7 things that belong to no sample."""

    def __init__(self):
        super().__init__()
        self.things = nn.Parameter(torch.zeros(7, 5))
        self.lower, self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, inputs):
        table = self.layer(torch.tanh(self.lower(self.things + 1)))
        return self.head(inputs @ (table.T @ table))  # after which nobody can follow where the batch is


@pytest.mark.parametrize("scale", ["auto", 0.3])
def test_no_way_is_an_error_that_breaks_nothing(scale):
    torch.manual_seed(0)
    model = Odd().double()
    rewire.convert(model, "dfa", scale=scale)
    inputs = draw(4, 5)
    with pytest.raises(rewire.RoutingError) as problem:
        for _ in range(2):
            model(inputs).square().sum().backward()
    text = str(problem.value)
    for word in ("'layer'", "'head'", "(7, 6)", "(4, 4)", "layers={'layer': 'bp'}", "blocks="):
        assert word in text
    # ... and everything else still works
    model.zero_grad()
    with rewire.use_rule(model, "bp"):
        model(inputs).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    rewire.restore(model)
    model.zero_grad()
    model(inputs).square().sum().backward()
    for name, p in model.named_parameters():
        close(ours[name], p.grad.numpy(), name)


def test_the_ways_out_that_the_error_names_work():
    torch.manual_seed(0)
    model = Odd().double()
    inputs = draw(4, 5)
    rewire.convert(model, "dfa", scale=0.3, layers={"layer": "bp", "lower": "bp"})
    for _ in range(2):
        model(inputs).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Captions(nn.Module):
    """Images below; above them steps of a recurrent layer, flattened before the head."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)
        self.steps, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x, length):
        h = torch.tanh(self.b(torch.tanh(self.a(x)))).mean((2, 3))
        return self.head(self.steps(h[:, None].expand(-1, length, -1))[0].flatten(0, 1))


def test_errors_of_flattened_steps_reach_their_images_and_the_guess_is_said_once():
    torch.manual_seed(0)
    model = rewire.convert(Captions().double(), "dfa", scale=0.3, feedback="channel")
    seen = {}
    model.b.register_forward_pre_hook(lambda module, args: args[0].register_hook(lambda g: seen.update(b=g)) and None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (3, 4, 2, 5):
            model(draw(2, 1, 8, 8), length).square().sum().backward()
            e, B = rewire.output_error(model), rewire.feedback(model)["b"]
            for i in range(2):
                wanted = sum(e[i * length + t] for t in range(length)) / length @ B
                close(seen["b"][i], wanted[:, None, None].expand(3, 6, 6).numpy(), length)
    said = [str(w.message) for w in caught if "one sample after another" in str(w.message)]
    assert len(said) == 1 and "'b'" in said[0] and "'head'" not in said[0].split(":")[0], said


@pytest.mark.parametrize("depth", [10, 40])
def test_first_passes_look_at_each_node_once(depth, monkeypatch):
    """Where every layer may be an output layer, what lies below is not walked again from each of them."""
    looked = []
    plain = rows.puts_behind
    monkeypatch.setattr(rows, "puts_behind", lambda node: looked.append(node) or plain(node))
    for name in ("parts_below", "pours_below", "spread_below"):
        monkeypatch.setattr(rows, name, lambda *args: pytest.fail("nothing here moves rows"))
    layers = [m for _ in range(depth) for m in (nn.Linear(4, 4), nn.Tanh())]
    rewire.convert(model := nn.Sequential(*layers), "dfa", scale=0.1)
    model(torch.randn(3, 4)).sum().backward()
    assert len(looked) < 6 * depth


class Mixed(nn.Module):
    """Rows of the output are made of all images by a product, which says nothing of whose they are."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x, rows):
        h = torch.tanh(self.two(torch.tanh(self.one(x)))).mean((2, 3))
        return self.head(torch.ones(rows, len(x)) @ h)


def test_each_kind_of_guess_is_said():
    """In some passes rows are a multiple of the images, in others they are not."""
    model, x = rewire.convert(Mixed(), "dfa", scale=0.1), torch.randn(2, 2, 8, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for rows in (4, 3, 4, 3, 6):
            model(x, rows).square().sum().backward()
    guesses = [str(one.message) for one in said if "Say which it is" in str(one.message)]
    assert len(guesses) == 2
    assert "2 samples, whose errors are 2 rows each" in guesses[0] and "no batch dimension" in guesses[1]
    assert all("if it is neither, put that layer and those below it under a local rule" in guess for guess in guesses)
    for rows, says in ((4, "2 rows each"), (3, "no batch dimension")):
        found = rewire.verify(model, (x, rows), lambda out: out.square().sum())
        assert says in {layer.name: layer.note for layer in found.layers}["two"]
