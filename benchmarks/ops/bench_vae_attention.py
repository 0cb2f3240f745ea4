# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.vae_attention``: ``python -m benchmarks.ops.bench_vae_attention``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention import make, peers, sdpa
from benchmarks.gate import Subject
from benchmarks.suite import OpBench
from sdxl_fast import ops
from sdxl_fast.reference import vae_attention as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

# The embedded model's VAE, and one of a 256 px image.
SMALL, MEDIUM = Case("16x64x96", (16, 64, 96)), Case("1x1024x512", (1, 1024, 512))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    return sdpa(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), scale).squeeze(2)


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None) -> torch.Tensor:
    """PyTorch's own, as diffusers' ``AttnProcessor2_0`` calls it."""
    return _sdpa(q, k, v, scale)


BENCH = OpBench(
    subject=Subject("vae_attention", ops.vae_attention, ("out",), ("q", "k", "v")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(SMALL, MEDIUM),
    gpu_cases=(*sdxl_cases("vae_attention"), Case("1x4096x512", (1, 4096, 512))),
    gpu_rest=(Case("1x15808x512", (1, 15808, 512)), MEDIUM),
    peers=peers(_sdpa),
)


def test_vae_attention(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
