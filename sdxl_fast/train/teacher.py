"""The teacher: a text-to-image model of SDXL's architecture, UNet and both text encoders trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .. import ops
from ..data.captions import LatentSet, latent_set
from ..diffusion import prediction, sampling, schedule
from ..files import replacing, replacing_folder
from ..models.conditioning import time_ids, tokenize
from ..models.config import build_text_encoders, build_unet, scheduler_arguments
from ..models.tokenizer import save_tokenizer, train_tokenizer
from ..nn import fuse
from ..random import generator, image_seeds
from .base import open_pipeline, open_vae
from .checkpoint import Average
from .config import DataConfig, TeacherConfig
from .trainer import Facts, Task, Update
from .vae import art_of, to_sheet

PREVIEW_PROMPTS = (
    "red apple sailboat tiger cactus hamburger guitar rocket butterfly "
    "unicorn_face ghost octopus sunflower strawberry bicycle airplane rainbow "
    "owl fire_engine doughnut snowman crab mushroom television crystal_ball"
).replace("red apple", "red_apple")


def preview_prompts(captions: list[str]) -> list[str]:
    """The contact sheet's prompts, two samples each: those of a fixed list that are captions, else the first ones."""
    wanted = [name.replace("_", " ") for name in PREVIEW_PROMPTS.split()]
    return [name for name in wanted if name in captions] or captions[:24]


class Conditioner(nn.Module):
    """Both text towers as one module: caption token ids to what the UNet is told."""

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module, size: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.size = size

    def forward(self, token_ids: Tensor) -> dict[str, Tensor]:
        first = self.text_encoder(token_ids, output_hidden_states=True)
        second = self.text_encoder_2(token_ids, output_hidden_states=True)
        return {
            "prompt_embeds": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            "pooled": second[0],
            "time_ids": time_ids(self.size, self.size, batch=len(token_ids), device=token_ids.device),
        }


def scaled_text(condition: dict[str, Tensor], factor: Tensor | float) -> dict[str, Tensor]:
    """A condition whose text is multiplied per sample, by 0 to leave it out; the sizes stay."""
    factor = torch.as_tensor(factor, device=condition["pooled"].device)
    return {
        **condition,
        "prompt_embeds": condition["prompt_embeds"] * factor.reshape(-1, 1, 1),
        "pooled": condition["pooled"] * factor.reshape(-1, 1),
    }


def call_unet(unet: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """The UNet's output for latents x_t [N, C, h, w], in the UNet's compute dtype.

    condition: prompt_embeds [N, L, D], pooled [N, P], and SDXL's size conditioning time_ids [N, 6].
    """
    added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    output: Tensor = unet(x_t, timesteps, condition["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]
    return output


def latents_of(data: DataConfig, path: Path, vae: Any, draws: int, seed: int) -> LatentSet:
    """The latent set of the training split on the VAE's device, made once and kept at `path`."""
    art, rows = art_of(data)
    art = art.to(vae.device)
    return latent_set(path, vae, art, rows, size=data.resolution, draws=draws, scale_range=data.scale_range, seed=seed)


class TeacherTask(Task):
    """Denoising regression with caption dropout that zeroes both embeddings."""

    def __init__(self, config: TeacherConfig, folder: Path) -> None:
        self.config, self.batch = config, config.batch
        self.device = device = config.torch_device
        self.vae = open_vae(config.vae)
        self.vae.to(device, memory_format=torch.channels_last).requires_grad_(False)
        self.data = latents_of(config.data, folder / "latents.safetensors", self.vae, config.draws, config.seed)
        size = config.data.resolution
        torch.manual_seed(config.seed)
        start = open_pipeline(config.initial, config.vae) if config.initial else None
        self.tokenizer = self._learnt_once(folder / "tokenizer") if start is None else start.tokenizer
        self.ids = tokenize(self.tokenizer, self.data.captions).to(device)
        self.unet = build_unet(config.pipeline).to(device, memory_format=torch.channels_last)
        towers = build_text_encoders(config.pipeline, self.tokenizer, self.tokenizer)
        self.conditioner = Conditioner(*towers, size).to(device)
        if start is not None:
            self.unet.load_state_dict(start.unet.state_dict())
            self.conditioner.text_encoder.load_state_dict(start.text_encoder.state_dict())
            self.conditioner.text_encoder_2.load_state_dict(start.text_encoder_2.state_dict())
        if config.fuse:
            fuse(self.unet)
        self.networks = nn.ModuleDict({"unet": self.unet, "conditioner": self.conditioner})
        self.update = Update(config.optimizer, self.networks.parameters(), config.images)
        self.average = Average(self.networks, config.ema_half_life)
        self.alphas_cumprod = schedule.alphas_cumprod().to(device)
        self.parts = {"networks": self.networks, "optimizer": self.update.optimizer, "average": self.average}

    def _learnt_once(self, place: Path) -> Any:
        """The tokenizer that lies in the run's folder; learnt when it does not.

        Merges that occur equally often come in an order that differs from process to process, and with it the ids that
        a resumed run's embeddings belong to.
        """
        if not (place / "tokenizer.json").is_file():
            config = self.config
            learnt = train_tokenizer(
                self.data.captions, vocab_size=config.vocabulary, max_tokens=config.pipeline.max_tokens
            )
            with replacing_folder(place) as writing:
                save_tokenizer(learnt, writing)
        return CLIPTokenizer.from_pretrained(place)

    def step(self, images: int) -> Facts:
        config, count = self.config, self.batch
        latents, captions = self.data.batch(count, config.data.category_share, config.seed, images, "batch")
        draw = generator(config.seed, images, "step")
        timesteps = torch.randint(schedule.NUM_TRAIN_TIMESTEPS, (count,), generator=draw).to(self.device)
        keep = (torch.rand(count, generator=draw) >= config.caption_dropout).float().to(self.device)
        latents = latents.contiguous(memory_format=torch.channels_last)
        x_t, noise = ops.forward_diffusion(
            latents,
            alphas_cumprod=self.alphas_cumprod,
            timesteps=timesteps,
            seeds=image_seeds(count, config.seed, images).to(self.device),
            stream=sampling.STREAM_TRAIN,
        )
        self.seen = {0: {"x_t": x_t, "timesteps": timesteps, "captions": captions}}
        with config.autocast():
            condition = scaled_text(self.conditioner(self.ids[captions]), keep)
            output = call_unet(self.unet, x_t, timesteps, condition)
        wanted = prediction.target(latents, noise, timesteps, self.alphas_cumprod, config.prediction_type)
        loss = F.mse_loss(output.float(), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self.update.step(images)
        self.average.update(self.networks, images + count, count)
        return {"loss": loss.item(), "grad_norm": norm}

    def _averaged(self) -> tuple[nn.Module, Conditioner]:
        unet = build_unet(self.config.pipeline)
        conditioner = Conditioner(
            *build_text_encoders(self.config.pipeline, self.tokenizer, self.tokenizer), self.config.data.resolution
        )
        self.average.copy_to(nn.ModuleDict({"unet": unet, "conditioner": conditioner}))
        return unet.to(self.device).eval(), conditioner.to(self.device).eval()

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        prompts = [prompt for prompt in preview_prompts(self.data.captions) for _ in range(2)]
        unet, conditioner = self._averaged()
        condition = conditioner(tokenize(self.tokenizer, prompts).to(self.device))
        predict = sampling.guided(
            lambda x, t, c: call_unet(unet, x, t, c),
            condition,
            scaled_text(condition, 0.0),
            self.config.preview_guidance,
        )
        start = sampling.pure_noise(self.data.shape, image_seeds(len(prompts), "preview").to(self.device))
        latents = sampling.sample(
            predict, start, schedule.trailing_timesteps(32), prediction_type=self.config.prediction_type
        )
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        with replacing(path) as writing:
            to_sheet(pictures, 12).save(writing, format="PNG")

    def export(self, folder: Path) -> None:
        unet, conditioner = self._averaged()
        save_pipeline(
            folder,
            unet,
            conditioner.text_encoder,
            conditioner.text_encoder_2,
            self.vae,
            self.tokenizer,
            self.config.prediction_type,
        )


def save_pipeline(
    folder: Path, unet: Any, text_encoder: Any, text_encoder_2: Any, vae: Any, tokenizer: Any, prediction_type: str
) -> None:
    """Writes a diffusers SDXL folder with a trailing Euler scheduler."""
    pipe: Any = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**scheduler_arguments(prediction_type)),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    for part in ("tokenizer", "tokenizer_2"):
        save_tokenizer(tokenizer, folder / part)
