# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.forward_diffusion``: ``python -m benchmarks.ops.bench_forward_diffusion``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import FORWARD, OpBench, Target
from sdxl_fast import ops
from sdxl_fast.diffusion.schedule import NUM_TRAIN_TIMESTEPS, alphas_cumprod
from sdxl_fast.reference import forward_diffusion as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

LAST = NUM_TRAIN_TIMESTEPS - 1
TIMESTEPS = (499, LAST, 749, 249)


def stock(
    x0: torch.Tensor,
    *,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    seeds: torch.Tensor | None,
    stream: int,
    noise: torch.Tensor | None,
    pure_noise_at: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a training loop on diffusers does: ``randn_like``, ``add_noise`` with its casts, pure noise at the end.

    Its noise comes from the default generator: one stream for the batch, not one seed per sample.
    """
    noise = torch.randn_like(x0) if noise is None else noise
    levels = alphas_cumprod.to(x0.dtype)[timesteps][:, None, None, None]
    x_t = levels.sqrt() * x0 + (1 - levels).sqrt() * noise
    if pure_noise_at is not None:
        x_t = torch.where((timesteps == pure_noise_at)[:, None, None, None], noise, x_t)
    return x_t, noise


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case: latents, one seed per sample, the timesteps of a few-step student."""
    n, device = case.shape[0], generator.device
    return {
        "x0": torch.randn(case.shape, generator=generator, device=device).to(dtype),
        "alphas_cumprod": alphas_cumprod().to(device),
        "timesteps": torch.tensor([TIMESTEPS[i % len(TIMESTEPS)] for i in range(n)], device=device),
        "seeds": torch.arange(n, device=device) + 1000 * generator.initial_seed(),
        "stream": 0,
        "noise": None,
        "pure_noise_at": LAST,
    }


_ONE, _SIXTEEN, _MANY = (sdxl_cases("forward_diffusion", batch=n)[0] for n in (1, 16, 256))

BENCH = OpBench(
    subject=Subject("forward_diffusion", ops.forward_diffusion, ("x_t", "noise"), ("x0",)),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(_ONE, _SIXTEEN),
    gpu_cases=(_ONE, _SIXTEEN, _MANY),
    # The backward is one product with a coefficient per sample, and data has none.
    modes=(FORWARD,),
    images=True,
    own=("noise",),
    targets=tuple(Target(case.name, dtype, 2.0) for case in (_ONE, _SIXTEEN) for dtype in ("float32", "bfloat16")),
)


def test_forward_diffusion(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
