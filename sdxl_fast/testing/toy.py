"""A tiny SDXL pipeline with random weights on disk, for tests: same structure as the embedded one, made in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.config import TOY, PipelineConfig, build_text_encoders, build_unet, build_vae, scheduler_arguments
from ..models.lora import lora_file_name, target_modules, write_lora
from ..models.tokenizer import save_tokenizer, train_tokenizer

CAPTIONS = (
    "red apple",
    "green apple, fruit",
    "sailboat",
    "a house with a garden",
    "grinning face with big eyes",
    "cat",
    "guitar, music",
    "sun behind cloud",
)


def toy_pipeline(
    path: str | Path,
    seed: int = 0,
    *,
    config: PipelineConfig = TOY,
    prediction_type: str = "sample",
    few_steps: tuple[int, ...] = (2, 4, 8),
    lora_rank: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a diffusers SDXL folder with random weights and return its path.

    The folder has the embedded pipeline's structure: text encoders, tokenizers, VAE, a UNet that predicts
    `prediction_type`, and a trailing Euler scheduler config that says so; with `few_steps`, a base UNet (ε-prediction)
    under `unet_base` and one LoRA file per step count. The same arguments give the same files.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(CAPTIONS, vocab_size=560, max_tokens=config.max_tokens)
        text_encoder, text_encoder_2 = build_text_encoders(config, tokenizer, tokenizer)
        unet, vae, base = build_unet(config), build_vae(config), build_unet(config)
        _enliven(unet, vae, base)
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
        for network in (vae, text_encoder, text_encoder_2, unet, base):
            network.to(dtype)
        pipe.save_pretrained(path, safe_serialization=True)
        for name in ("tokenizer", "tokenizer_2"):
            save_tokenizer(tokenizer, path / name)
        if few_steps:
            base.save_pretrained(path / "unet_base", safe_serialization=True)
        for steps in few_steps:
            write_lora(
                path / lora_file_name("toy", steps),
                random_lora(base, rank=lora_rank, dtype=dtype),
                alpha=float(lora_rank),
                num_inference_steps=steps,
                prediction_type="epsilon",
            )
    return path


def random_lora(unet: nn.Module, *, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """(down, up) pairs for every target module of `unet`, large enough to change its pictures visibly."""
    pairs = {}
    for name in target_modules(unet):
        weight: Any = unet.get_submodule(name).weight
        down = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
        up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:])) * (0.1 / rank**0.5)
        pairs[name] = (down.to(dtype), up.to(dtype))
    return pairs


@torch.no_grad()
def _enliven(unet: nn.Module, vae: nn.Module, base: nn.Module) -> None:
    """Scale outputs so that pictures have contrast: on the grey of plain random weights every comparison would pass."""
    for network in (unet, base):
        network.conv_out.weight.mul_(1.5)  # type: ignore[operator, union-attr]
    vae.decoder.conv_out.weight.mul_(2.0)  # type: ignore[operator, union-attr]
