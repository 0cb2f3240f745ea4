# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.layer_norm``: ``python -m benchmarks.ops.bench_layer_norm``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import OpBench, Target
from sdxl_fast import ops
from sdxl_fast.reference import layer_norm as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

_SDXL = {case.name: case for case in sdxl_cases("layer_norm")}
UNET = ("1x4096x640", "1x1024x1280")
RESIDUAL = {
    name: dataclasses.replace(case, name=f"{name}-residual", options={**case.options, "residual": True})
    for name, case in _SDXL.items()
}


def stock(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The addition and the norm as a transformer block of diffusers does them."""
    total = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, total)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case; parameters in the dtype of x."""
    device = generator.device

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return {
        "x": normal(*case.shape),
        "weight": normal(case.shape[-1]),
        "bias": normal(case.shape[-1]),
        "eps": case.options["eps"],
        "residual": normal(*case.shape) if case.options.get("residual") else None,
    }


def rows(case: Case) -> dict[str, int]:
    """Over how many rows the gradients of the parameters sum."""
    count = math.prod(case.shape[:-1])
    return {"dweight": count, "dbias": count}


BENCH = OpBench(
    subject=Subject("layer_norm", ops.layer_norm, ("y", "sum"), ("x", "weight", "bias", "residual")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=tuple(RESIDUAL[name] for name in UNET),
    gpu_cases=(*(RESIDUAL[name] for name in UNET), *(_SDXL[name] for name in UNET)),
    gpu_rest=tuple(case for name, case in _SDXL.items() if name not in UNET),
    rows=rows,
    cost=lambda case: {"residual": case.options.get("residual", False)},
    targets=tuple(Target(RESIDUAL[name].name, dtype, 1.2) for name in UNET for dtype in ("float32", "bfloat16")),
)


def test_layer_norm(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
