"""The shape of an SDXL pipeline as data, from the published one down to what fits in a test.

A `PipelineConfig` says everything that `build` needs to make the networks of a text-to-image pipeline with random
weights: two CLIP text encoders, the conditional UNet with its `text_time` embedding, the autoencoder, and the scheduler
settings. `SDXL` is the published model (Podell et al. 2023); smaller ones keep its structure and change only numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..diffusion import schedule

TIME_IDS = 6
"""Numbers in SDXL's micro-conditioning: original height and width, crop top and left, target height and width."""


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Picture pixels per latent pixel along one side, by diffusers' config of an AutoencoderKL or AutoencoderTiny."""
    levels = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return int(2 ** (len(levels) - 1))


@dataclass(frozen=True, slots=True)
class TextEncoderConfig:
    """One CLIP text tower. `activation` is "quick_gelu" in OpenAI's CLIP-L and "gelu" in OpenCLIP's bigG."""

    width: int
    layers: int
    heads: int
    projection: int
    activation: str = "gelu"
    mlp_ratio: int = 4


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """The conditional UNet; the tuples have one entry per level, from the finest.

    `transformer_layers` 0 makes a level without attention. `head_dim` is 64 in SDXL.
    """

    channels: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    head_dim: int = 64
    layers_per_block: int = 2
    norm_groups: int = 32
    time_id_dim: int = 256


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """The autoencoder; its factor is 2 per level after the first, so four levels give SDXL's 8."""

    channels: tuple[int, ...]
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.13025

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel along one side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """A whole pipeline; `image_size` is the native picture side in pixels."""

    text_encoder: TextEncoderConfig
    text_encoder_2: TextEncoderConfig
    unet: UNetConfig
    vae: VaeConfig
    image_size: int
    max_tokens: int = 77

    @property
    def latent_size(self) -> int:
        """The native latent side."""
        return self.image_size // self.vae.factor

    def unet_arguments(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' `UNet2DConditionModel`."""
        unet = self.unet
        attention = [layers > 0 for layers in unet.transformer_layers]
        return {
            "sample_size": self.latent_size,
            "in_channels": self.vae.latent_channels,
            "out_channels": self.vae.latent_channels,
            "block_out_channels": unet.channels,
            "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            "layers_per_block": unet.layers_per_block,
            "transformer_layers_per_block": tuple(max(1, layers) for layers in unet.transformer_layers),
            # diffusers means the number of heads by this name
            "attention_head_dim": tuple(max(1, width // unet.head_dim) for width in unet.channels),
            "cross_attention_dim": self.text_encoder.width + self.text_encoder_2.width,
            "use_linear_projection": True,
            "norm_num_groups": unet.norm_groups,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": unet.time_id_dim,
            "projection_class_embeddings_input_dim": self.text_encoder_2.projection + TIME_IDS * unet.time_id_dim,
        }

    def vae_arguments(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' `AutoencoderKL`."""
        levels = len(self.vae.channels)
        return {
            "sample_size": self.image_size,
            "latent_channels": self.vae.latent_channels,
            "block_out_channels": self.vae.channels,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "layers_per_block": self.vae.layers_per_block,
            "norm_num_groups": self.vae.norm_groups,
            "scaling_factor": self.vae.scaling_factor,
            "force_upcast": False,
        }

    def text_arguments(self, which: int, tokenizer: Any) -> dict[str, Any]:
        """Keyword arguments of transformers' `CLIPTextConfig` for encoder 1 or 2 and the tokenizer it will read."""
        tower = (self.text_encoder, self.text_encoder_2)[which - 1]
        return {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_ratio * tower.width,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "projection_dim": tower.projection,
            "hidden_act": tower.activation,
            "max_position_embeddings": self.max_tokens,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }

    def scaled(self, **changes: Any) -> PipelineConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


SDXL = PipelineConfig(
    text_encoder=TextEncoderConfig(width=768, layers=12, heads=12, projection=768, activation="quick_gelu"),
    text_encoder_2=TextEncoderConfig(width=1280, layers=32, heads=20, projection=1280),
    unet=UNetConfig(channels=(320, 640, 1280), transformer_layers=(0, 2, 10)),
    vae=VaeConfig(channels=(128, 256, 512, 512)),
    image_size=1024,
)
"""Stable Diffusion XL base 1.0."""

TOY = PipelineConfig(
    text_encoder=TextEncoderConfig(width=32, layers=2, heads=4, projection=32, activation="quick_gelu"),
    text_encoder_2=TextEncoderConfig(width=32, layers=2, heads=4, projection=32),
    unet=UNetConfig(channels=(32, 64), transformer_layers=(0, 1), head_dim=16, norm_groups=8, time_id_dim=8),
    vae=VaeConfig(channels=(16, 32, 32), layers_per_block=1, norm_groups=8, scaling_factor=1.0),
    image_size=32,
)
"""Small enough for a test to run in milliseconds: 32 px pictures, latents of 8×8×4."""


def scheduler_arguments(prediction_type: str) -> dict[str, Any]:
    """Keyword arguments of diffusers' `EulerDiscreteScheduler`: SDXL's noise schedule, trailing timesteps."""
    return {
        "num_train_timesteps": schedule.NUM_TRAIN_TIMESTEPS,
        "beta_start": schedule.BETA_START,
        "beta_end": schedule.BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
    }


def build_unet(config: PipelineConfig) -> Any:
    """A `UNet2DConditionModel` with random weights from torch's default generator."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config.unet_arguments())


def build_vae(config: PipelineConfig) -> Any:
    """An `AutoencoderKL` with random weights from torch's default generator."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config.vae_arguments())


def build_text_encoders(config: PipelineConfig, tokenizer: Any, tokenizer_2: Any) -> tuple[Any, Any]:
    """`CLIPTextModel` and `CLIPTextModelWithProjection` with random weights from torch's default generator."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first = CLIPTextModel(CLIPTextConfig(**config.text_arguments(1, tokenizer)))
    return first, CLIPTextModelWithProjection(CLIPTextConfig(**config.text_arguments(2, tokenizer_2)))
