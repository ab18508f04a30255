"""A weight as a matrix: (outputs, what an output is made of)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Form:
    """How a layer's weight is read as a matrix, one row for each output feature.

    A row holds what one output at one position is made of: the input features of a linear layer, the flattened
    kernel (in / groups x k) of a convolution.

    Attributes:
        shape: of the weight.
        turned: the weight has inputs in front: (in, out / groups, *k).
        groups: of a convolution.
    """

    shape: tuple[int, ...]
    turned: bool = False
    groups: int = 1

    @property
    def rows(self) -> int:
        """Number of output features."""
        return self.shape[1] * self.groups if self.turned else self.shape[0]

    @property
    def columns(self) -> int:
        """Number of inputs that one output is made of."""
        return math.prod(self.shape) // self.rows

    def matrix(self, weight: Tensor) -> Tensor:
        """(rows, columns), a view where that is possible."""
        if not self.turned:
            return weight.flatten(1)
        grouped = weight.reshape(self.groups, self.shape[0] // self.groups, self.shape[1], -1)
        return grouped.transpose(1, 2).reshape(self.rows, self.columns)

    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`, contiguous."""
        if not self.turned:
            return matrix.reshape(self.shape).contiguous()
        grouped = matrix.reshape(self.groups, self.shape[1], self.shape[0] // self.groups, -1)
        return grouped.transpose(1, 2).reshape(self.shape).contiguous()
