# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.cross_attention``: ``python -m benchmarks.ops.bench_cross_attention``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention import PEERS, make, sdpa
from benchmarks.gate import Subject
from benchmarks.suite import OpBench
from sdxl_fast import ops
from sdxl_fast.reference import cross_attention as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

# A training step of the embedded model: many short sequences of narrow heads.
SHORT = Case("64x16x6x24-keys24", (64, 16, 6, 24), {"keys": 24})
MEDIUM = Case("1x1024x4x64-keys77", (1, 1024, 4, 64), {"keys": 77})


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None) -> torch.Tensor:
    """PyTorch's own, as diffusers' ``AttnProcessor2_0`` calls it."""
    return sdpa(q, k, v, scale)


BENCH = OpBench(
    subject=Subject("cross_attention", ops.cross_attention, ("out",), ("q", "k", "v")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(SHORT, MEDIUM),
    gpu_cases=(
        *sdxl_cases("cross_attention"),
        Case("8x1024x20x64-keys77", (8, 1024, 20, 64), {"keys": 77}),
    ),
    gpu_rest=(Case("1x1024x20x64-keys231", (1, 1024, 20, 64), {"keys": 231}), SHORT),
    cost=lambda case: {"keys": case.options["keys"]},
    peers=PEERS,
)


def test_cross_attention(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
