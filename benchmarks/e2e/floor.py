# SPDX-License-Identifier: Apache-2.0
"""The least time a machine needs for a picture: its matrix products at the rate measured, or reading the weights once.

Norms, gates, launches and traffic of activations are left out; an upsampling followed by a 3×3 convolution counts 4 / 9
of its products, which is what `upsample_conv2d` needs. Products are those of direct convolution: only Winograd's, which
a CPU computes in float32, and which are 4 / 9 of them, can come below this time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdxl_fast.models.config import vae_scale_factor

Work = tuple[int, int]  # multiply-adds counted twice, and parameters
_KINDS = {"convolution": "convolutions", "addmm": "products", "mm": "products"}
_FOLDED = 5 / 9  # of a 3×3 convolution's products after upsampling by two, which are not needed


def work(folder: Path, batch: int, size: tuple[int, int]) -> dict[str, Work]:
    """Returns (FLOPs, parameters) by stage for a batch of pictures of height and width ``size`` [pixels].

    The networks are made of the folder's configs on the meta device: nothing is read but those.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        texts = [
            kind(CLIPTextConfig(**_config(folder, name))).eval()
            for kind, name in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
        ]
        tokens = texts[0].config.max_position_embeddings
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        calls = {f"text {index}": (tower, functools.partial(tower, ids)) for index, tower in enumerate(texts)}
        calls |= _image_calls(_config(folder, "unet"), _config(folder, "vae"), batch, size, tokens)
        found = {}
        for name, (network, call) in calls.items():
            flops, parameters = sum(_count(call).values()), sum(p.numel() for p in network.parameters())
            stage = "text_encoders" if name.startswith("text") else name
            before = found.get(stage, (0, 0))
            found[stage] = (before[0] + flops, before[1] + parameters)
        return found


def by_kind(
    unet_config: Mapping[str, Any], vae_config: Mapping[str, Any], batch: int, size: tuple[int, int], tokens: int
) -> dict[str, dict[str, int]]:
    """Returns the FLOPs of "unet" and "vae" as "convolutions", "products" and "attention"."""
    with torch.device("meta"):
        calls = _image_calls(unet_config, vae_config, batch, size, tokens)
        return {name: _count(call) for name, (_, call) in calls.items()}


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


def _image_calls(
    unet_config: Mapping[str, Any], vae_config: Mapping[str, Any], batch: int, size: tuple[int, int], tokens: int
) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """UNet and decoder, and a call of each, on the current device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(dict(unet_config)).eval()
    vae = AutoencoderKL.from_config(dict(vae_config)).eval()
    factor = vae_scale_factor(vae.config)
    latents = torch.empty(batch, unet.config.in_channels, size[0] // factor, size[1] // factor)
    text = torch.empty(batch, tokens, unet.config.cross_attention_dim)
    pooled = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
    return {
        "unet": (unet, functools.partial(unet, latents, torch.empty(batch), text, added_cond_kwargs=added)),
        "vae": (vae.decoder, functools.partial(vae.decoder, latents[:, : vae.config.latent_channels])),
    }


@torch.no_grad()
def _count(call: Callable[[], Any]) -> dict[str, int]:
    """FLOPs by kind of work."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    counts = counter.get_flop_counts()
    found = dict.fromkeys(_KINDS.values(), 0) | {"attention": 0}
    for op, flops in counts.get("Global", {}).items():
        found[_KINDS.get(str(op).rpartition(".")[2], "attention")] += flops
    spared = sum(sum(by_op.values()) for name, by_op in counts.items() if name.endswith("upsamplers.0"))
    found["convolutions"] -= int(_FOLDED * spared)
    return found
