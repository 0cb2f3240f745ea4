# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.to_uint8``: ``python -m benchmarks.ops.bench_to_uint8``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import FORWARD, OpBench, Target
from sdxl_fast import ops
from sdxl_fast.reference import to_uint8 as reference
from sdxl_fast.testing.cases import Case

CASES = tuple(Case(f"{n}x3x1024x1024", (n, 3, 1024, 1024)) for n in (1, 4))


def stock(x: torch.Tensor) -> torch.Tensor:
    """What an image processor does on the device: scale, clamp, channels last, scale, round, convert."""
    unit = (x.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit.permute(0, 2, 3, 1).contiguous() * 255).round().to(torch.uint8)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws a picture that leaves the range here and there."""
    return {"x": 0.6 * torch.randn(case.shape, generator=generator, device=generator.device).to(dtype)}


BENCH = OpBench(
    subject=Subject("to_uint8", ops.to_uint8, ("out",), ()),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=CASES[:1],
    gpu_cases=CASES,
    modes=(FORWARD,),
    images=True,
    targets=tuple(Target(CASES[0].name, dtype, 2.0) for dtype in ("float32", "bfloat16")),
)


def test_to_uint8(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
