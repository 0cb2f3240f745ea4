# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.self_attention``: ``python -m benchmarks.ops.bench_self_attention``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention import PEERS, make, sdpa
from benchmarks.gate import Subject
from benchmarks.suite import OpBench
from sdxl_fast import ops
from sdxl_fast.reference import self_attention as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

# The tokens of a training step of the embedded model: many short sequences of narrow heads.
SHORT = Case("64x16x6x24", (64, 16, 6, 24))
MEDIUM = Case("1x1024x4x64", (1, 1024, 4, 64))


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None) -> torch.Tensor:
    """PyTorch's own, as diffusers' ``AttnProcessor2_0`` calls it."""
    return sdpa(q, k, v, scale)


BENCH = OpBench(
    subject=Subject("self_attention", ops.self_attention, ("out",), ("q", "k", "v")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(SHORT, MEDIUM),
    gpu_cases=(
        *sdxl_cases("self_attention"),
        Case("1x988x20x64", (1, 988, 20, 64)),
        Case("8x1024x20x64", (8, 1024, 20, 64)),
        Case("1x16384x10x64", (1, 16384, 10, 64)),
    ),
    gpu_rest=(Case("1x3952x10x64", (1, 3952, 10, 64)), Case("1x256x20x64", (1, 256, 20, 64)), SHORT),
    peers=PEERS,
)


def test_self_attention(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
