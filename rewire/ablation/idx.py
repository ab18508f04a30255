"""Reading IDX files, the format of MNIST and its relatives, gzipped or plain."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .inputs import InputError

_UINT8 = 0x08  # the only element type the MNIST family uses


def read(path: Path, dims: int) -> npt.NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes with ``dims`` dimensions.

    Layout: two zero bytes, the element type, the number of dimensions, each size as a big-endian
    32-bit integer, then the elements.

    Raises:
        InputError: the file cannot be read, is not IDX, or is shorter or longer than its header says.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error

    if raw[:4] != bytes((0, 0, _UINT8, dims)):
        raise InputError(f"{path} is not an IDX file of {dims}-dimensional bytes (starts {raw[:4].hex() or 'empty'})")
    start = 4 + 4 * dims
    if len(raw) < start:
        raise InputError(f"{path} ends inside its header")
    shape = struct.unpack(f">{dims}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        sizes = "×".join(map(str, shape))
        raise InputError(f"{path} says {sizes} but holds {len(raw) - start} bytes of data")
    # A copy, because an array over `raw` is read-only and torch warns about those.
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def find(folder: Path, name: str) -> Path:
    """The file ``name`` or ``name.gz`` in ``folder``.

    Raises:
        InputError: neither is there.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"no {name} or {name}.gz in {folder}")
