"""What a layer below a pour (:mod:`rewire.pours`) sees of an error: at each of its rows, what the row went to.

Rows were added up in some tensor on the way to the output, which need not have a row for each of e: all tokens, one
behind the other, where e is one for each sample. So e is first led to the rows of that tensor, as to any layer's input,
and then each row below takes its own.

Where rows of one sequence were put into another, an image's among words, the places that they have there say whose they
are, and no more: nothing is predicted at them, so that e is zero there as a rule, and what was made of the image is
looked at from all places after it. Each is handed the mean error of the sample it went to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rewire.kept import Hidden
from rewire.picks import Pick
from rewire.pours import Placed
from rewire.state import LayerState
from rewire.ways import lead_to


class Poured:
    """Makes of e what a layer sees whose rows went elsewhere.

    Attributes:
        pour: where they went.
        state: the layer.
        above: the output layer.
        shape: of the layer's input; () if that is not known.
    """

    def __init__(self, pour: Pick, state: LayerState, above: LayerState, shape: tuple[int, ...]) -> None:
        self.pour, self.state, self.above, self.shape = pour, state, above, shape

    def __call__(self, e: Tensor) -> Tensor:
        """(N, ...) -> (rows of the layer below, ...), with features where e has them."""
        try:
            pour, dims = self.pour.found(), e.dim()
        except Hidden:
            self.state.wiring.say_hidden(self.state)
            return e
        if pour is None:
            return e
        axis = self.above.kind.axis(dims) % dims
        if isinstance(pour, Placed) and len(pour.lead) > 1:
            rows = lead_to(self.state, self.above, pour.lead[:1], e)[self._samples(pour)]
        elif e.shape[: len(pour.lead)] == pour.lead and axis >= len(pour.lead):
            return pour(e)
        else:
            rows = pour(lead_to(self.state, self.above, pour.lead, e))
        if axis != dims - 1:
            return rows.reshape(*rows.shape, *(1,) * (dims - 2))
        return rows[None] if isinstance(pour, Placed) and self._packed(len(rows)) else rows

    def _samples(self, placed: Placed) -> Tensor:
        """Which sample each row was put into; or each image, if all rows of each went into one."""
        samples = placed.rows // math.prod(placed.lead[1:])
        images = self.shape[0] if self.shape else 0
        if not 0 < images < len(samples) or len(samples) % images:
            return samples
        rows = samples.reshape(images, -1)
        return rows[:, 0] if torch.equal(rows, rows[:, :1].expand_as(rows)) else samples

    def _packed(self, count: int) -> bool:
        """Whether ``count`` rows lie one behind the other, each once or k times, in what looks like one sample."""
        return len(self.shape) == 3 and self.shape[0] == 1 < count and self.shape[1] % count == 0
