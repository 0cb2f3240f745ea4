"""What a network's output means (SDXL-Lightning eq. 3-5); the move between two noise levels is `ops.ddim_move`.

All functions take latents [N, C, H, W] of any float dtype, `timesteps` int64 [N] (0-based; -1 is the clean latent) and
`alphas_cumprod` [T]; they compute in float32 (float64 for float64 latents) and return that dtype.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .schedule import alpha_sigma

PredictionType = Literal["epsilon", "sample", "v_prediction"]


def _prepare(x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    alpha, sigma = alpha_sigma(alphas_cumprod.to(dtype), timesteps, x_t.ndim)
    return x_t.to(dtype), alpha, sigma


def to_x0(
    model_output: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    """x̂0 from the network's output. At the last timestep an ε error is amplified 14.6 times (why one step uses x0)."""
    x_t, alpha, sigma = _prepare(x_t, timesteps, alphas_cumprod)
    output = model_output.to(x_t.dtype)
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(get_args(PredictionType))}")


def to_epsilon(
    model_output: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    """ε̂ from the network's output; at the clean latent (index -1) an x0 network's ε̂ is undefined and returned as 0."""
    if prediction_type == "epsilon":
        return model_output.to(_prepare(x_t, timesteps, alphas_cumprod)[0].dtype)
    x_t, alpha, sigma = _prepare(x_t, timesteps, alphas_cumprod)
    output = model_output.to(x_t.dtype)
    if prediction_type == "v_prediction":
        return alpha * output + sigma * x_t
    if prediction_type == "sample":
        safe = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
        return torch.where(sigma > 0, (x_t - alpha * output) / safe, torch.zeros_like(x_t))
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(get_args(PredictionType))}")


def target(
    x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What a network of this type should output for (x0, noise) at `timesteps`: the regression target of training."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        x0, alpha, sigma = _prepare(x0, timesteps, alphas_cumprod)
        return alpha * noise.to(x0.dtype) - sigma * x0
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(get_args(PredictionType))}")
