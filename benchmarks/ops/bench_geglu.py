# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.geglu``: ``python -m benchmarks.ops.bench_geglu``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import OpBench, Target
from sdxl_fast import ops
from sdxl_fast.reference import geglu as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

# Four pictures' worth of the deepest level's tokens.
TOKENS = Case("4096x10240", (4096, 10240))


def stock(x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    """What diffusers' ``GEGLU`` does after its projection."""
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate, approximate=approximate)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case; SDXL uses the erf form."""
    x = torch.randn(case.shape, generator=generator, device=generator.device)
    return {"x": x.to(dtype), "approximate": "none"}


BENCH = OpBench(
    subject=Subject("geglu", ops.geglu, ("y",), ("x",)),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(TOKENS,),
    gpu_cases=(
        *sdxl_cases("geglu"),
        Case("16x1024x10240", (16, 1024, 10240)),
    ),
    gpu_rest=(TOKENS,),
    targets=(Target(TOKENS.name, "float32", 1.7), Target(TOKENS.name, "bfloat16", 2.5)),
)


def test_geglu(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
