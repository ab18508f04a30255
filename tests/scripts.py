"""Scripts that import each other as the files of one folder do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def beside(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """For a fixture: modules of ``folder`` can be imported by their names alone, and nothing of that stays."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield
    for name in set(sys.modules) - before:
        where = getattr(sys.modules[name], "__file__", None)
        if where and Path(where).parent == folder:
            del sys.modules[name]
