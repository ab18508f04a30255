"""Random feedback: tensors that are a pure function of (seed, layer name, shape, distribution).

Numbers come from NumPy's counter-based Philox generator on the CPU and are moved afterwards, so they do
not depend on the device, the dtype, the order in which layers first run, the number of processes or
Python's string hash. Drawing them leaves PyTorch's and NumPy's global random state alone, and works
inside ``torch.func`` transforms, which forbid random PyTorch operations.

Entries are drawn in chunks of ``CHUNK`` numbers (in C order of the flattened tensor), each chunk from a
stream of its own, so that a part of a large feedback can be made again without the rest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20


def stream_key(seed: int, name: str, shape: Sequence[int], distribution: str, draw: int, chunk: int) -> int:
    """A 128-bit key for one chunk's random stream.

    ``draw`` counts redraws of the same feedback (0 for one that is fixed).
    """
    text = f"{seed}|{name}|{tuple(int(n) for n in shape)}|{distribution}|{draw}|{chunk}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def standard_normal(shape: Sequence[int], *, seed: int, name: str, draw: int = 0) -> Tensor:
    """Independent N(0, 1) numbers of ``shape``, float32, on the CPU.

    Args:
        shape: of the tensor.
        seed: the conversion's seed.
        name: the layer's qualified name.
        draw: number of the redraw, for rules whose feedback is drawn anew each pass.
    """
    total = math.prod(shape)
    flat = np.empty(total, dtype=np.float32)
    for chunk, start in enumerate(range(0, total, CHUNK)):
        stop = min(start + CHUNK, total)
        key = stream_key(seed, name, shape, "normal", draw, chunk)
        generator = np.random.Generator(np.random.Philox(key=key))
        generator.standard_normal(stop - start, dtype=np.float32, out=flat[start:stop])
    # Not an inference tensor, whatever mode the caller is in: it will be used in training later.
    with torch.inference_mode(False):
        return torch.from_numpy(flat).reshape(tuple(shape))
