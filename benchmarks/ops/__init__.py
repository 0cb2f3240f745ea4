# SPDX-License-Identifier: Apache-2.0
"""One benchmark per op: ``bench_<op>.py`` with its cases, its stock PyTorch peer and its targets in ``BENCH``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

# What costs a one-step picture most is measured first; the rest follows by name.
_FIRST = ("group_norm_silu", "geglu")


def benches() -> list[Any]:
    """Returns the ``OpBench`` of every op, the most valuable first."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("bench_"))
    first = [f"bench_{op}" for op in _FIRST]
    ordered = first + [name for name in names if name not in first]
    return [importlib.import_module(f"{__name__}.{name}").BENCH for name in ordered]
