"""Pictures to latents and captions to embeddings, by a pipeline's own VAE and text encoders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import ModelError
from ..models.conditioning import encode_prompts, truncated
from ..models.config import SDXL, vae_scale_factor
from ..models.loading import load, resolve

ENCODERS = ("text_encoder", "text_encoder_2", "vae")


def facts_of(model: str | Path | None) -> tuple[int, int]:
    """Native side of the model's pictures and what both sides must be multiples of, in pixels.

    The multiple is the VAE's factor times the UNet's, so that no level of the UNet has to round. A single file says
    nothing of itself and is taken for SDXL.
    """
    path = resolve(model)
    if not path.is_dir():
        return SDXL.image_size, SDXL.vae.factor * 2 ** (len(SDXL.unet.channels) - 1)
    try:
        unet, vae = (json.loads((path / name / "config.json").read_text()) for name in ("unet", "vae"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a diffusers pipeline folder ({error})") from None
    factor = vae_scale_factor(vae)
    return unet["sample_size"] * factor, factor * 2 ** (len(unet["block_out_channels"]) - 1)


class Encoders:
    """The frozen encoders of a pipeline, weights in float32.

    Args:
        model: folder, hub id or single file; None is the embedded pipeline.
        device: where to compute.
        precision: "fp32", or "bf16" for autocast. Never float16: SDXL's published VAE overflows in it.

    Raises:
        ModelError: see `models.loading.load`.
    """

    def __init__(self, model: str | Path | None, *, device: torch.device | str, precision: str) -> None:
        parts = load(resolve(model), dtype=torch.float32, device=device, networks=ENCODERS)
        self.device = torch.device(device)
        self.vae: Any = parts.vae.to(memory_format=torch.channels_last)
        self.tokenizers = (parts.tokenizer, parts.tokenizer_2)
        self.text_encoders: tuple[nn.Module, nn.Module] = (parts.text_encoder, parts.text_encoder_2)
        self.precision = precision

    def digest(self) -> str:
        """32 hex digits that depend on every weight and on the VAE's scaling."""
        digest = hashlib.blake2b(repr(self.vae.config.scaling_factor).encode(), digest_size=16)
        for network in (self.vae.encoder, self.vae.quant_conv, *self.text_encoders):
            if network is None:
                continue
            for name, value in sorted(network.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _autocast(self, enabled: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The mode of the VAE's distribution, scaled as the UNet sees it.

        What bfloat16 does not represent is computed again in float32; what is not finite then stays so.

        Args:
            pictures: RGB, all of one size.

        Returns:
            float16 [N, C, h, w] on the CPU.
        """
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).to(self.device)
        x = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)
        latents = self._encode(x, autocast=self.precision == "bf16")
        wrong = ~finite(latents)
        if wrong.any() and self.precision == "bf16":
            latents[wrong] = self._encode(x[wrong], autocast=False)
        return latents.cpu().contiguous()

    def _encode(self, x: Tensor, *, autocast: bool) -> Tensor:
        with self._autocast(autocast):
            modes = self.vae.encode(x).latent_dist.mode()
        scaled: Tensor = (modes.float() * self.vae.config.scaling_factor).half()
        return scaled

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """prompt_embeds [N, L, D] and pooled [N, P], float16 on the CPU; in float32 again what is not finite."""
        with self._autocast(self.precision == "bf16"):
            embeds, pooled = encode_prompts(captions, self.tokenizers, self.text_encoders)
        embeds, pooled = embeds.half(), pooled.half()
        wrong = ~(finite(embeds) & finite(pooled))
        if wrong.any() and self.precision == "bf16":
            again = [caption for caption, bad in zip(captions, wrong.tolist(), strict=True) if bad]
            embeds_again, pooled_again = encode_prompts(again, self.tokenizers, self.text_encoders)
            embeds[wrong], pooled[wrong] = embeds_again.half(), pooled_again.half()
        return embeds.cpu(), pooled.cpu()

    def truncated(self, captions: Sequence[str]) -> int:
        """How many of the captions the encoders see only the beginning of."""
        return len(truncated(self.tokenizers[0], captions))


def finite(rows: Tensor) -> Tensor:
    """Which samples have neither NaN nor infinity, bool [N]."""
    return torch.isfinite(rows).flatten(1).all(1)
