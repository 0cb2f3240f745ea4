"""SDXL's noise schedule and the timestep grids that distillation walks on (SDXL-Lightning §2.1, §3.5)."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def alphas_cumprod(
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS, beta_start: float = BETA_START, beta_end: float = BETA_END
) -> Tensor:
    """ᾱ_t of the scaled-linear schedule, float32 [num_train_timesteps]; the same values as diffusers' schedulers.

    ᾱ at the last index is not 0 (0.00466 for SDXL): samplers start from pure noise nevertheless, and training replaces
    its input by the noise there (`pure_noise_at`) while every formula keeps this ᾱ (SDXL-Lightning §3.5).
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def trailing_timesteps(num_steps: int, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> list[int]:
    """The descending 0-based "trailing" grid: 1 → [999], 4 → [999, 749, 499, 249]; equals diffusers' spacing.

    Raises:
        ValueError: num_steps is not in 1..num_train_timesteps.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps is {num_steps}; allowed: 1 to {num_train_timesteps}")
    stride = num_train_timesteps / num_steps
    return [round(num_train_timesteps - k * stride) - 1 for k in range(num_steps)]


def next_timesteps(timesteps: Tensor, stride: float, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> Tensor:
    """The 0-based index `stride` training steps nearer to the picture; -1 stands for the clean latent (ᾱ = 1).

    Works in the paper's 1-based time, where t - stride is clamped at 0 (SDXL-Lightning §2.3). From a timestep of the
    trailing grid of a fractional stride (7.8125 for 128 steps) it leads to the next one of that grid.
    """
    t = timesteps.double() + 1
    on_grid = num_train_timesteps - torch.round((num_train_timesteps - t) / stride) * stride
    exact = torch.where((on_grid - t).abs() <= 0.5, on_grid, t)
    return (torch.round(exact - stride).long() - 1).clamp(min=-1)


def alpha_sigma(alphas_cumprod: Tensor, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1-ᾱ_t), broadcastable against an `ndim`-dimensional batch; index -1 gives exactly (1, 0)."""
    clean = timesteps < 0
    values = alphas_cumprod.to(timesteps.device)[timesteps.clamp(min=0)]
    values = torch.where(clean, torch.ones_like(values), values).reshape(-1, *([1] * (ndim - 1)))
    return values.sqrt(), (1.0 - values).sqrt()
