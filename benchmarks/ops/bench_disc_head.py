# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.disc_head``: ``python -m benchmarks.ops.bench_disc_head``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gate import Subject, Values
from benchmarks.suite import OpBench
from sdxl_fast import ops
from sdxl_fast.reference import disc_head as reference
from sdxl_fast.testing.cases import Case

# What the head's convolutions leave of a square picture, for a batch of training; of a wider one; the embedded model's.
BATCH = Case("8x1280x1x1", (8, 1280, 1, 1))
LARGE = Case("64x1280x1x1", (64, 1280, 1, 1))
WIDE = Case("8x1280x1x2", (8, 1280, 1, 2))
SMALL = Case("64x192x1x1", (64, 192, 1, 1))


def stock(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
    offset: torch.Tensor,
    *,
    num_groups: int,
    eps: float,
    loss: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The modules that the op stands for, and the loss of a map that is to be judged real."""
    y = F.silu(F.group_norm(x, num_groups, weight, bias, eps))
    logits = F.conv2d(y, projection[None, :, None, None], offset).flatten(1).mean(1)
    return logits, F.softplus(-logits)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case; parameters in the dtype of x."""
    device, channels = generator.device, case.shape[1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return {
        "x": normal(*case.shape),
        "weight": normal(channels),
        "bias": normal(channels),
        "projection": normal(channels) / channels**0.5,
        "offset": normal(1),
        "num_groups": math.gcd(32, channels // 4),  # no group of one channel, where a map is cut
        "eps": 1e-5,
        "loss": "non_saturating_real",
    }


def rows(case: Case) -> dict[str, int]:
    """Over how many rows the gradients of the parameters sum."""
    count = case.shape[0] * case.shape[2] * case.shape[3]
    return {f"d{name}": count for name in ("weight", "bias", "projection", "offset")}


BENCH = OpBench(
    subject=Subject("disc_head", ops.disc_head, ("logits", "losses"), ("x", "weight", "bias", "projection", "offset")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(SMALL, BATCH),
    gpu_cases=(BATCH, LARGE),
    gpu_rest=(WIDE, SMALL),
    rows=rows,
)


def test_disc_head(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
