# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.training` trains: networks with random weights, data of their shapes, and both loops on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_training import PlainLoop, Setting
from sdxl_fast.diffusion import schedule
from sdxl_fast.models.conditioning import time_ids
from sdxl_fast.models.config import SDXL, PipelineConfig, build_unet
from sdxl_fast.models.discriminators import LightningDiscriminator, UNetEncoder
from sdxl_fast.nn import fuse
from sdxl_fast.testing.sdxl_scale import random_network
from sdxl_fast.train.bench import Bench, lay_out
from sdxl_fast.train.config import AdversarialPhase, LightningConfig, TeacherConfig, load_recipe
from sdxl_fast.train.lightning import AdversarialTask, Student, Teacher
from sdxl_fast.train.source import Condition
from sdxl_fast.train.students import add_lora

STAGE, STEPS, TEACHER_STEPS = "4-step", 4, 8


@dataclass(frozen=True)
class Scene:
    """Which networks are trained where: `model` is "embedded" or "sdxl"."""

    model: str = "embedded"
    device: str = "cpu"
    recompute: bool = False

    @property
    def pipeline(self) -> PipelineConfig:
        """The networks' shapes."""
        if self.model == "sdxl":
            return SDXL
        teacher = load_recipe("emoji_teacher")
        assert isinstance(teacher, TeacherConfig)
        return teacher.pipeline

    def unets(self) -> tuple[Any, Any]:
        """Base and teacher with random weights, on the CPU in float32."""
        if self.model == "sdxl":
            return random_network("unet", torch.float32), random_network("unet", torch.float32)
        base, other = (build_unet(self.pipeline).requires_grad_(False) for _ in range(2))
        return base, other

    @property
    def settings(self) -> list[str]:
        """Overrides of the recipe."""
        found = [f"device={self.device}"]
        if self.model == "sdxl":
            found += ["accumulate=1", f"gradient_checkpointing={str(self.recompute).lower()}"]
        return found

    @property
    def recipe(self) -> str:
        """Its name."""
        return "sdxl_lightning_80gb" if self.model == "sdxl" else "emoji_lightning"


class RandomSource:
    """Latents and texts of a pipeline's shapes, a function of the number of images."""

    def __init__(self, pipeline: PipelineConfig) -> None:
        self.shapes = [(pipeline.vae.latent_channels, pipeline.latent_size, pipeline.latent_size)]
        self.tokens, self.pooled = pipeline.max_tokens, pipeline.text_encoder_2.projection
        self.width, self.side = pipeline.text_encoder.width + pipeline.text_encoder_2.width, pipeline.image_size

    def condition(self, count: int, draw: torch.Generator) -> Condition:
        """What a UNet is told of `count` pictures."""
        return {
            "prompt_embeds": torch.randn(count, self.tokens, self.width, generator=draw),
            "pooled": torch.randn(count, self.pooled, generator=draw),
            "time_ids": time_ids(self.side, self.side, batch=count),
        }

    def batch(
        self, count: int, share: slice, key: tuple[int | str, ...], images: int, *, text_of_next: bool
    ) -> tuple[Tensor, Condition]:
        """As `train.source.Source`."""
        draw = torch.Generator().manual_seed(images)
        latents = torch.randn(count, *self.shapes[0], generator=draw)
        return latents[share], {name: rows[share] for name, rows in self.condition(count, draw).items()}


@dataclass
class Ground:
    """What both loops start from: two UNets with random weights, data, and the recipe's 4-step LoRA phase against D."""

    config: LightningConfig
    base: Any
    teacher: Any
    source: RandomSource

    @classmethod
    def lay(cls, scene: Scene, *settings: str) -> Ground:
        """Of the scene's recipe with overrides."""
        config = load_recipe(scene.recipe, [*scene.settings, *settings])
        assert isinstance(config, LightningConfig)
        torch.manual_seed(0)
        base, other = scene.unets()
        return cls(config, base, other, RandomSource(scene.pipeline))

    @property
    def phase(self) -> AdversarialPhase:
        """In which the student learns from the first step on."""
        found = next(stage for stage in self.config.stages if stage.name == STAGE).phases[0]
        return found.model_copy(update={"d_warmup": 0})

    @property
    def side(self) -> int:
        """Of the discriminator's feature maps."""
        return int(self.source.shapes[0][1] >> (len(self.base.config.down_block_types) - 1))

    def ours(self, *, compiled: bool = False) -> AdversarialTask:
        """The networks as the trainer assembles them."""
        config, base = self.config, self.base.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            base.enable_gradient_checkpointing()
        if config.frozen_dtype == config.dtype:
            base.to(config.torch_device)
        one = self.source.condition(1, torch.Generator().manual_seed(1))
        alphas = schedule.alphas_cumprod().to(config.torch_device, config.dtype)
        bench: Bench[LightningConfig] = Bench(
            **{"config": config, "base": base, "vae": None, "source": self.source, "previews": one, "prompts": one},
            **{"prediction_type": "epsilon", "alphas_cumprod": alphas},
        )
        network, taught = bench.frozen_base(), bench.froze(self.teacher.to(memory_format=torch.channels_last))
        add_lora(network, config)
        d = LightningDiscriminator(UNetEncoder(base), conditional=True, side=self.side)
        d.to(config.torch_device, config.trained_dtype)
        for unet in (network, taught, d.encoder.unet):
            fuse(unet)
        lay_out(config.model_copy(update={"compile": compiled}), [network], [taught])
        if config.gradient_checkpointing:
            d.train()
        student = Student(bench, network, "epsilon", STEPS, tuple(schedule.trailing_timesteps(STEPS)))
        stride = schedule.NUM_TRAIN_TIMESTEPS / TEACHER_STEPS
        return AdversarialTask(student, Teacher(bench, taught, stride), TEACHER_STEPS // STEPS, d, self.phase)

    def plain(self, *, channels_last: bool) -> PlainLoop:
        """The peer, with copies of the networks."""
        config, phase, total = self.config, self.phase, schedule.NUM_TRAIN_TIMESTEPS
        rate, d_rate = config.adversarial_optimizer, config.discriminator_optimizer
        setting = Setting(
            **{"rank": config.lora_rank, "targets": list(config.lora_targets), "bf16": config.precision == "bf16"},
            **{"stride": total // STEPS, "teacher_stride": total // TEACHER_STEPS},
            **{"lr": phase.lr or rate.lr, "d_lr": phase.d_lr or d_rate.lr, "max_grad_norm": rate.max_grad_norm},
            **{"frozen": config.frozen_dtype, "device": config.device, "recompute": config.gradient_checkpointing},
        )
        alphas = schedule.alphas_cumprod()
        return PlainLoop(self.base, self.teacher, alphas, setting, channels_last=channels_last, side=self.side)
