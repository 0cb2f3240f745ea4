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

OnStep = Callable[[int, int, dict[str, Tensor]], bool]


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

    def run(
        self,
        shape: tuple[int, int, int, int],
        noise: Noise,
        state: dict[str, Tensor],
        on_step: OnStep,
        *,
        first: Tensor | None = None,
    ) -> Tensor:
        """Walk from noise to the clean latent.

        Args:
            shape: [N, C, h, w] of the latents.
            noise: where the initial and any further noise comes from.
            state: "prompt_embeds", "add_text_embeds" and "add_time_ids", one row per latent.
            on_step: called after every step with its index, its timestep and `state` with "latents" added, in
                diffusers' scale; what it changes in `state` counts. True stops there.
            first: clean latents to start from, noised to the first timestep, instead of noise alone.

        Returns:
            x̂0 [N, C, h, w] in float32, or float64 for a U-Net in it; the latents as they are, in diffusers' scale, if
            stopped before the end.
        """
        start = noise.initial(shape, dtype=self.unet.dtype, device=self.unet.device)
        x_t = start.to(torch.promote_types(start.dtype, torch.float32)) * self._start()
        if first is not None:
            kept = self.levels[self.timesteps[0]]
            x_t = math.sqrt(kept) * first.to(x_t.dtype) + math.sqrt(1.0 - kept) * start.to(x_t.dtype)
        end = 0 if self.preset.sampler == "tcd" else -1  # TCD stops at the lowest level, not at clean latents
        for index, (now, then) in enumerate(zip(self.timesteps, (*self.timesteps[1:], end), strict=True)):
            t, t_next = (torch.full((shape[0],), level, device=x_t.device) for level in (now, then))
            output = self._predict(x_t, now, state)
            x_t = self._move(x_t, output, t, t_next, noise, index)
            scale = self._latents_scale(t_next)
            state["latents"] = latents = x_t * scale
            if on_step(index, now, state):
                return state["latents"]
            if state["latents"] is not latents:
                x_t = state["latents"].to(x_t) / scale
        return x_t

    def _predict(self, x_t: Tensor, timestep: int, state: dict[str, Tensor]) -> Tensor:
        dtype = self.unet.dtype
        x_t = x_t.to(dtype).contiguous(memory_format=torch.channels_last)
        added = {"text_embeds": state["add_text_embeds"], "time_ids": state["add_time_ids"]}
        output: Tensor = self.unet(x_t, timestep, state["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]
        return output

    def _move(self, x_t: Tensor, output: Tensor, t: Tensor, t_next: Tensor, noise: Noise, index: int) -> Tensor:
        preset = self.preset
        last = index == len(self.timesteps) - 1
        # on the last step no noise is added, and all samplers are the same deterministic move
        if last or preset.sampler in ("euler", "ddim"):
            moved = ops.ddim_move(
                x_t,
                output,
                alphas_cumprod=self.alphas_cumprod,
                timesteps=t,
                next_timesteps=t_next,
                prediction_type=preset.prediction_type,
            )
            return cast(Tensor, moved)  # a pair only when noised anew
        shape = (x_t.shape[0], x_t.shape[1], x_t.shape[2], x_t.shape[3])
        fresh = noise.draw(shape, stream=STREAM_STEP + index, dtype=output.dtype, device=x_t.device)
        step = _STOCHASTIC[preset.sampler]
        if preset.sampler == "tcd":
            step = functools.partial(step, eta=preset.eta)
        return step(x_t, output, t, t_next, fresh, self.alphas_cumprod, preset.prediction_type)

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
