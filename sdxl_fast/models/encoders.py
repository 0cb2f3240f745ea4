"""What else than the UNet's own encoder a Lightning discriminator can look with, to try what that choice is worth.

Each has what `LightningDiscriminator` asks of an encoder: `out_channels`, `num_groups`, and a map of latents at a
timestep under a text, as many times smaller than the latents as the UNet's middle.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .discriminators import UNetEncoder
from .feature_nets import EfficientNetLite0, FeatureNetwork, area, resampled

WIDTH, GROUPS = 64, 16


class ConvEncoder(nn.Module):
    """A small residual network on latents with new weights, told the timestep and the pooled text.

    Args:
        in_channels: of the latents.
        pooled: width of the pooled text.
        levels: how often it halves the side.
    """

    def __init__(self, in_channels: int, pooled: int, levels: int) -> None:
        super().__init__()
        widths = [WIDTH << level for level in range(levels + 1)]
        self.out_channels, self.num_groups = widths[-1], GROUPS
        self.frequencies = Timesteps(WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time, self.text = TimestepEmbedding(WIDTH, 4 * WIDTH), nn.Linear(pooled, 4 * WIDTH)
        self.conv_in = nn.Conv2d(in_channels, WIDTH, 3, padding=1)
        pairs = itertools.pairwise([WIDTH, *widths])
        self.blocks = nn.ModuleList(
            ResnetBlock2D(in_channels=a, out_channels=b, temb_channels=4 * WIDTH, groups=GROUPS) for a, b in pairs
        )
        self.downs = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for width in widths[:-1])

    def forward(self, latents: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """latents [N, C, h, w], timesteps int64 [N], pooled [N, P] -> [N, C', h', w']."""
        frequencies = self.frequencies(timesteps).to(latents.dtype)
        embedding = self.time(frequencies) + self.text(condition["pooled"])
        x: Tensor = self.conv_in(latents)
        for index, block in enumerate(self.blocks):
            x = block(x, embedding)
            x = self.downs[index](x) if index < len(self.downs) else x
        return x


class PixelEncoder(nn.Module):
    """Frozen image features of the decoded latents, mapped to channels, and the timestep and pooled text added.

    The features know neither noise nor text, so it is at home with clean latents only. The frozen networks are not part
    of the module: they are in no checkpoint and learn nothing.

    Args:
        vae: decodes the latents.
        features: of pictures in -1..1.
        pooled: width of the pooled text.
        levels: how many times smaller, as a power of two, the map is than the latents.
    """

    def __init__(self, vae: Any, features: FeatureNetwork, pooled: int, levels: int) -> None:
        super().__init__()
        self._frozen, self._levels = (vae, features), levels
        self.out_channels, self.num_groups = 2 * WIDTH, GROUPS
        self.frequencies = Timesteps(WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time, self.text = TimestepEmbedding(WIDTH, self.out_channels), nn.Linear(pooled, self.out_channels)
        self.mix = nn.Conv2d(sum(features.widths), self.out_channels, 1)

    def forward(self, latents: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """latents [N, C, h, w], timesteps int64 [N], pooled [N, P] -> [N, C', h', w']."""
        vae, features = self._frozen
        size = (latents.shape[-2] >> self._levels, latents.shape[-1] >> self._levels)
        maps = features(vae.decode(latents / vae.config.scaling_factor).sample)
        # Normalised without weights of their own: torch 2.13's GroupNorm on CPU crashes in backward where, as in D's
        # step, its weights need a gradient and its channels-last input does not.
        seen = [resampled(F.group_norm(each, 1), size, area) for each in maps]
        told = self.time(self.frequencies(timesteps).to(latents.dtype)) + self.text(condition["pooled"])
        x: Tensor = self.mix(torch.cat(seen, dim=1))
        return x + told[:, :, None, None]


def make_encoder(backbone: str, unet: Any, vae: Any, *, bases: int = 1) -> nn.Module:
    """The encoder of a discriminator.

    Args:
        backbone: "unet" copies the encoder of `unet`, as published; "pixels" looks at pictures through EfficientNet-
            Lite0; "conv" is new.
        unet: of the base model.
        vae: likewise.
        bases: as for `UNetEncoder`.

    Raises:
        ValueError: another backbone.
    """
    if backbone == "unet":
        return UNetEncoder(unet, bases=bases)
    levels = len(unet.config.down_block_types) - 1
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    if backbone == "conv":
        return ConvEncoder(unet.config.in_channels, pooled, levels)
    if backbone != "pixels":
        raise ValueError(f"backbone is {backbone!r}; allowed: unet, pixels, conv")
    weight = next(vae.parameters())
    return PixelEncoder(vae, EfficientNetLite0().to(weight.device, weight.dtype), pooled, levels)
