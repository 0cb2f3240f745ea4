# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.lora_merge``: ``python -m benchmarks.ops.bench_lora_merge``.

A case is a number of modules of one shape and rank; the shapes are those of SDXL's U-Net. The bases are kept, so that
every round does the same work on the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import FORWARD, OpBench
from sdxl_fast import ops
from sdxl_fast.reference import lora_merge as reference
from sdxl_fast.testing.cases import Case


def _case(modules: int, rows: int, cols: int, rank: int) -> Case:
    return Case(f"{modules}x{rows}x{cols}-rank{rank}", (modules, rows, cols, rank))


# Projections of the attention at the lowest resolution, and a 3x3 convolution there.
CPU_CASES = (_case(4, 1280, 1280, 64), _case(1, 1280, 11520, 64))
GPU_CASES = (_case(192, 1280, 1280, 64), _case(16, 1280, 11520, 64), _case(192, 1280, 1280, 8))


def merged(**values: Any) -> torch.Tensor:
    """Merges all modules in one call into new weights."""
    weights = torch.empty_like(values["base"])
    ops.lora_merge(**_arguments(values, weights))
    return weights


def arguments(values: Values) -> Values:
    """One list entry per module, and new weights."""
    return _arguments(values, torch.empty_like(values["base"]))


def _arguments(values: Values, weights: torch.Tensor) -> Values:
    base, down, up = (values[name].unbind() for name in ("base", "down", "up"))
    return {"weights": weights.unbind(), "downs": down, "ups": up, "scales": values["scale"], "bases": base}


def stock(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Module after module, each by the one operation PyTorch has for it: half as long as a product and a sum."""
    weights = torch.empty_like(base)
    for i in range(base.shape[0]):
        torch.addmm(base[i], up[i], down[i], alpha=scale, out=weights[i])
    return weights


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws weights and factors of about the size trained ones have."""
    modules, rows, cols, rank = case.shape

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    return {
        "base": (0.02 * normal(modules, rows, cols)).to(dtype),
        "down": (0.05 * normal(modules, rank, cols)).to(dtype),
        "up": (0.05 * normal(modules, rows, rank)).to(dtype),
        "scale": 0.125,
    }


BENCH = OpBench(
    subject=Subject("lora_merge", merged, ("weights",), ()),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=CPU_CASES,
    gpu_cases=GPU_CASES,
    modes=(FORWARD,),
    captured=False,
    rows=lambda case: {"weights": case.shape[3]},
    arguments=arguments,
)


def test_lora_merge(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
