# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.ddim_move``: ``python -m benchmarks.ops.bench_ddim_move``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import OpBench, Target
from sdxl_fast import ops
from sdxl_fast.diffusion import prediction
from sdxl_fast.diffusion.schedule import alpha_sigma, alphas_cumprod
from sdxl_fast.reference import ddim_move as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

TIMESTEPS, NEXT = (499, 999, 749, 249), (249, 749, 499, -1)


def stock(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    *,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """What a distillation loop does, step by step: x0 and epsilon of every sample, then the level to move to."""
    x0 = prediction.to_x0(model_output, x_t, timesteps, alphas_cumprod, prediction_type)
    epsilon = prediction.to_epsilon(model_output, x_t, timesteps, alphas_cumprod, prediction_type)
    alpha, sigma = alpha_sigma(alphas_cumprod, next_timesteps, x_t.ndim)
    return (alpha * x0 + sigma * epsilon).to(x_t.dtype)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case: latents, predictions, the levels of a four-step student."""
    n, device = case.shape[0], generator.device
    x_t, output = (torch.randn(case.shape, generator=generator, device=device).to(dtype) for _ in range(2))
    now, then = (torch.tensor([grid[i % 4] for i in range(n)], device=device) for grid in (TIMESTEPS, NEXT))
    return {
        "x_t": x_t,
        "model_output": output,
        "alphas_cumprod": alphas_cumprod().to(device),
        "timesteps": now,
        "next_timesteps": then,
        "prediction_type": "epsilon",
    }


_ONE, _SIXTEEN, _MANY = (sdxl_cases("forward_diffusion", batch=n)[0] for n in (1, 16, 256))

BENCH = OpBench(
    subject=Subject("ddim_move", ops.ddim_move, ("x_next",), ("x_t", "model_output")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(_ONE, _SIXTEEN),
    gpu_cases=(_ONE, _SIXTEEN, _MANY),
    images=True,
    targets=tuple(Target(case.name, dtype, 2.0) for case in (_ONE, _SIXTEEN) for dtype in ("float32", "bfloat16")),
)


def test_ddim_move(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
