"""A module treated as one unit: fed back once at its input, exact backprop inside."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewire.layers.kinds import BackwardWeight, Kind


class Block(Kind):
    """Any module. Its feature dimension is read off the convolutions inside it, if there are any."""

    title = "block"
    local = False
    whole = True

    def __init__(self, module: nn.Module) -> None:
        ranks = {len(m.kernel_size) for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)}
        self.images = {rank + 2 for rank in ranks}  # numbers of dimensions in which channels come first

    def axis(self, dims: int) -> int:
        return 1 if dims in self.images else -1

    def run(
        self,
        module: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: BackwardWeight,
    ) -> Any:
        raise TypeError("a block has no weight of its own that a local rule could replace")
