# SPDX-License-Identifier: Apache-2.0
"""Pictures of a student by the sampler of its method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.claims.variants import Sampler
from sdxl_fast.diffusion import sampling, schedule
from sdxl_fast.diffusion.prediction import PredictionType
from sdxl_fast.diffusion.stochastic import ancestral_move, renoise_move
from sdxl_fast.eval.dataset import Questions
from sdxl_fast.eval.features import Extractor
from sdxl_fast.eval.report import BATCH
from sdxl_fast.eval.sources import decode
from sdxl_fast.files import replacing
from sdxl_fast.models.conditioning import encode_prompts, time_ids
from sdxl_fast.models.config import vae_scale_factor
from sdxl_fast.random import derive_seed
from sdxl_fast.train.teacher import call_unet

STOCHASTIC: dict[Sampler, Callable[..., Tensor]] = {"ancestral": ancestral_move, "consistency": renoise_move}


@dataclass
class Drawer:
    """Draws float [N, 3, H, W] in 0..1 of prompts and seeds; the same seed is the same noise for every student.

    Attributes:
        pipe: diffusers' SDXL pipeline, of which the scheduler is not used.
        prediction_type: of its UNet.
        steps: trailing.
        sampler: deterministic moves, or one that draws fresh noise between them.
        guidance: 1 is none; deterministic moves only.
    """

    pipe: Any
    prediction_type: PredictionType
    steps: int
    sampler: Sampler = "ddim"
    guidance: float = 1.0

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        pipe = self.pipe
        embeds, pooled = encode_prompts(
            prompts, (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2)
        )
        side = pipe.unet.config.sample_size * vae_scale_factor(pipe.vae.config)
        ids = time_ids(side, side, batch=len(prompts), device=embeds.device)
        condition = {"prompt_embeds": embeds, "pooled": pooled, "time_ids": ids}
        nothing = {**condition, "prompt_embeds": 0 * embeds, "pooled": 0 * pooled}
        predict = sampling.guided(
            lambda x, t, text: call_unet(pipe.unet, x, t, text), condition, nothing, self.guidance
        )
        grid, start = schedule.trailing_timesteps(self.steps), self._noise(seeds)
        if self.sampler == "ddim":
            return decode(pipe.vae, sampling.sample(predict, start, grid, prediction_type=self.prediction_type))
        return decode(pipe.vae, self._stochastic(predict, start, grid, seeds))

    def _noise(self, seeds: Sequence[int], *key: int) -> Tensor:
        config = self.pipe.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        own = [derive_seed(seed, *key) for seed in seeds] if key else list(seeds)
        return sampling.pure_noise(shape, torch.tensor(own, dtype=torch.int64, device=self.pipe.device))

    def _stochastic(
        self, predict: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, grid: Sequence[int], seeds: Sequence[int]
    ) -> Tensor:
        move, table = STOCHASTIC[self.sampler], schedule.alphas_cumprod().to(x_t.device)
        for now, then in zip(grid, [*grid[1:], -1], strict=True):
            t = torch.full((len(x_t),), now, device=x_t.device)
            output = predict(x_t, t)
            x_t = move(x_t, output, t, torch.full_like(t, then), self._noise(seeds, now), table, self.prediction_type)
        return x_t


def draw_all(draw: Drawer, questions: Questions) -> Tensor:
    """Pictures of all questions, in batches, on the CPU."""
    starts: Sequence[int] = range(0, len(questions.prompts), BATCH)
    parts = [draw(questions.prompts[at : at + BATCH], questions.seeds[at : at + BATCH]).cpu() for at in starts]
    return torch.cat(parts).clamp(0.0, 1.0)


def keep(path: Path, pictures: Tensor) -> None:
    """Writes pictures of 0..1 as bytes."""
    with replacing(path) as writing:
        save_file({"pictures": (255.0 * pictures).round().byte().contiguous()}, writing)


def kept(path: Path) -> Tensor:
    """Reads what `keep` wrote."""
    return load_file(path)["pictures"].float() / 255.0


def reconstruct(vae: Any) -> Callable[[Tensor], Tensor]:
    """Pictures in 0..1 to the VAE's, by the mode of its posterior."""

    @torch.no_grad()
    def through(images: Tensor) -> Tensor:
        latents = vae.encode(2.0 * images.to(vae.device) - 1.0).latent_dist.mode()
        return decode(vae, vae.config.scaling_factor * latents)

    return through


class Remembering:
    """A function of pictures that is asked for the same ones once: every row is measured beside the same real ones."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function, self._seen = function, dict[str, Tensor]()

    def __call__(self, images: Tensor) -> Tensor:
        key = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
        if key not in self._seen:
            self._seen[key] = self._function(images)
        return self._seen[key]


class RememberingExtractor(Remembering):
    """The same of a feature network."""

    def __init__(self, extract: Extractor) -> None:
        super().__init__(extract)
        self.provenance = extract.provenance
