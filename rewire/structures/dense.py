"""Every entry of B kept: independent entries of one distribution or another, or semi-orthogonal."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rewire.feedback import TERNARY, drawn, standard, tensor
from rewire.structures.base import Feedback, Place, Shape, Structure, check_distribution, features

# Distributions with entries -a, 0 and a, and their a at standard deviation 1.
_SIGNS = {"binary": 1.0, "ternary": TERNARY}


@dataclass(frozen=True, repr=False)
class Dense(Structure):
    """``e B``, all of B kept, drawn for B's own shape.

    ==================  ==============================================================================
    ``"normal"``        entries N(0, s²)
    ``"uniform"``       entries U(-√3 s, √3 s)
    ``"binary"``        entries -s or s
    ``"ternary"``       entries -a, 0 or a, a third of them each, a = √(3/2) s
    ``"orthogonal"``    orthogonal rows (columns, if B has more rows than columns), all of one length, such
                        that the mean square of B's entries is exactly s²; uniform among all such B
    ==================  ==============================================================================

    s is the scale. ``"orthogonal"`` costs a QR decomposition of B's shape, once. With ``dtype=torch.int8``,
    binary and ternary B keep their signs in a byte each.

    Args:
        distribution: one of the above.
        per: ``"element"`` (default) or ``"channel"``.
        dtype: of the tensor kept; None: the layer's input's.
    """

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = (
        "Nøkland 2016, arXiv:1609.01596; binary: Han & Yoo 2019, ICCV workshops (LPCV), doi:10.1109/ICCVW.2019.00302"
    )

    distribution: str = "normal"
    _: KW_ONLY
    per: str = "element"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_distribution(self, self.distribution, ("orthogonal",))
        super().__post_init__()

    def _can_keep(self, dtype: object) -> bool:
        return super()._can_keep(dtype) or (dtype is torch.int8 and self.distribution in _SIGNS)

    def make(self, place: Place) -> Tensor | Feedback:
        if self.distribution == "orthogonal":
            unit = semi_orthogonal(place.shape, seed=place.seed, name=place.name)
        else:
            unit = standard(place.shape, seed=place.seed, name=place.name, distribution=self.distribution)
        if self.dtype is torch.int8:
            return Signs(unit.sign().to(device=place.device, dtype=torch.int8), _SIGNS[self.distribution], place)
        return (unit * place.scale).to(device=place.device, dtype=self.kept(place))

    @property
    def fixed(self) -> str:
        return "keeps signs, which cannot change little by little" if self.dtype is torch.int8 else ""

    def size(self, shape: Shape, itemsize: int) -> int:
        return math.prod(shape) * self.itemsize(itemsize)


class Signs(Feedback):
    """A B with entries -a, 0 and a: one byte each."""

    def __init__(self, signs: Tensor, unit: float, place: Place) -> None:
        self.signs = signs
        self.a = unit * place.scale
        self.dtype = place.dtype
        self.width = place.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.signs,)

    def of(self, *tensors: Tensor) -> Feedback:
        made = copy(self)
        (made.signs,) = tensors
        return made

    def __call__(self, rows: Tensor) -> Tensor:
        return rows @ self.signs.flatten(1).to(rows.dtype) * self.a

    def dense(self) -> Tensor:
        return self.signs.to(self.dtype) * self.a


def semi_orthogonal(shape: Shape, *, seed: int, name: str) -> Tensor:
    """(n, ...) with rows (n ≤ columns) or columns (n > columns) orthogonal and of one length, mean square 1.

    Q of a QR decomposition of normal numbers, in float64; with the signs of R's diagonal it is distributed
    uniformly. Returns float32.
    """
    n, columns = shape[0], features(shape)
    tall = (columns, n) if n <= columns else (n, columns)
    numbers = drawn(tall, seed=seed, name=f"{name}|orthogonal").astype(np.float64).reshape(tall)
    q, r = np.linalg.qr(numbers)
    q *= np.where(np.diagonal(r) < 0, -1.0, 1.0) * math.sqrt(tall[0])
    return tensor(np.ascontiguousarray(q.T if n <= columns else q, dtype=np.float32)).reshape(shape)
