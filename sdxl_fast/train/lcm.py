"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378 and 2311.05556): the regression baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

from ..diffusion import prediction, schedule
from ..diffusion.stochastic import renoise_move
from ..files import replacing
from ..models.config import scheduler_arguments
from ..nn import fuse
from ..random import generator, image_seeds
from . import distributed, losses
from .accumulation import AccumulatingTask
from .bench import Bench, Condition, lay_out, make_bench
from .checkpoint import Average
from .config import LcmConfig
from .students import averaged, export_student, follower_of, make_student
from .teacher import call_unet, scaled_text
from .trainer import Facts, Update
from .vae import to_sheet

SHEET_STEPS = (1, 2, 4)
SIGMA_DATA, TIME_SCALING = 0.5, 10.0  # of the boundary condition, as in LCMScheduler


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of a consistency model, float32 [N, 1, 1, 1]: 1 and 0 at t = 0, where it is the identity.

    Args:
        t: int64 [N], 0-based.
    """
    scaled = TIME_SCALING * t.double()
    root = (scaled.square() + SIGMA_DATA**2).sqrt()
    skip, out = SIGMA_DATA**2 / root.square(), scaled / root
    return skip.float()[:, None, None, None], out.float()[:, None, None, None]


class LcmTask(AccumulatingTask):
    """The student's x0 from one level of the teacher's grid is pulled to its own from the next level down.

    The way down is one DDIM step of the teacher, guided by a scale that is drawn anew for each sample and that the
    student is not told (LCM-LoRA).
    """

    def __init__(self, config: LcmConfig, folder: Path) -> None:
        self.config, self.batch, self.seen = config, config.batch, {}
        self.bench: Bench[LcmConfig] = make_bench(config, folder)
        self.student: Any = make_student(self.bench, config.trains)
        self.teacher: Any = self.bench.frozen_base()
        if config.fuse:
            fuse(self.student)
            fuse(self.teacher)
        self.target: Any = follower_of(self.student, config) if config.target_half_life else None
        lay_out(config, [self.student], [self.teacher] if self.target is None else [self.teacher, self.target])
        trained = (p for p in self.student.parameters() if p.requires_grad)
        self.update = Update(config.optimizer, trained, config.images)
        self.average = Average(self.student, config.ema_half_life)
        self.parts = {"student": self.student, "optimizer": self.update.optimizer, "average": self.average}
        if self.target is not None:
            self.follower = Average(self.student, config.target_half_life, ramp=float("inf"))
            self.parts["target"] = self.follower
        self.levels = tuple(schedule.trailing_timesteps(config.levels))
        self.stride = schedule.NUM_TRAIN_TIMESTEPS / config.levels

    def _consistent(self, unet: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x̂0, float32."""
        bench = self.bench
        with self.config.autocast():
            output = call_unet(unet, x_t, t.clamp(min=0), condition)
        x0 = prediction.to_x0(output, x_t, t.clamp(min=0), bench.alphas_cumprod, bench.prediction_type)
        skip, out = boundary(t + 1)  # the grid's level t is 0-based
        return (skip.to(x0.dtype) * x_t + out.to(x0.dtype) * x0).to(x0.dtype)

    def _down(self, x_t: Tensor, t: Tensor, then: Tensor, condition: Condition, images: int) -> Tensor:
        """The teacher's guided DDIM step to the next level."""
        bench, (low, high) = self.bench, self.config.guidance_range
        draw = generator(self.config.seed, images, "guidance")
        scales = (low + (high - low) * torch.rand(self.batch, generator=draw))[bench.share].to(bench.device)
        both = {key: torch.cat([nothing, condition[key]]) for key, nothing in scaled_text(condition, 0.0).items()}
        with self.config.autocast():
            output = call_unet(self.teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        without, with_text = output.chunk(2)
        output = without + scales.to(output.dtype)[:, None, None, None] * (with_text - without)
        return bench.move(x_t, output, (t, then), bench.prediction_type)[0]

    def _loss(self, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        bench = self.bench
        latents, condition = bench.batch(images, "lcm")
        x_t, t = bench.noised(latents, self.levels, images, "lcm", pure=False)
        self.seen[bench.share.start] = {"x_t": x_t, "timesteps": t, **condition}
        with torch.no_grad():
            then = schedule.next_timesteps(t, self.stride)
            below = self._down(x_t, t, then, condition, images)
            judge = self.student if self.target is None else self.target
            wanted = self._consistent(judge, below, then, condition)
        loss = losses.distance(self._consistent(self.student, x_t, t, condition), wanted, self.config.distance)
        return loss, {"loss": loss.detach()}

    def step(self, images: int) -> Facts:
        if self.target is not None:
            self.follower.copy_to(self.target)
        facts = self.gather(self.update, lambda: self._loss(images))
        logged: Facts = {**facts, "grad_norm": self.update.step(images)}
        self.average.update(self.student, images + self.batch, self.batch)
        if self.target is not None:
            self.follower.update(self.student, images + self.batch, self.batch)
        return logged

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """One, two and four steps that noise each estimate anew, of the same prompts and seeds, block below block."""
        bench, condition, blocks = self.bench, self.bench.previews, []
        count = len(condition["pooled"])
        with averaged(self.student, self.average), self.config.drawing():
            for steps in SHEET_STEPS:
                x_t = bench.pure_noise(image_seeds(count, "preview"))
                grid = [self.levels[k * len(self.levels) // steps] for k in range(steps)]
                for now, then in zip(grid, [*grid[1:], -1], strict=True):
                    t = torch.full((count,), now, device=bench.device)
                    output = call_unet(self.student, x_t, t, condition)
                    noise = bench.pure_noise(image_seeds(count, "preview", now))
                    levels = (t, torch.full_like(t, then))
                    x_t = renoise_move(x_t, output, *levels, noise, bench.alphas_cumprod, bench.prediction_type)
                blocks.append(bench.pictures(x_t))
        self.drawn = blocks[0]
        if distributed.is_first():
            with replacing(path) as writing:
                to_sheet(torch.cat(blocks), count).save(writing, format="PNG")

    def export(self, folder: Path) -> None:
        """A diffusers folder with LCM's scheduler, and the LoRA beside it if one was trained."""
        arguments = scheduler_arguments(self.bench.prediction_type)
        scheduler = LCMScheduler(**arguments, original_inference_steps=self.config.levels)
        export_student(folder, self.bench, self.student, self.average, scheduler, steps=4)
