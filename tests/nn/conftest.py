"""What the tests of modules share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_map_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toys go through the operations too, which on a CPU are left to larger maps."""
    monkeypatch.setattr("sdxl_fast.nn.sampling._FEW_POSITIONS", 0)
