"""Where a sample starts and how it is walked to the clean latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from .. import ops
from . import schedule
from .prediction import PredictionType

# Streams of `ops.forward_diffusion`: independent draws of one seed.
STREAM_START = 0  # x_T of a sample
STREAM_TRAIN = 1  # the noise of a training input
STREAM_RENOISE = 2  # what a discriminator's inputs are noised with


def pure_noise(
    shape: tuple[int, int, int], seeds: Tensor, *, stream: int = STREAM_START, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The input at the last timestep: unit normal noise, the same function in training and in inference.

    Args:
        shape: C, H, W of one latent.
        seeds: int64 [N]; a sample's noise depends on its own seed alone, never on the batch.
        stream: which of the seed's independent draws.
        dtype: of the result.

    Returns:
        [N, C, H, W] on the seeds' device.
    """
    clean = torch.zeros((len(seeds), *shape), dtype=dtype, device=seeds.device)
    # a schedule of one level, at which there is nothing but noise: SDXL's own would have to be copied to the device
    nothing_left = torch.zeros(1, dtype=torch.float32, device=seeds.device)
    x_t, _ = ops.forward_diffusion(
        clean,
        alphas_cumprod=nothing_left,
        timesteps=torch.zeros_like(seeds),
        seeds=seeds,
        stream=stream,
        pure_noise_at=0,
    )
    return x_t


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    timesteps: Sequence[int],
    *,
    prediction_type: PredictionType,
    alphas_cumprod: Tensor | None = None,
) -> Tensor:
    """Walks `x_t` along descending `timesteps` to the clean latent by deterministic moves (DDIM = trailing Euler).

    Args:
        predict: (x_t [N, C, H, W], timesteps int64 [N]) -> model output; guidance is its own affair.
        x_t: start, at noise level `timesteps[0]`.
        timesteps: 0-based, e.g. `schedule.trailing_timesteps(4)`.
        prediction_type: what `predict` returns.
        alphas_cumprod: ᾱ [T]; None is SDXL's.

    Returns:
        x̂0 in float32 (float64 for float64 x_t).
    """
    table = (schedule.alphas_cumprod() if alphas_cumprod is None else alphas_cumprod).to(x_t.device)
    x_t = x_t if x_t.dtype == torch.float64 else x_t.float()
    for now, then in zip(timesteps, [*timesteps[1:], -1], strict=True):
        t = torch.full((x_t.shape[0],), now, dtype=torch.int64, device=x_t.device)
        output = predict(x_t, t)
        moved = ops.ddim_move(
            x_t,
            output,
            alphas_cumprod=table,
            timesteps=t,
            next_timesteps=torch.full_like(t, then),
            prediction_type=prediction_type,
        )
        x_t = cast(Tensor, moved)  # a pair only when noised anew
    return x_t


def guided(
    network: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    condition: dict[str, Tensor],
    unconditional: dict[str, Tensor],
    guidance_scale: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance as one batched call: u + scale · (c - u); a scale of 1 skips the second half."""
    if guidance_scale == 1.0:
        return lambda x_t, t: network(x_t, t, condition)
    both = {key: torch.cat([unconditional[key], condition[key]]) for key in condition}

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        without, with_text = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return without + guidance_scale * (with_text - without)

    return predict
