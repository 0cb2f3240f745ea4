# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.linear``: ``python -m benchmarks.ops.bench_linear``."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import OpBench, Target
from sdxl_fast import ops
from sdxl_fast.reference import linear as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

_SDXL = {case.name: case for case in sdxl_cases("linear")}
# What the 60 wide blocks of the U-Net call most: the projection out of attention, and out of the feed-forward.
VALUABLE = ("1x1024x1280-to1280-residual", "1x1024x5120-to1280-residual", "1x4096x640-to640-residual")


def stock(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, residual: torch.Tensor | None
) -> torch.Tensor:
    """The layer and the addition of diffusers' transformer blocks."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case, the parameters as a fresh layer has them."""
    k, n = case.shape[-1], case.options["out_features"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    return {
        "x": draw(*case.shape).to(dtype),
        "weight": (draw(n, k) / k**0.5).to(dtype),
        "bias": draw(n).to(dtype),
        "residual": draw(*case.shape[:-1], n).to(dtype) if case.options["residual"] else None,
    }


def rows(case: Case) -> dict[str, int]:
    """Over how many rows an element sums."""
    count = math.prod(case.shape[:-1])
    return {"y": case.shape[-1], "dx": case.options["out_features"], "dweight": count, "dbias": count}


BENCH = OpBench(
    subject=Subject("linear", ops.linear, ("y",), ("x", "weight", "bias", "residual")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(_SDXL[VALUABLE[0]],),
    gpu_cases=tuple(_SDXL[name] for name in VALUABLE),
    gpu_rest=tuple(case for name, case in _SDXL.items() if name not in VALUABLE),
    rows=rows,
    cost=lambda case: {key: case.options[key] for key in ("out_features", "residual")},
    targets=tuple(Target(VALUABLE[0], dtype, 0.95, backend="library") for dtype in ("float32", "bfloat16")),
)


def test_linear(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
