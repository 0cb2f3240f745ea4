# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.linear_geglu``: ``python -m benchmarks.ops.bench_linear_geglu``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.gate import Subject, Values
from benchmarks.suite import OpBench, Target
from sdxl_fast import ops
from sdxl_fast.reference import linear_geglu as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

_SDXL = {case.name: case for case in sdxl_cases("linear_geglu")}
WIDE, FINE = "1x1024x1280-to5120", "1x4096x640-to2560"


def stock(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, approximate: str) -> torch.Tensor:
    """diffusers' ``GEGLU``; with a backward checkpointed, as the op keeps no projection either.

    Who has the memory for it takes ``geglu`` of a linear layer, which ``bench_geglu`` times.
    """
    if not x.requires_grad:
        return _gated(x, weight, bias, approximate)
    found: torch.Tensor = checkpoint(_gated, x, weight, bias, approximate, use_reentrant=False)
    return found


def _gated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    value, gate = torch.nn.functional.linear(x, weight, bias).chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate, approximate=approximate)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case, the parameters as a fresh layer has them."""
    k, n = case.shape[-1], 2 * case.options["out_features"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    return {
        "x": draw(*case.shape).to(dtype),
        "weight": (draw(n, k) / k**0.5).to(dtype),
        "bias": draw(n).to(dtype),
        "approximate": "none",
    }


def rows(case: Case) -> dict[str, int]:
    """Over how many rows an element sums."""
    count = math.prod(case.shape[:-1])
    return {"y": case.shape[-1], "dx": 2 * case.options["out_features"], "dweight": count, "dbias": count}


BENCH = OpBench(
    subject=Subject("linear_geglu", ops.linear_geglu, ("y",), ("x", "weight", "bias")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(_SDXL[FINE],),
    gpu_cases=(_SDXL[WIDE], _SDXL[FINE]),
    rows=rows,
    cost=lambda case: {"out_features": case.options["out_features"]},
    targets=(Target(FINE, "float32", 1.0, backend="library"), Target(FINE, "bfloat16", 1.0, backend="library")),
)


def test_linear_geglu(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
