"""Weights of several layers that another module puts behind one another, and multiplies by as by one.

``F.linear(x, torch.cat([q.weight, k.weight]))`` is two layers side by side, whose results lie behind one another, and
``x @ torch.cat([a.weight.t(), b.weight])`` two whose results are added, each given its part of x's features. Each is
run as a use of its own layer (:mod:`rewire.uses`). The result is the one product's all the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewire.layers.own_forward import OPERATIONS
from rewire.uses import PRODUCTS, REVERSED, Owner

_CATS = frozenset({torch.cat, torch.concat, torch.concatenate})


@dataclass(frozen=True)
class Joined:
    """Several weights as one matrix.

    Attributes:
        tensor: the matrix.
        parts: the weights, or views of them.
        dim: along which they lie.
    """

    tensor: Tensor
    parts: list[Tensor]
    dim: int


def joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, owner: Owner) -> Joined | None:
    """What ``func`` made of weights alone, if it put them behind one another.

    Args:
        owner: whose weight a tensor is, or is made of.
    """
    if func not in _CATS or result.dim() != 2:
        return None
    parts, dim = args[0] if args else kwargs["tensors"], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    owners = [owner(part) for part in parts]
    layers = {owned.state for owned in owners if owned is not None}
    return Joined(result, list(parts), dim % 2) if None not in owners and len(layers) > 1 else None


def apart(
    run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Callable[[Tensor], Joined | None],
) -> Tensor | None:
    """``func(*args, **kwargs)`` by one ``run`` for each weight; None if that cannot be done.

    Args:
        run: runs an operation on one weight.
        known: what a tensor is made of.
    """
    if func is not linear and func not in PRODUCTS and func not in REVERSED:
        return None
    leaves, spec = tree_flatten((args, kwargs))
    bound = OPERATIONS[func][0].bind(*args, **kwargs).arguments if func is linear else None
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if bound is not None:
        place, other = (next(i for i in tensors if leaves[i] is bound[name]) for name in ("weight", "input"))
        turned, mixes = False, 1
    elif len(tensors) == 2:
        place = next((i for i in tensors if known(leaves[i]) is not None), -1)
        other = tensors[tensors[0] == place]
        turned = (place < other) != (func in REVERSED)
        mixes = 1 if turned else 0
    else:
        return None
    matrix, x = leaves[place], leaves[other]
    made = known(matrix) if place >= 0 else None
    if made is None or x.dim() < 1 + turned or known(x) is not None:
        return None
    whole = made.tensor
    straight = (matrix.shape, matrix.stride()) == (whole.shape, whole.stride())
    flipped = (matrix.shape, matrix.stride()) == (whole.shape[::-1], whole.stride()[::-1])
    if not (straight or flipped) or matrix.storage_offset() != whole.storage_offset():
        return None  # some of it
    dim = made.dim if straight else 1 - made.dim
    parts = made.parts if straight else [part.t() for part in made.parts]
    sizes = [part.shape[dim] for part in parts]
    features = -2 if turned else -1
    bias = None if bound is None else bound.get("bias")

    def use(part: Tensor, x: Tensor, bias_too: Tensor | None) -> Tensor:
        filled = [bias_too if bias is not None and leaf is bias else leaf for leaf in leaves]
        filled[place], filled[other] = part, x
        y: Tensor = run(func, *tree_unflatten(filled, spec))
        return y

    if dim == mixes:
        xs = torch.split(x, sizes, features)
        y = use(parts[0], xs[0], bias)
        for part, x in zip(parts[1:], xs[1:], strict=True):
            y = y + use(part, x, None)
    else:
        biases = [None] * len(parts) if bias is None else torch.split(bias, sizes)
        y = torch.cat([use(part, x, b) for part, b in zip(parts, biases, strict=True)], features)
    with torch.no_grad():
        return y.copy_(func(*args, **kwargs))  # sums of other lengths round differently
