"""Random feedback: tensors that are a pure function of (seed, layer name, shape, distribution).

Numbers come from NumPy's counter-based Philox generator on the CPU and are moved afterwards, so they do
not depend on the device, the dtype, the order in which layers first run, the number of processes or
Python's string hash. Drawing them leaves PyTorch's and NumPy's global random state alone, and works
inside ``torch.func`` transforms, which forbid random PyTorch operations.

Entries are drawn in chunks of ``CHUNK`` numbers (in C order of the flattened tensor), each chunk from a
stream of its own, so that a part of a large feedback can be made again without the rest.

Every distribution has mean 0 and standard deviation 1; a scale is applied afterwards:

==============  =================================================
``normal``      N(0, 1)
``uniform``     U(-√3, √3)
``binary``      -1 or 1, equally likely
``ternary``     -a, 0 or a, equally likely, a = √(3/2)
==============  =================================================
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CHUNK = 1 << 20
Numbers = npt.NDArray[np.float32]
Fill = Callable[[np.random.Generator, Numbers], None]


def _normal(generator: np.random.Generator, out: Numbers) -> None:
    generator.standard_normal(out.size, dtype=np.float32, out=out)


def _uniform(generator: np.random.Generator, out: Numbers) -> None:
    generator.random(out.size, dtype=np.float32, out=out)
    out -= np.float32(0.5)
    out *= np.float32(2 * math.sqrt(3))


def _binary(generator: np.random.Generator, out: Numbers) -> None:
    out[:] = generator.integers(0, 2, out.size, dtype=np.int8)
    out *= np.float32(2)
    out -= np.float32(1)


def _ternary(generator: np.random.Generator, out: Numbers) -> None:
    out[:] = generator.integers(-1, 2, out.size, dtype=np.int8)
    out *= np.float32(TERNARY)


TERNARY = math.sqrt(1.5)
DISTRIBUTIONS: dict[str, Fill] = {"normal": _normal, "uniform": _uniform, "binary": _binary, "ternary": _ternary}


def streams(name: str, index: int, output: str, outputs: Sequence[str]) -> tuple[str, str]:
    """Random streams of a direct rule's B: (of one layer input, of what all layers share).

    Args:
        name: the layer's qualified name.
        index: number of the input.
        output: name of the output layer whose error is fed back.
        outputs: all of them. Each after the first has feedback of its own.
    """
    suffix = f"@{output}" if output in outputs and outputs.index(output) > 0 else ""
    return (name if index == 0 else f"{name}#{index}") + suffix, suffix


def stream_key(seed: int, name: str, shape: Sequence[int], distribution: str, draw: int, chunk: int) -> int:
    """A 128-bit key for one chunk's random stream.

    ``draw`` counts redraws of the same feedback (0 for one that is fixed).
    """
    text = f"{seed}|{name}|{tuple(int(n) for n in shape)}|{distribution}|{draw}|{chunk}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(
    seed: int, name: str, shape: Sequence[int], distribution: str, *, draw: int = 0, chunk: int = 0
) -> np.random.Generator:
    """The random stream of one chunk."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, name, shape, distribution, draw, chunk)))


def chunks(
    shape: Sequence[int],
    *,
    seed: int,
    name: str,
    distribution: str = "normal",
    draw: int = 0,
    total: int | None = None,
    out: Numbers | None = None,
    reuse: bool = False,
) -> Iterator[tuple[int, Numbers]]:
    """(start, numbers) of one chunk after the other.

    Args:
        shape: that the streams are keyed with.
        total: how many numbers; None: as many as ``shape`` holds. More of them begin with the same ones.
        out: where to put them, all of them one after the other; None: a new array for each chunk.
        reuse: one array for all chunks, written over for the next one.
    """
    total = math.prod(shape) if total is None else total
    fill = DISTRIBUTIONS[distribution]
    buffer = np.empty(min(CHUNK, total), dtype=np.float32) if reuse else None
    for chunk, start in enumerate(range(0, total, CHUNK)):
        stop = min(start + CHUNK, total)
        if out is not None:
            numbers = out[start:stop]
        elif buffer is not None:
            numbers = buffer[: stop - start]
        else:
            numbers = np.empty(stop - start, dtype=np.float32)
        fill(generator(seed, name, shape, distribution, draw=draw, chunk=chunk), numbers)
        yield start, numbers


def drawn(
    shape: Sequence[int],
    *,
    seed: int,
    name: str,
    distribution: str = "normal",
    draw: int = 0,
    total: int | None = None,
) -> Numbers:
    """All :func:`chunks`, as one array of one dimension."""
    flat = np.empty(math.prod(shape) if total is None else total, dtype=np.float32)
    for _ in chunks(shape, seed=seed, name=name, distribution=distribution, draw=draw, total=total, out=flat):
        pass
    return flat


def standard(shape: Sequence[int], *, seed: int, name: str, distribution: str = "normal", draw: int = 0) -> Tensor:
    """Independent numbers of mean 0 and standard deviation 1, of ``shape``, float32, on the CPU.

    Args:
        shape: of the tensor.
        seed: the conversion's seed.
        name: the layer's qualified name.
        distribution: one of ``DISTRIBUTIONS``.
        draw: number of the redraw, for rules whose feedback is drawn anew each pass.
    """
    return tensor(drawn(shape, seed=seed, name=name, distribution=distribution, draw=draw)).reshape(tuple(shape))


def standard_normal(shape: Sequence[int], *, seed: int, name: str, draw: int = 0) -> Tensor:
    """:func:`standard` numbers of the normal distribution."""
    return standard(shape, seed=seed, name=name, draw=draw)


_BITS = 16


@functools.cache
def _pairs() -> Tensor:
    """2^16 pairs of normal numbers: both take each of as many quantiles once.

    The second's place is the first's with its bits in reverse order (the Hammersley points): pairs cover the plane as
    evenly as that many can, so that the two are as good as independent. Their correlation is 0.001.
    """
    with torch.inference_mode(False):
        levels = 1 << _BITS
        quantiles: Tensor = torch.special.ndtri((torch.arange(levels, dtype=torch.float64) + 0.5) / levels).float()
        first = torch.arange(levels)
        second = sum(((first >> bit) & 1) << (_BITS - 1 - bit) for bit in range(_BITS))
        return torch.stack((quantiles, quantiles[second]), dim=1)


def quick_normal(
    shape: Sequence[int], *, seed: int, name: str, draw: int, scale: float, magnitude: bool = False
) -> Tensor:
    """N(0, scale²) numbers (their magnitudes, if ``magnitude``) for what is drawn anew in every pass, float32, CPU.

    Looked up in twos among 65,536 pairs by 16 random bits, at an eighth of :func:`standard_normal`'s time. The largest
    is 4.3 standard deviations from zero.
    """
    total = math.prod(shape)
    pairs = -(-total // 2)
    key = stream_key(seed, name, shape, "quick normal", draw, 0)
    bits = np.random.SFC64(key).random_raw(-(-pairs * _BITS // 64)).view(np.int16)
    with torch.inference_mode(False):
        index = torch.from_numpy(bits)[:pairs].to(torch.int32).bitwise_and_((1 << _BITS) - 1)
        table = _pairs()
        changed_first = pairs >= len(table)  # the table is scaled, not what comes out of it
        if changed_first:
            table = _as(table, scale, magnitude)
        # A pair as one number of twice the size: it is moved, never calculated with.
        found = torch.index_select(table.view(torch.float64).squeeze(1), 0, index).view(torch.float32)[:total]
        return (found if changed_first else _as(found, scale, magnitude)).reshape(tuple(shape))


def _as(numbers: Tensor, scale: float, magnitude: bool) -> Tensor:
    scaled = numbers * scale
    return scaled.abs_() if magnitude else scaled


def tensor(numbers: npt.NDArray[np.generic]) -> Tensor:
    """``numbers`` as a tensor over the same memory.

    Not an inference tensor, whatever mode the caller is in: it will be used in training later.
    """
    with torch.inference_mode(False):
        return torch.from_numpy(numbers)
