"""Latents and captions of the training split: what the teacher and every distillation stage draw their batches from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from ..random import generator
from .render import render


@dataclass(frozen=True, slots=True)
class LatentSet:
    """Latents of many random drawings per name, and the captions that under-determine them.

    latents: [names, draws, C, h, w]; captions: the names, then the categories; category_of: [names] -> caption index.
    """

    latents: Tensor
    captions: list[str]
    category_of: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, h, w of one latent."""
        channels, height, width = self.latents.shape[2:]
        return channels, height, width

    def batch(self, count: int, category_share: float, *key: int | str) -> tuple[Tensor, Tensor]:
        """A batch that is a function of `key`: latents float32 [count, C, h, w] and caption indices [count]."""
        draw = generator(*key)
        names, draws = self.latents.shape[:2]
        device = self.latents.device
        name = torch.randint(names, (count,), generator=draw).to(device)
        which = torch.randint(draws, (count,), generator=draw).to(device)
        by_category = (torch.rand(count, generator=draw) < category_share).to(device)
        return self.latents[name, which].float(), torch.where(by_category, self.category_of[name], name)


def encoder_digest(vae: Any) -> str:
    """SHA-256 of what makes the VAE's latents as the UNet sees them; decoders may differ."""
    digest = hashlib.sha256(repr(vae.config.scaling_factor).encode())
    for part in (vae.encoder, vae.quant_conv):
        for name, value in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def draw_latents(
    vae: Any, art: Tensor, size: int, draws: int, scale_range: tuple[float, float], *key: int | str
) -> Tensor:
    """Encodes `draws` random drawings of each cut-out: bfloat16 [N, draws, C, h, w], scaled as the UNet sees them."""
    rows = []
    for index, cutout in enumerate(art):
        cutouts = cutout.expand(draws, -1, -1, -1)
        pictures = render(cutouts, size, generator(*key, index), scale_range=scale_range)
        with torch.autocast(art.device.type, torch.bfloat16):
            latents = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        rows.append((latents * vae.config.scaling_factor).to(torch.bfloat16))
    return torch.stack(rows).contiguous()


def latent_set(
    path: Path,
    vae: Any,
    art: Tensor,
    rows: list[dict[str, str]],
    *,
    size: int,
    draws: int,
    scale_range: tuple[float, float],
    seed: int,
) -> LatentSet:
    """The latent set, read from `path` (safetensors) when it is there and was made with these settings, else made."""
    names = [row["name"] for row in rows]
    categories = sorted({row["category"] for row in rows})
    settings = {
        "size": str(size),
        "draws": str(draws),
        "scale": str(scale_range),
        "seed": str(seed),
        "names": "\n".join(names),
        "encoder": encoder_digest(vae),
    }
    latents = None
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata() == settings:
                latents = file.get_tensor("latents").to(art.device)
    if latents is None:
        latents = draw_latents(vae, art, size, draws, scale_range, seed, "draws")
        with replacing(path) as writing:
            save_file({"latents": latents}, writing, metadata=settings)
    index_of = {category: len(names) + index for index, category in enumerate(categories)}
    category_of = torch.tensor([index_of[row["category"]] for row in rows], device=art.device)
    return LatentSet(latents, names + categories, category_of)
