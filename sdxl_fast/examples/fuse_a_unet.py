"""Fuse the UNet of a training script: two lines more, the same loop, the same files.

python -m sdxl_fast.examples.fuse_a_unet --steps 4                    # the embedded pipeline's UNet
python -m sdxl_fast.examples.fuse_a_unet --model stabilityai/stable-diffusion-xl-base-1.0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

import sdxl_fast
from sdxl_fast.models.loading import resolve
from sdxl_fast.nn import FuseReport


def batch(unet: Any, size: int, device: str) -> dict[str, torch.Tensor]:
    """Random latents and embeddings in the place of a data set's."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    side = config.sample_size
    return {
        "latents": torch.randn(size, config.in_channels, side, side, device=device),
        "prompt_embeds": torch.randn(size, 24, config.cross_attention_dim, device=device),
        "text_embeds": torch.randn(size, pooled, device=device),
        "time_ids": torch.tensor([8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side], device=device).repeat(size, 1),
    }


def main(argv: Sequence[str] | None = None) -> FuseReport:
    """Trains a LoRA for some steps, writes it, and returns what was fused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a diffusers folder or hub id; default: the embedded pipeline")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the LoRA to this .safetensors file")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_pretrained(resolve(given.model), subfolder="unet").to(given.device)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    unet.to(memory_format=torch.channels_last)

    report = sdxl_fast.fuse(unet)  # here or before add_adapter; names, parameters and files stay what they were
    print(report)

    scheduler: Any = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
    unet.train()
    for step in range(given.steps):
        data = batch(unet, given.batch, given.device)
        noise = torch.randn_like(data["latents"])
        timesteps = torch.randint(0, 1000, (given.batch,), device=given.device)
        noisy = scheduler.add_noise(data["latents"], noise, timesteps)
        with torch.autocast(given.device, torch.bfloat16):
            predicted = unet(
                noisy,
                timesteps,
                data["prompt_embeds"],
                added_cond_kwargs={"text_embeds": data["text_embeds"], "time_ids": data["time_ids"]},
            ).sample
        loss = (predicted.float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {float(loss.detach()):.4f}")
    if given.out is not None:
        save_file({k: v.contiguous() for k, v in get_peft_model_state_dict(unet).items()}, given.out)
    sdxl_fast.restore(unet)  # only where stock classes are wanted again
    return report


if __name__ == "__main__":
    main()
