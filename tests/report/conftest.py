"""Reports need their extra; the library and its other tests do not."""

from __future__ import annotations

import pytest

for name in ("jinja2", "scipy", "statsmodels"):
    pytest.importorskip(name)
