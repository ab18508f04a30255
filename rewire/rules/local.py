"""Local rules: the layer's own output gradient travels back through something other than W."""

from __future__ import annotations

import torch
from torch import Tensor

from rewire.rules.base import LocalRule, register_rule


@register_rule("fa")
class FA(LocalRule):
    """Feedback alignment: ``B^T delta`` with B = R, random and fixed."""

    source = "Lillicrap et al. 2016, arXiv:1411.0247"
    uses_weight = False

    def backward_weight(self, weight: Tensor | None, random: Tensor | None, scale: float) -> Tensor:
        assert random is not None
        return random


@register_rule("usf")
class USF(LocalRule):
    """Uniform sign-concordant feedback: ``s sign(W)^T delta``."""

    source = "Liao et al. 2016, arXiv:1510.05067; Xiao et al. 2018, arXiv:1811.03567"
    random = False

    def backward_weight(self, weight: Tensor | None, random: Tensor | None, scale: float) -> Tensor:
        assert weight is not None
        return torch.sign(weight) * scale


class _RandomMagnitude(LocalRule):
    """``(|R| * sign(W))^T delta``: the weight's signs, random magnitudes."""

    source = "Moskovitz et al. 2018, arXiv:1812.06488"
    magnitude = True

    def backward_weight(self, weight: Tensor | None, random: Tensor | None, scale: float) -> Tensor:
        assert weight is not None and random is not None
        return torch.sign(weight).mul_(random)


@register_rule("brsf")
class BRSF(_RandomMagnitude):
    """Batch-wise random magnitude sign-concordant feedback: R is drawn anew for every pass."""

    redraw = True


@register_rule("frsf")
class FRSF(_RandomMagnitude):
    """Fixed random magnitude sign-concordant feedback: R is drawn once."""
