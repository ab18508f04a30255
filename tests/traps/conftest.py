"""What is true of rows is true under activation checkpointing too, which hides an index from the forward."""

import pytest

from . import checks

_ROWS = ("flow", "parts", "pours", "spread")


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.endswith(tuple(f".test_{name}" for name in _ROWS)):
        metafunc.parametrize("block", list(checks.BLOCKS), indirect=True)


@pytest.fixture(autouse=True)
def block(request, monkeypatch):
    """In which block the passes of ``one_pass`` and ``check`` run."""
    monkeypatch.setattr(checks, "block", getattr(request, "param", ""))
