# SPDX-License-Identifier: Apache-2.0
"""The deterministic DDIM step between two noise levels, and its result noised anew, in plain PyTorch.

With alpha = sqrt(ab_t) and sigma = sqrt(1 - ab_t) at the first level and primes at the second (1 and 0 at index -1, the
clean latent), the step is ``x_next = alpha' x0 + sigma' epsilon``, where the model's output m is one of

    epsilon        x0 = (x_t - sigma m) / alpha        epsilon = m
    sample         x0 = m                              epsilon = (x_t - alpha m) / sigma, 0 where sigma is
    v_prediction   x0 = alpha x_t - sigma m            epsilon = alpha m + sigma x_t

All three are linear, so the op is ``x_next = a x_t + b m`` with two numbers per sample; a step from t to t has a = 1
and b = 0. They are computed in float64 and rounded once: every element of a sample shares their error, which no mean
over elements makes smaller, and one of them is a difference. An input whose coefficient is 0 is left out, whatever it
holds. The result, rounded to x_t's dtype, is what is noised: ``x_renoised = sqrt(ab_r) x_next + sqrt(1 - ab_r) noise``
with the noise of ``forward_diffusion``.
Sources: Song et al. 2021, eq. 12 (arXiv:2010.02502); Salimans & Ho 2022, section 4 and appendix D (arXiv:2202.00512);
Lin et al. 2024, eq. 3-5 and 25 (arXiv:2402.13929).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sdxl_fast.reference import forward_diffusion
from sdxl_fast.reference._common import accumulation_dtype, itemsize, wrong_variants

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

Pair = tuple[torch.Tensor, torch.Tensor]


def _level(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, acc: torch.dtype) -> Pair:
    """sqrt(ab_t) and sqrt(1 - ab_t), [N] of ``acc``; (1, 0) at index -1."""
    ab = alphas_cumprod.to(acc)[timesteps.clamp(min=0)]
    ab = torch.where(timesteps < 0, torch.ones_like(ab), ab)
    return ab.sqrt(), (1 - ab).sqrt()


def coefficients(
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
    prediction_type: str,
    acc: torch.dtype,
) -> Pair:
    """Returns a and b of ``x_next = a x_t + b m`` for each sample: [N] of ``acc``, rounded from float64."""
    alpha, sigma = _level(alphas_cumprod, timesteps, torch.float64)
    next_alpha, next_sigma = _level(alphas_cumprod, next_timesteps, torch.float64)
    if prediction_type == "epsilon":
        a = next_alpha / alpha
        b = next_sigma - a * sigma
    elif prediction_type == "sample":
        noisy = sigma > 0
        a = torch.where(noisy, next_sigma / torch.where(noisy, sigma, torch.ones_like(sigma)), torch.zeros_like(sigma))
        b = next_alpha - a * alpha
    else:
        a = next_alpha * alpha + next_sigma * sigma
        b = next_sigma * alpha - next_alpha * sigma
    stays = timesteps == next_timesteps
    return torch.where(stays, torch.ones_like(a), a).to(acc), torch.where(stays, torch.zeros_like(b), b).to(acc)


def _scaled(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """factor [N] times x [N,C,H,W] in factor's dtype, exactly 0 for a factor of 0."""
    factor = factor[:, None, None, None]
    return torch.where(factor == 0, torch.zeros((), dtype=factor.dtype, device=x.device), factor * x.to(factor.dtype))


def fwd(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
    prediction_type: str,
    renoise_timesteps: torch.Tensor | None,
    seeds: torch.Tensor | None,
    stream: int,
) -> torch.Tensor | Pair:
    """Forward, differentiable in x_t and model_output.

    Args:
        x_t: [N,C,H,W], any float dtype.
        model_output: like x_t, or of a lower dtype.
        alphas_cumprod: [T].
        timesteps: int64 [N], -1 <= t < T.
        next_timesteps: the same.
        prediction_type: one of ``PREDICTION_TYPES``.
        renoise_timesteps: int64 [N], 0 <= t < T, or None.
        seeds: int64 [N], with renoise_timesteps.
        stream: which draw of each seed.

    Returns:
        x_next like x_t; with renoise_timesteps (x_next, x_renoised).
    """
    acc = accumulation_dtype(x_t.dtype)
    a, b = coefficients(alphas_cumprod, timesteps, next_timesteps, prediction_type, acc)
    x_next = (_scaled(a, x_t) + _scaled(b, model_output)).to(x_t.dtype)
    if renoise_timesteps is None:
        return x_next
    x_renoised, _ = forward_diffusion.fwd(x_next, alphas_cumprod, renoise_timesteps, seeds, stream, None, None)
    return x_next, x_renoised


def bwd(
    output_like: torch.Tensor,
    dx_next: torch.Tensor | None,
    dx_renoised: torch.Tensor | None,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
    prediction_type: str,
    renoise_timesteps: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Backward: dx_t = a g and dmodel_output = b g with g = dx_next + sqrt(ab_r) dx_renoised; itself differentiable.

    Args:
        output_like: any tensor with the dtype of model_output.
        dx_next, dx_renoised: [N,C,H,W]; one of them may be None.
        alphas_cumprod, timesteps, next_timesteps, prediction_type, renoise_timesteps: as in ``fwd``.
        needs: which of (dx_t, dmodel_output) to compute.

    Returns:
        (dx_t, dmodel_output), None where not needed.
    """
    given = [t for t in (dx_next, dx_renoised) if t is not None]
    acc = accumulation_dtype(given[0].dtype)
    gradient = None if dx_next is None else dx_next.to(acc)
    if dx_renoised is not None and renoise_timesteps is not None:
        signal, _ = _level(alphas_cumprod, renoise_timesteps, acc)
        noised = signal[:, None, None, None] * dx_renoised.to(acc)
        gradient = noised if gradient is None else gradient + noised
    factors = coefficients(alphas_cumprod, timesteps, next_timesteps, prediction_type, acc)
    dtypes = (given[0].dtype, output_like.dtype)
    dx_t, doutput = (
        _scaled(factor, gradient).to(dtype) if need and gradient is not None else None
        for factor, dtype, need in zip(factors, dtypes, needs, strict=True)
    )
    return dx_t, doutput


def flops(shape: Sequence[int], *, backward: bool = False, renoise: bool = False) -> int:
    """Operations for x_t of ``shape``; an element of a draw costs a quarter of ten Philox rounds and a Box-Muller."""
    return math.prod(shape) * (2 + 2 * renoise if backward else 3 + 33 * renoise)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False, renoise: bool = False) -> int:
    """Least memory traffic, the model's output in x_t's dtype: two reads and a write, and a write with the noised copy.

    Backward: one read, or two, and two writes.
    """
    return math.prod(shape) * itemsize(dtype) * (3 + renoise)


def _renoises_the_input(*args: Any) -> Any:
    """Re-noises x_t instead of x_next."""
    found = fwd(*args)
    if isinstance(found, torch.Tensor):
        return found
    x_t, alphas_cumprod, again, seeds, stream = args[0], args[2], *args[6:]
    return found[0], forward_diffusion.fwd(x_t, alphas_cumprod, again, seeds, stream, None, None)[0]


def _rounds_between(x_t: torch.Tensor, output: torch.Tensor, *rest: Any) -> Any:
    """Rounds the two terms to bfloat16 before they are added, as half-precision arithmetic would."""
    zero = torch.zeros_like(x_t), torch.zeros_like(output)
    found = [fwd(x, m, *rest) for x, m in ((x_t, zero[1]), (zero[0], output))]
    first, second = (t if isinstance(t, torch.Tensor) else t[0] for t in found)
    moved = (first.bfloat16() + second.bfloat16()).to(x_t.dtype)
    return moved if isinstance(found[0], torch.Tensor) else (moved, fwd(x_t, output, *rest)[1])


def _clamped_clean(
    x_t: torch.Tensor, output: torch.Tensor, table: torch.Tensor, now: torch.Tensor, then: torch.Tensor, *rest: Any
) -> Any:
    """Takes the first real level for the clean latent."""
    return fwd(x_t, output, table, now, then.clamp(min=0), *rest)


WRONG = wrong_variants(
    fwd={
        "swapped_levels": lambda x, m, ab, now, then, *rest: fwd(x, m, ab, then, now, *rest),
        "clean_is_the_first_level": _clamped_clean,
        "rounds_between": _rounds_between,
        "renoises_the_input": _renoises_the_input,
        "stream_ignored": lambda x, m, ab, now, then, kind, again, seeds, _: fwd(
            x, m, ab, now, then, kind, again, seeds, 0
        ),
        "v_taken_for_epsilon": lambda x, m, ab, now, then, kind, *rest: fwd(
            x, m, ab, now, then, "epsilon" if kind == "v_prediction" else kind, *rest
        ),
    },
    bwd={
        "renoised_gradient_dropped": lambda like, g, h, *rest: bwd(like, g, None, *rest),
        "levels_swapped": lambda like, g, h, ab, now, then, *rest: bwd(like, g, h, ab, then, now, *rest),
    },
)
