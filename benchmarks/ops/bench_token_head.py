# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.token_head``: ``python -m benchmarks.ops.bench_token_head``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gate import Subject, Values
from benchmarks.suite import OpBench
from sdxl_fast import ops
from sdxl_fast.reference import token_head as reference
from sdxl_fast.testing.cases import Case

# One feature layer of DINOv2's ViT-S at 224 px, ViT-L at 518 px, and of the feature network of the embedded recipe.
SMALL = Case("8x384x257", (8, 384, 257))
LARGE = Case("8x1024x1370", (8, 1024, 1370))
CONV = Case("16x112x64", (16, 112, 64))


def stock(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    direction: torch.Tensor,
    offset: torch.Tensor,
    *,
    num_groups: int,
    eps: float,
) -> torch.Tensor:
    """The modules up to the projection, with the condition already folded into it, which favours PyTorch."""
    y = residual + F.leaky_relu(F.group_norm(hidden, num_groups, weight, bias, eps), 0.2)
    return torch.bmm(direction[:, None], y).squeeze(1) + offset[:, None]


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case; parameters in the dtype of the maps."""
    device = generator.device
    n, channels, _ = case.shape

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return {
        "hidden": normal(*case.shape),
        "residual": normal(*case.shape),
        "weight": normal(channels),
        "bias": normal(channels),
        "direction": normal(n, channels) / channels**0.5,
        "offset": normal(n),
        "num_groups": channels // 8,
        "eps": 1e-5,
    }


def rows(case: Case) -> dict[str, int]:
    """Over how many rows the gradients of the parameters sum."""
    n, _, length = case.shape
    return {"dweight": n * length, "dbias": n * length, "ddirection": length, "doffset": length}


BENCH = OpBench(
    subject=Subject(
        "token_head",
        ops.token_head,
        ("logits",),
        ("hidden", "residual", "weight", "bias", "direction", "offset"),
    ),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(CONV, SMALL),
    gpu_cases=(SMALL, LARGE),
    gpu_rest=(CONV,),
    rows=rows,
)


def test_token_head(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
