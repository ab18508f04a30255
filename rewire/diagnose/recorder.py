"""``Recorder``: alignment every so many steps of a training loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewire.diagnose.alignment import Alignment, alignment
from rewire.errors import ConversionError


class Recorder:
    """Logs :func:`rewire.alignment` every ``every`` steps, with one line in the training loop.

    The line is best put before the step's own forward: the first record is then of the untrained model. A
    measurement is ``null`` + 3 passes: every 100 steps, with the default, a tenth more than training alone.

    Args:
        model: a converted model.
        loss_fn: from the model's output to a scalar loss; or given to :meth:`step`.
        every: steps between measurements; the first step is measured.
        inputs: to measure on; or given to :meth:`step`. The same every time makes curves smoother.
        null: as in :func:`rewire.alignment`.
        baseline: as in :func:`rewire.alignment`.

    Attributes:
        records: ``{"step", "gamma", "flags", "layers"}`` of each measurement, ready for JSON.
        steps: how many steps there have been.
        newest: the newest :class:`Alignment`, or None.

    Raises:
        ConversionError: for ``every`` or ``null`` that is no number of steps or passes.

    Example:
        >>> recorder = rewire.Recorder(model, every=100)
        >>> for x, y in loader:
        ...     recorder.step(x, lambda out: F.cross_entropy(out, y))
        ...     ...  # the training step, as ever
        >>> recorder.save("alignment.jsonl")
        >>> recorder.plot("alignment.png")
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any], Tensor] | None = None,
        every: int = 100,
        inputs: Any = None,
        *,
        null: int = 8,
        baseline: Alignment | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConversionError(f"every is how many steps lie between measurements, not {every!r}")
        self.model = model
        self.loss_fn = loss_fn
        self.every = every
        self.inputs = inputs
        self.null = null
        self.baseline = baseline
        self.records: list[dict[str, Any]] = []
        self.steps = 0
        self.newest: Alignment | None = None

    def step(self, inputs: Any = None, loss_fn: Callable[[Any], Tensor] | None = None) -> Alignment | None:
        """Count a step, and measure if it is time.

        Args:
            inputs: of this step; None: those the recorder was made with.
            loss_fn: of this step; None: the one the recorder was made with.

        Returns:
            The measurement, or None if it was not time.

        Raises:
            ConversionError: where there are no inputs, or no loss.
        """
        number = self.steps
        self.steps += 1
        if number % self.every:
            return None
        return self.measure(inputs, loss_fn, step=number)

    def measure(
        self, inputs: Any = None, loss_fn: Callable[[Any], Tensor] | None = None, *, step: int | None = None
    ) -> Alignment:
        """Measure now, at the end of training for instance; as :meth:`step` does.

        Args:
            step: number in the record; None: of steps so far.
        """
        inputs = self.inputs if inputs is None else inputs
        loss_fn = self.loss_fn if loss_fn is None else loss_fn
        if inputs is None or loss_fn is None:
            missing = "inputs" if inputs is None else "loss_fn"
            raise ConversionError(f"the recorder has no {missing}: give it to step(...), or to Recorder({missing}=...)")
        self.newest = alignment(self.model, inputs, loss_fn, null=self.null, baseline=self.baseline)
        self.records.append({"step": self.steps if step is None else step, **self.newest.record()})
        return self.newest

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the records, one JSON object a line. The file is there whole, or as it was."""
        path = Path(path)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with beside.open("w", encoding="utf-8") as file:
                for record in self.records:
                    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curves of every layer to ``path``; the ending says the format (png, pdf, svg).

        Raises:
            RewireError: if matplotlib is not installed, or nothing has been recorded.
        """
        from rewire.diagnose.plots import draw

        draw(self.records, path)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: ready for JSON."""
        return {"steps": self.steps, "records": list(self.records)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Activations are compared with those of its first record from now on.

        A conversion made anew knows only how large activations are when training is resumed.
        """
        self.steps = int(state["steps"])
        self.records = list(state["records"])
        if self.records and self.baseline is None:
            self.baseline = Alignment.from_record(self.records[0])
