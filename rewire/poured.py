"""What a layer below a pour (:mod:`rewire.pours`) sees of an error: at each of its rows, what the row went to.

Rows were added up in some tensor on the way to the output, which need not have a row for each of e: all tokens, one
behind the other, where e is one for each sample. So e is first led to the rows of that tensor, as to any layer's input,
and then each row below takes its own.
"""

from __future__ import annotations

from torch import Tensor

from rewire.picks import Pick
from rewire.state import LayerState
from rewire.ways import lead_to


class Poured:
    """Makes of e what a layer sees whose rows went elsewhere.

    Attributes:
        pour: where they went.
        state: the layer.
        above: the output layer.
    """

    def __init__(self, pour: Pick, state: LayerState, above: LayerState) -> None:
        self.pour, self.state, self.above = pour, state, above

    def __call__(self, e: Tensor) -> Tensor:
        """(N, ...) -> (rows of the layer below, ...), with features where e has them."""
        pour = self.pour
        axis = self.above.kind.axis(e.dim()) % e.dim()
        if e.shape[: len(pour.lead)] == pour.lead and axis >= len(pour.lead):
            return pour(e)
        rows = pour(lead_to(self.state, self.above, pour.lead, e))
        return rows if axis == e.dim() - 1 else rows.reshape(*rows.shape, *(1,) * (e.dim() - 2))
