"""Parts of recipes that every kind has, and those of the embedded pipeline's own networks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..data.render import SCALE
from ..models.config import PipelineConfig

CPU = torch.device("cpu")


def cache_folder() -> Path:
    """Where runs and data sets live: $SDXL_FAST_CACHE, else ~/.cache/sdxl_fast."""
    return Path(os.environ.get("SDXL_FAST_CACHE", Path.home() / ".cache" / "sdxl_fast"))


class Config(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Config):
    """The picture–caption folder and how a picture is drawn from it."""

    folder: str | None = Field(None, description="image folder; None is the emoji set in the cache, built when missing")
    style: str = "fluent-3d"
    resolution: int = Field(64, ge=8, description="side of a training picture, pixels")
    art_size: int = Field(128, ge=16, description="side the cut-out art is kept at, pixels")
    scale_range: tuple[float, float] = Field(SCALE, description="least and greatest side of the art over the picture's")
    category_share: float = Field(0.3, ge=0, le=1, description="share of captions that name only the category")


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule: linear warm-up, constant, linear decay; lengths in images."""

    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    decay: int = Field(0, ge=0, description="images before the end over which the rate falls linearly to `final`")
    final: float = Field(0.05, ge=0, le=1, description="share of the rate left at the very end")
    max_grad_norm: float = Field(1.0, gt=0)
    kind: Literal["adamw", "adamw8bit", "adamw_lean"] = Field(
        "adamw",
        description="adamw8bit keeps moments in 8 bits (bitsandbytes); adamw_lean keeps no first moment where "
        "betas[0] is 0, and rounds bf16 weights stochastically",
    )


class RunConfig(Config):
    """What every run has."""

    run: str = Field(description="name of the run's folder")
    seed: int = 0
    batch: int = Field(gt=0)
    images: int = Field(gt=0, description="training length")
    precision: Literal["fp64", "fp32", "bf16"] = Field("bf16", description="bf16 is mixed, with float32 weights")
    device: str = Field(
        "auto", description="auto is the GPU where there is one, under torchrun each process's; else a torch device"
    )
    deterministic: bool = Field(False, description="refuse CUDA kernels whose result depends on timing")
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="beside metrics.jsonl")
    checkpoint_every: int = Field(20_000, gt=0, description="images between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(1_000, gt=0, description="images between metric lines")
    ema_half_life: float = Field(5_000, gt=0, description="images")
    fuse: bool = Field(True, description="run the networks on this package's fused modules")

    @property
    def torch_device(self) -> torch.device:
        """Where the run computes."""
        if self.device not in ("auto", "cuda"):
            return torch.device(self.device)
        if self.device == "auto" and not torch.cuda.is_available():
            return CPU
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> torch.autocast:
        """bfloat16 mixed precision when the recipe asks for it."""
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.precision == "bf16")


class VaeConfig(RunConfig):
    """An AutoencoderKL trained by L1, a perceptual distance on frozen EfficientNet-Lite0 features, and a light KL."""

    kind: Literal["vae"]
    data: DataConfig = DataConfig()
    model: dict[str, Any] = Field(description="AutoencoderKL's configuration")
    optimizer: OptimizerConfig
    l1: float = 1.0
    perceptual: float = 0.5
    kl: float = 1e-6
    freeze_encoder: bool = Field(False, description="train the decoder alone, so that latents stay what they were")
    adversarial: float = Field(0.0, ge=0, description="weight of a patch discriminator's hinge loss; 0 trains none")
    discriminator_optimizer: OptimizerConfig | None = None
    initial: str | None = Field(None, description="run to start from, a folder or a name in the cache")


class TeacherConfig(RunConfig):
    """A text-to-image model of SDXL's architecture trained from scratch: UNet and both text encoders."""

    kind: Literal["teacher"]
    data: DataConfig = DataConfig()
    vae: str = Field(description="run or folder of the VAE")
    initial: str | None = Field(None, description="run or pipeline folder whose weights to start from")
    draws: int = Field(128, ge=1, description="random pictures per name whose latents are computed beforehand")
    vocabulary: int = Field(1024, ge=514, le=4096)
    pipeline: PipelineConfig = Field(description="shapes of the networks; the VAE's must be those of `vae`")
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    caption_dropout: float = Field(0.1, ge=0, le=1)
    optimizer: OptimizerConfig
    preview_guidance: float = 3.0
