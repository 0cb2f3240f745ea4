"""Walking from noise to a clean latent with the steps a preset asks for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..diffusion import schedule
from ..diffusion.schedule import alpha_sigma
from ..diffusion.stochastic import ancestral_move, renoise_move, trajectory_move
from ..errors import ModelError
from .presets import Preset
from .request import Noise

STREAM_STEP = 16
"""Stream of a seed for a stochastic sampler's first fresh draw; the low numbers are those of `diffusion.sampling`."""

_STOCHASTIC: dict[str, Callable[..., Tensor]] = {
    "lcm": renoise_move,
    "euler_ancestral": ancestral_move,
    "tcd": trajectory_move,
}

Predict = Callable[[Tensor, int], Tensor]
"""The UNet's output for noisy latents [N, C, h, w] at a timestep."""
OnStep = Callable[[int, int, Tensor], tuple[Tensor, bool]]
"""Called after a step with its index, its timestep and the latents in diffusers' scale: those to go on with, and
whether to stop with them."""


@dataclass(slots=True)
class Sampler:
    """A UNet and how to walk with it.

    Attributes:
        unet: UNet2DConditionModel.
        preset: which step to take, and what the UNet predicts.
        timesteps: descending 0-based grid.
        alphas_cumprod: ᾱ [T] on the UNet's device.
        levels: the same numbers on the host, so that nothing has to wait for the device to tell them.
    """

    unet: Any
    preset: Preset
    timesteps: tuple[int, ...]
    alphas_cumprod: Tensor
    levels: Sequence[float]

    def noises(self, shape: tuple[int, int, int, int], noise: Noise) -> tuple[Tensor, ...]:
        """The initial noise and what a stochastic sampler adds after every step but the last, each of `shape`."""
        dtype, device = self.unet.dtype, self.unet.device
        start = noise.initial(shape, dtype=dtype, device=device)
        # no noise is added on the last step, and all samplers are the same deterministic move there
        added = len(self.timesteps) - 1 if self.preset.sampler in _STOCHASTIC else 0
        streams = range(STREAM_STEP, STREAM_STEP + added)
        return start, *(noise.draw(shape, stream=stream, dtype=dtype, device=device) for stream in streams)

    def by_network(self, state: dict[str, Tensor]) -> Predict:
        """Predictions by a call of the UNet, with the "prompt_embeds", "add_text_embeds" and "add_time_ids" that
        `state` holds by then, one row per latent."""

        def predict(x_t: Tensor, timestep: int) -> Tensor:
            x_t = x_t.to(self.unet.dtype).contiguous(memory_format=torch.channels_last)
            added = {"text_embeds": state["add_text_embeds"], "time_ids": state["add_time_ids"]}
            output: Tensor = self.unet(
                x_t, timestep, state["prompt_embeds"], added_cond_kwargs=added, return_dict=False
            )[0]
            return output

        return predict

    def run(
        self,
        predict: Predict,
        noises: Sequence[Tensor],
        *,
        first: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Walk from noise to the clean latent.

        Args:
            predict: the UNet.
            noises: as `noises` makes them.
            first: clean latents to start from, noised to the first timestep, instead of noise alone; each serves as
                many samples as there are for it.
            on_step: may change the latents and stop.

        Returns:
            x̂0 [N, C, h, w] in float32, or float64 for a U-Net in it; the latents as they are, in diffusers' scale, if
            stopped before the end.
        """
        start, *fresh = noises
        x_t = start.to(torch.promote_types(start.dtype, torch.float32)) * self._start()
        if first is not None:
            kept = self.levels[self.timesteps[0]]
            first = first.repeat_interleave(len(x_t) // len(first), 0)
            x_t = math.sqrt(kept) * first.to(x_t.dtype) + math.sqrt(1.0 - kept) * start.to(x_t.dtype)
        end = 0 if self.preset.sampler == "tcd" else -1  # TCD stops at the lowest level, not at clean latents
        for index, (now, then) in enumerate(zip(self.timesteps, (*self.timesteps[1:], end), strict=True)):
            noise = fresh[index] if index < len(fresh) else None
            t, t_next = (torch.full((len(x_t),), level, device=x_t.device) for level in (now, then))
            x_t = self._move(x_t, predict(x_t, now), t, t_next, noise)
            if on_step is not None:
                scale = self._latents_scale(t_next)
                latents = x_t * scale
                changed, stop = on_step(index, now, latents)
                if stop:
                    return changed
                x_t = x_t if changed is latents else changed.to(x_t) / scale
        return x_t

    def _move(self, x_t: Tensor, output: Tensor, t: Tensor, t_next: Tensor, noise: Tensor | None) -> Tensor:
        preset = self.preset
        if noise is None:
            moved = ops.ddim_move(
                x_t,
                output,
                alphas_cumprod=self.alphas_cumprod,
                timesteps=t,
                next_timesteps=t_next,
                prediction_type=preset.prediction_type,
            )
            return cast(Tensor, moved)  # a pair only when noised anew
        step = _STOCHASTIC[preset.sampler]
        if preset.sampler == "tcd":
            step = functools.partial(step, eta=preset.eta)
        return step(x_t, output, t, t_next, noise, self.alphas_cumprod, preset.prediction_type)

    def _start(self) -> float:
        """What the unit noise is multiplied by: Euler samplers start at σ_T·noise, which is √(1-ᾱ_T)·noise here."""
        if not self.preset.sampler.startswith("euler"):
            return 1.0
        return math.sqrt(1.0 - self.levels[self.timesteps[0]])

    def _latents_scale(self, t: Tensor) -> Tensor:
        """Euler samplers hold their latents divided by √ᾱ; callbacks expect that."""
        alpha, _ = alpha_sigma(self.alphas_cumprod, t, 4)
        return 1.0 / alpha if self.preset.sampler.startswith("euler") else torch.ones_like(alpha)


def noise_schedule(config: Mapping[str, Any], source: Any) -> Tensor:
    """ᾱ [T] of a scheduler config; raises ModelError, naming its source, for what is none of SDXL's."""
    kind = config.get("beta_schedule", "scaled_linear")
    if kind != "scaled_linear" or config.get("rescale_betas_zero_snr") or config.get("trained_betas"):
        raise ModelError(f"{source}: its scheduler config has another noise schedule than SDXL's scaled_linear")
    if config.get("clip_sample") or config.get("thresholding"):
        raise ModelError(f"{source}: its scheduler config clips x0, which latents of SDXL must not be")
    return schedule.alphas_cumprod(
        config.get("num_train_timesteps", schedule.NUM_TRAIN_TIMESTEPS),
        config.get("beta_start", schedule.BETA_START),
        config.get("beta_end", schedule.BETA_END),
    )
