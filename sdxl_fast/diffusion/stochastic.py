"""Steps that draw fresh noise, as the samplers of LCM, DMD2, SDXL-Turbo and TCD do.

Arguments as in `ops.ddim_move`, plus `noise`, unit normal and shaped like x_t. To the clean latent (index -1) all
return x̂0, since no noise is left there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .prediction import PredictionType, to_epsilon, to_x0
from .schedule import alpha_sigma


def renoise_move(
    x_t: Tensor,
    model_output: Tensor,
    timesteps: Tensor,
    next_timesteps: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Predict x0 and noise it anew to the next level: consistency sampling (LCM, Luo et al. 2023, algorithm 3).

    The boundary weights of consistency models (c_skip, c_out at LCM's time scaling of 10) differ from (0, 1) by at most
    1.3e-7, float32's rounding, from t = 139 on, the lowest level of any grid in use, and are left out.
    """
    x0 = to_x0(model_output, x_t, timesteps, alphas_cumprod, prediction_type)
    alpha, sigma = alpha_sigma(alphas_cumprod.to(x0.dtype), next_timesteps, x_t.ndim)
    return alpha * x0 + sigma * noise.to(x0.dtype)


def ancestral_move(
    x_t: Tensor,
    model_output: Tensor,
    timesteps: Tensor,
    next_timesteps: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """One ancestral Euler step (Karras et al. 2022; SDXL-Turbo's sampler).

    With s = σ/√ᾱ, the step goes down to s_down along ε̂ and up to s' by fresh noise: s_up² = s'²(s² - s'²)/s² and
    s_down² = s'² - s_up².
    """
    x0 = to_x0(model_output, x_t, timesteps, alphas_cumprod, prediction_type)
    epsilon = to_epsilon(model_output, x_t, timesteps, alphas_cumprod, prediction_type)
    table = alphas_cumprod.to(x0.dtype)
    alpha_now, sigma_now = alpha_sigma(table, timesteps, x_t.ndim)
    alpha, sigma = alpha_sigma(table, next_timesteps, x_t.ndim)
    now, then = (sigma_now / alpha_now) ** 2, (sigma / alpha) ** 2
    up = then * (now - then) / now
    return alpha * (x0 + torch.sqrt(then - up) * epsilon + torch.sqrt(up) * noise.to(x0.dtype))


def trajectory_move(
    x_t: Tensor,
    model_output: Tensor,
    timesteps: Tensor,
    next_timesteps: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
    *,
    eta: float,
) -> Tensor:
    """One step of strategic stochastic sampling (TCD, Zheng et al. 2024, algorithm 4).

    Down along ε̂ to the level ⌊(1 - eta)·t'⌋, and from there up to t' by fresh noise, which a `next_timesteps` of 0
    has no room for.

    Args:
        eta: the paper's γ: 0 is DDIM, 1 is `renoise_move`.
    """
    x0 = to_x0(model_output, x_t, timesteps, alphas_cumprod, prediction_type)
    epsilon = to_epsilon(model_output, x_t, timesteps, alphas_cumprod, prediction_type)
    table = alphas_cumprod.to(x0.dtype)
    alpha_low, sigma_low = alpha_sigma(table, torch.floor((1.0 - eta) * next_timesteps).long(), x_t.ndim)
    alpha, _ = alpha_sigma(table, next_timesteps, x_t.ndim)
    kept = alpha / alpha_low
    return kept * (alpha_low * x0 + sigma_low * epsilon) + torch.sqrt(1.0 - kept**2) * noise.to(x0.dtype)
