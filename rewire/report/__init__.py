"""What came out of ``rewire ablate``, to read and to pass on: one HTML page, Markdown or CSV.

:mod:`.runs` reads folders, :mod:`.table` groups cells into rows, :mod:`.compare` tests them against a baseline,
:mod:`.curves`, :mod:`.heat` and :mod:`.flags` prepare what is drawn, :mod:`.words` says how it is put,
:mod:`.page` and :mod:`.text` lay it out, :mod:`.write` makes the file.
"""

from .write import FORMATS, render, write

__all__ = ["FORMATS", "render", "write"]
