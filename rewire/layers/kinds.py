"""What a converted layer has to know about its operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rewire.layers.form import Form

Forward = Callable[..., Any]


class Kind:
    """One kind of layer.

    Attributes:
        title: for tables.
        local: whether local rules are possible: whether there is a weight to replace.
        parameter: name of the weight.
        exchanges: whether its forward is one operation whose weight can be exchanged (:mod:`rewire.exchange`).
        transposed: whether W is (in, out).
        part: name of the layer within its module, where a module holds several.
        whole: whether the layers inside the module are parts of it, with exact backprop among themselves.
    """

    title = "layer"
    local = True
    parameter = "weight"
    exchanges = False
    transposed = False
    part = ""
    whole = False

    def axis(self, dims: int) -> int:
        """Dimension of an input or output with ``dims`` dimensions that holds the features.

        -1: the last; 1: after the batch dimension; 0: the first, without a batch dimension.
        """
        raise NotImplementedError

    def delta_axis(self, y: Any) -> int | None:
        """Dimension of the operation's result y that holds the features; None if that is not known."""
        return self.axis(y.dim()) if isinstance(y, Tensor) else None

    def weight(self, module: nn.Module) -> Tensor:
        """W as the layer uses it: a plain Parameter or what a parametrization makes of it."""
        weight: Tensor = getattr(module, self.parameter)
        return weight

    def own(self, module: nn.Module) -> nn.Parameter | None:
        """The parameter that W is, or None where W is made of others."""
        return module._parameters.get(self.parameter)

    def look(self, module: nn.Module) -> Tensor:
        """W for looking at only: detached, and made without what parametrizations do in training.

        Spectral norm takes a step of its power iteration whenever the weight is asked for in training.
        """
        if not is_parametrized(module, self.parameter):
            return self.weight(module).detach()
        parametrizations: Any = module.parametrizations
        training = [m for m in parametrizations[self.parameter].modules() if m.training]
        for m in training:
            m.training = False
        try:
            with torch.no_grad():
                return self.weight(module)
        finally:
            for m in training:
                m.training = True

    def form(self, module: nn.Module) -> Form:
        """How the weight is read as a matrix."""
        return Form(tuple(self.look(module).shape))

    def run(
        self,
        module: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: BackwardWeight,
    ) -> Any:
        """The layer's forward, with the input gradient made by ``backward``."""
        raise NotImplementedError

    def operate(self, module: nn.Module, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward with ``weight`` in place of its own: the same operation, the same bits."""
        raise NotImplementedError


class BackwardWeight:
    """How a local rule makes B for one forward of one layer.

    Attributes:
        keep: whether :meth:`combine` reads W.
        lasting: whether the same object serves every call of the layer.
        exchange: hooks that put B where an operation keeps W (:mod:`rewire.exchange`), once made.
    """

    keep: bool
    lasting = True
    exchange: Any = None

    def random(self, weight: Tensor) -> Tensor | None:
        """R for the weight the forward uses, if it is fixed."""
        raise NotImplementedError

    def later(self, weight: Tensor) -> Callable[[], Tensor] | None:
        """What makes B when the backward asks for it, if it is neither fixed nor made of W and R.

        Args:
            weight: W as an operation keeps it, for its dtype and device.
        """
        return None

    def stand_in(self, weight: Tensor) -> Tensor:
        """What the operation is given in place of W: another tensor of the same values, or W."""
        return weight

    def note(self, weight: Tensor) -> None:
        """Told what a forward of a layer's own made of its weight."""

    def combine(self, weight: Tensor | None, random: Tensor | None) -> Tensor:
        """(W or None, R or None) -> B, called in the backward."""
        raise NotImplementedError
