"""Least squares for all columns of B at once, some entries of which may have to stay zero."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 2**24  # numbers in the systems that are solved at once


def least_squares(S: Tensor, R: Tensor, mask: Tensor | None) -> Tensor:
    """B with S B = R; of the columns of a masked B each solves those of its own equations that it has entries for.

    With S = EᵀE + a diagonal and R = EᵀG these are the normal equations of ``|E B - G|²`` under the mask: a column's k
    entries have a k x k system of their own.

    Args:
        S: (n, n), positive definite.
        R: (n, features).
        mask: (n, features) bool: where B may have entries; None: everywhere.

    Returns:
        (n, features).
    """
    if mask is None or bool(mask.all()):
        whole: Tensor = torch.linalg.solve(S, R)
        return whole
    B = torch.zeros_like(R)
    counts = mask.sum(0)
    k = int(counts.max())
    step = max(_MOST // max(k * k, 1), 1)
    for start in range(0, R.shape[1] if k else 0, step):
        columns = slice(start, start + step)
        B[:, columns] = _of_columns(S, R[:, columns], mask[:, columns], counts[columns], k)
    return B


def _of_columns(S: Tensor, R: Tensor, mask: Tensor, counts: Tensor, k: int) -> Tensor:
    """The same for columns with at most k entries."""
    column, row = mask.t().nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[column]
    rows = row.new_zeros(R.shape[1], k).index_put((column, place), row)
    there = torch.arange(k, device=row.device) < counts[:, None]
    # A column with fewer entries has equations besides that say 0 = 0.
    systems = S[rows[:, :, None], rows[:, None, :]].where(there[:, :, None] & there[:, None, :], 0)
    systems.diagonal(dim1=1, dim2=2).masked_fill_(~there, 1)
    wanted = R.t().gather(1, rows).where(there, 0)
    found = torch.linalg.solve(systems, wanted[:, :, None])[:, :, 0]
    return torch.zeros_like(R).index_put((row, column), found[column, place])
