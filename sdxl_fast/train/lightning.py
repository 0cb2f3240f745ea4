"""The steps of SDXL-Lightning: regression on the teacher's walk, and the alternating adversarial step (§2.3, §3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion import prediction, sampling, schedule
from ..diffusion.prediction import PredictionType
from ..files import replacing
from ..models.discriminators import LightningDiscriminator
from ..random import generator, image_seeds
from . import losses
from .bench import Bench, Condition, Renoise
from .checkpoint import Average
from .config import AdversarialPhase, LightningConfig, OptimizerConfig
from .teacher import call_unet, preview_prompts
from .trainer import Task, make_optimizer, optimize
from .vae import to_sheet


@dataclass
class Teacher:
    """A frozen network and the stride it walks with; `guidance` 1 is none."""

    bench: Bench[LightningConfig]
    unet: nn.Module
    stride: float
    guidance: float = 1.0

    @torch.no_grad()
    def walk(self, x_t: Tensor, t: Tensor, condition: Condition, count: int) -> Tensor:
        """`count` deterministic moves from x_t; a sample that has reached the clean latent stays there."""
        bench = self.bench
        nothing = {key: torch.zeros_like(value) for key, value in condition.items()}
        predict = sampling.guided(
            lambda x, now, text: call_unet(self.unet, x, now.clamp(min=0), text, bench.size),
            condition,
            nothing,
            self.guidance,
        )
        for _ in range(count):
            then = schedule.next_timesteps(t, self.stride)
            with bench.config.autocast():
                output = predict(x_t, t)
            x_t = bench.move(x_t, output, (t, then), bench.prediction_type)
            t = then
        return x_t


@dataclass
class Student:
    """The network that learns, what its output means, and the grid and stride it moves on."""

    bench: Bench[LightningConfig]
    unet: nn.Module
    prediction_type: PredictionType
    steps: int
    timesteps: tuple[int, ...]

    @property
    def stride(self) -> float:
        """Training timesteps per move."""
        return schedule.NUM_TRAIN_TIMESTEPS / self.steps

    def move(
        self, x_t: Tensor, t: Tensor, condition: Condition, renoise: Renoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """One student move: x̂_{t-ns} in float32, and t - ns; with `renoise` that noised to t*, and t*."""
        bench = self.bench
        then = schedule.next_timesteps(t, self.stride)
        with bench.config.autocast():
            output = call_unet(self.unet, x_t, t, condition, bench.size)
        moved = bench.move(x_t, output, (t, then), self.prediction_type, renoise)
        return moved, then if renoise is None else renoise.timesteps


class StudentTask(Task):
    """What both kinds of stage share: the student, its optimiser, its average, previews."""

    def __init__(self, student: Student, optimizer: OptimizerConfig, total: int) -> None:
        bench = student.bench
        self.bench, self.student, self.optimizer_config, self.total = bench, student, optimizer, total
        self.batch = bench.config.batch
        trained = [p for p in student.unet.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(optimizer, trained)
        self.average = Average(student.unet, bench.config.ema_half_life)
        self.parts = {"student": student.unet, "optimizer": self.optimizer, "average": self.average}

    def with_average(self, use: Callable[[], None]) -> None:
        """Runs `use` while the student holds its averaged weights."""
        names = self.average.values
        live = {name: p.detach().clone() for name, p in self.student.unet.named_parameters() if name in names}
        self.average.copy_to(self.student.unet)
        use()
        self.student.unet.load_state_dict(live, strict=False)

    @torch.no_grad()
    def _sheet(self, path: Path) -> None:
        student, bench = self.student, self.bench
        captions = bench.data.captions
        chosen = [captions.index(p) for p in preview_prompts(captions) for _ in range(2)]
        condition = bench.condition(torch.tensor(chosen, device=bench.device))
        start = sampling.pure_noise(bench.data.shape, image_seeds(len(chosen), "preview").to(bench.device))
        latents = sampling.sample(
            lambda x, t: call_unet(student.unet, x, t, condition, bench.size),
            start,
            schedule.trailing_timesteps(student.steps),
            prediction_type=student.prediction_type,
        )
        with replacing(path) as writing:
            to_sheet(bench.decode(latents), 12).save(writing, format="PNG")

    def preview(self, path: Path) -> None:
        self.with_average(lambda: self._sheet(path))

    def export(self, folder: Path) -> None:
        raise NotImplementedError("stages are exported by `stages.run_stages`, which knows their lineage")


class RegressionTask(StudentTask):
    """MSE to a target: the teacher's x_{t-ns} (first stage, eq. 16), or its x̂0 (the switch of prediction, eq. 29)."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        substeps: int,
        optimizer: OptimizerConfig,
        total: int,
        *,
        convert: bool,
    ) -> None:
        super().__init__(student, optimizer, total)
        self.teacher, self.substeps, self.convert = teacher, substeps, convert

    def _target_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        bench = self.bench
        with torch.no_grad(), bench.config.autocast():
            output = call_unet(self.teacher.unet, x_t, t, condition, bench.size)
        return prediction.to_x0(output, x_t, t, bench.alphas_cumprod, bench.prediction_type)

    def step(self, images: int) -> dict[str, float]:
        x_t, t, condition = self.bench.inputs(self.student.timesteps, images, "regression")
        if self.convert:
            wanted = self._target_x0(x_t, t, condition)
            with self.bench.config.autocast():
                moved = call_unet(self.student.unet, x_t, t, condition, self.bench.size)
        else:
            wanted = self.teacher.walk(x_t, t, condition, self.substeps)
            moved, _ = self.student.move(x_t, t, condition)
        loss = losses.mse(moved, wanted)
        norm = optimize(self.optimizer, loss, self.optimizer_config, images, self.total)
        self.average.update(self.student.unet, images + self.batch, self.batch)
        return {"loss": loss.item(), "grad_norm": norm}


class AdversarialTask(StudentTask):
    """Alternates one discriminator step and one student step (§3.2); neither loss reaches the other's weights."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        substeps: int,
        discriminator: LightningDiscriminator,
        phase: AdversarialPhase,
    ) -> None:
        config = student.bench.config
        optimizer = config.adversarial_optimizer
        if phase.lr is not None:
            optimizer = optimizer.model_copy(update={"lr": phase.lr})
        super().__init__(student, optimizer, phase.images)
        self.teacher, self.substeps, self.phase, self.discriminator = teacher, substeps, phase, discriminator
        self.d_config = config.discriminator_optimizer
        self.d_optimizer = make_optimizer(self.d_config, list(discriminator.parameters()))
        self.parts |= {"discriminator": discriminator, "d_optimizer": self.d_optimizer}

    def _renoise(self, *key: int | str) -> Renoise | None:
        """What the discriminator's inputs are noised with; the same key gives the same t* and ε*."""
        if not self.phase.renoise:
            return None
        weights = torch.tensor(self.phase.renoise_weights or [1.0] * len(self.phase.renoise))
        random = generator(self.bench.config.seed, *key, "renoise")
        choice = torch.multinomial(weights, self.batch, replacement=True, generator=random)
        t_star = torch.tensor(self.phase.renoise)[choice].to(self.bench.device)
        return Renoise(t_star, self.bench.seeds(*key))

    def discriminator_step(self, images: int) -> dict[str, float]:
        """Real: the teacher's x_{t-ns}; fake: the student's. The condition (x_t, c) passes through D once for both."""
        key = (images, "discriminator")
        x_t, t, condition = self.bench.inputs(self.student.timesteps, *key)
        with torch.no_grad():
            renoise = self._renoise(*key)
            real = self.teacher.walk(x_t, t, condition, self.substeps)
            real = real if renoise is None else self.bench.renoised(real, renoise)
            fake, level = self.student.move(x_t, t, condition, renoise)
        d, parts, times = self.discriminator, [real, fake], [level, level]
        if d.conditional:
            parts, times = [*parts, x_t], [*times, t]
        text = {name: torch.cat([value] * len(parts)) for name, value in condition.items()}
        with self.bench.config.autocast():
            features = d.features(torch.cat(parts), torch.cat(times), text).chunk(len(parts))
            feature_t = features[2] if d.conditional else None
            real_logits = d.judge(features[0], feature_t)
            fake_logits = d.judge(features[1], feature_t)
        loss = losses.non_saturating_discriminator(real_logits, fake_logits)
        norm = optimize(self.d_optimizer, loss, self.d_config, images, self.total)
        accuracy = losses.accuracy(real_logits, fake_logits).item()
        return {"d_loss": loss.item(), "d_accuracy": accuracy, "d_grad_norm": norm}

    def student_step(self, images: int) -> dict[str, float]:
        """The non-saturating loss through D, whose weights neither move nor collect gradients."""
        key = (images, "student")
        x_t, t, condition = self.bench.inputs(self.student.timesteps, *key)
        d = self.discriminator
        d.requires_grad_(False)
        fake, level = self.student.move(x_t, t, condition, self._renoise(*key))
        with self.bench.config.autocast():
            feature_t = d.features(x_t, t, condition) if d.conditional else None
            logits = d.judge(d.features(fake, level, condition), feature_t)
        loss = losses.non_saturating_generator(logits)
        norm = optimize(self.optimizer, loss, self.optimizer_config, images, self.total)
        d.requires_grad_(True)
        self.average.update(self.student.unet, images + self.batch, self.batch)
        return {"g_loss": loss.item(), "grad_norm": norm}

    def step(self, images: int) -> dict[str, float]:
        logged = self.discriminator_step(images)
        if images >= self.phase.d_warmup:
            logged |= self.student_step(images)
        return logged
