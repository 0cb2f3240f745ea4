# SPDX-License-Identifier: Apache-2.0
"""The least time a machine needs for a picture: its matrix products at the rate measured, or reading the weights once.

Norms, gates, launches and traffic of activations are left out, so nothing reaches it; an upsampling followed by a 3×3
convolution counts 4 / 9 of its products, which is what `upsample_conv2d` needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdxl_fast.models.config import vae_scale_factor

Work = tuple[int, int]  # multiply-adds counted twice, and parameters
_FOLDED = 5 / 9  # of a 3×3 convolution's products after upsampling by two, which are not needed


def work(folder: Path, batch: int, size: tuple[int, int]) -> dict[str, Work]:
    """Returns (FLOPs, parameters) by stage for a batch of pictures of height and width ``size`` [pixels].

    The networks are made of the folder's configs on the meta device: nothing is read but those.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_config(folder, "unet")).eval()
        vae = AutoencoderKL.from_config(_config(folder, "vae")).eval()
        texts = [
            kind(CLIPTextConfig(**_config(folder, name))).eval()
            for kind, name in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
        ]
        tokens = texts[0].config.max_position_embeddings
        factor = vae_scale_factor(vae.config)
        latents = torch.empty(batch, unet.config.in_channels, size[0] // factor, size[1] // factor)
        text = torch.empty(batch, tokens, unet.config.cross_attention_dim)
        pooled = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        time = torch.empty(batch)
        encoders = [_count(tower, lambda tower=tower: tower(ids)) for tower in texts]  # type: ignore[misc]
        return {
            "text_encoders": (sum(flops for flops, _ in encoders), sum(size for _, size in encoders)),
            "unet": _count(unet, lambda: unet(latents, time, text, added_cond_kwargs=added)),
            "vae": _count(vae.decoder, lambda: vae.decoder(latents[:, : vae.config.latent_channels])),
        }


def seconds(needed: Mapping[str, Work], dtype: str, ceilings: Mapping[str, Any]) -> dict[str, float]:
    """Returns the floor of each stage and their sum as "total"; empty where the dtype's matrix rate is unknown."""
    rate, copy = ceilings["matrix_flops_per_s"].get(dtype), ceilings["copy_bytes_per_s"]
    if not rate:
        return {}
    size = getattr(torch, dtype).itemsize
    found = {stage: max(flops / rate, parameters * size / copy) for stage, (flops, parameters) in needed.items()}
    return {**found, "total": sum(found.values())}


def _config(folder: Path, network: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / network / "config.json").read_text())
    return found


@torch.no_grad()
def _count(network: nn.Module, call: Callable[[], Any]) -> Work:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    parts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    spared = _FOLDED * sum(flops for name, flops in parts.items() if name.endswith("upsamplers.0"))
    return int(counter.get_total_flops() - spared), sum(p.numel() for p in network.parameters())
