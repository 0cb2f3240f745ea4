"""The steps of SDXL-Lightning: regression on the teacher's walk, and the alternating adversarial step (§2.3, §3)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..diffusion import prediction, sampling, schedule
from ..diffusion.prediction import PredictionType
from ..files import replacing
from ..models.discriminators import LightningDiscriminator
from ..random import image_seeds
from . import distributed, losses
from .accumulation import AccumulatingTask
from .bench import Bench, Condition, Renoise
from .checkpoint import Average
from .config import AdversarialPhase, LightningConfig, OptimizerConfig, Trains
from .students import averaged, frozen
from .teacher import call_unet, scaled_text
from .trainer import Facts, Update
from .vae import to_sheet


@dataclass
class Teacher:
    """A frozen network and the stride it walks with; `guidance` 1 is none. `others` stand on further bases."""

    bench: Bench[LightningConfig]
    unet: nn.Module
    stride: float
    guidance: float = 1.0
    others: tuple[nn.Module, ...] = ()

    @property
    def current(self) -> nn.Module:
        """The network on the base that this micro-batch works on."""
        return (self.unet, *self.others)[self.bench.which]

    @torch.no_grad()
    def walk(self, x_t: Tensor, t: Tensor, condition: Condition, count: int) -> Tensor:
        """`count` deterministic moves from x_t; a sample that has reached the clean latent stays there."""
        bench = self.bench
        predict = sampling.guided(
            lambda x, now, text: call_unet(self.current, x, now.clamp(min=0), text),
            condition,
            scaled_text(condition, 0.0),
            self.guidance,
        )
        for _ in range(count):
            then = schedule.next_timesteps(t, self.stride)
            with bench.config.autocast():
                output = predict(x_t, t)
            x_t, _ = bench.move(x_t, output, (t, then), bench.prediction_type)
            t = then
        return x_t


class Start(NamedTuple):
    """Where a move begins: x_t, t and the text."""

    x_t: Tensor
    t: Tensor
    condition: Condition


class Moved(NamedTuple):
    """What a student's move makes, float32: x̂_{t-ns}; what of it D is shown, itself or noised to t*; at what level."""

    x: Tensor
    shown: Tensor
    level: Tensor


def where_clean(then: Tensor, renoised: Tensor, plain: Tensor) -> Tensor:
    """`renoised` of samples that have reached the clean latent, `plain` of the others: eq. 25 noises x̂0.

    Noised once more, a latent that is noisy already would hold more noise than the level that D is told.
    """
    return torch.where((then < 0).reshape(-1, *[1] * (plain.ndim - 1)), renoised, plain)


@dataclass
class Student:
    """The network that learns, what its output means, and the grid and stride it moves on.

    `others` are the same LoRA on further bases: the same parameters, so `unet` stands for all.
    """

    bench: Bench[LightningConfig]
    unet: nn.Module
    prediction_type: PredictionType
    steps: int
    timesteps: tuple[int, ...]
    others: tuple[nn.Module, ...] = ()
    weights: tuple[float, ...] = ()  # of the timesteps; empty: all alike

    @property
    def current(self) -> nn.Module:
        """The network on the base that this micro-batch works on."""
        return (self.unet, *self.others)[self.bench.which]

    @property
    def stride(self) -> float:
        """Training timesteps per move."""
        return schedule.NUM_TRAIN_TIMESTEPS / self.steps

    @functools.cached_property
    def ends_clean(self) -> bool:
        """Whether every move of the grid ends at the clean latent, as those of one step do."""
        return bool((schedule.next_timesteps(torch.tensor(self.timesteps), self.stride) < 0).all())

    def move(self, x_t: Tensor, t: Tensor, condition: Condition, renoise: Renoise | None = None) -> Moved:
        """One student move, and with `renoise` what D is shown instead of its result."""
        bench = self.bench
        then = schedule.next_timesteps(t, self.stride)
        with bench.config.autocast():
            output = call_unet(self.current, x_t, t, condition)
        moved, shown = bench.move(x_t, output, (t, then), self.prediction_type, renoise)
        if renoise is None:
            return Moved(moved, shown, then)
        if self.ends_clean:
            return Moved(moved, shown, renoise.timesteps)
        return Moved(moved, where_clean(then, shown, moved), where_clean(then, renoise.timesteps, then))


class StudentTask(AccumulatingTask):
    """What both kinds of stage share: the student, its optimiser, its average if anything reads it, previews."""

    def __init__(self, student: Student, optimizer: OptimizerConfig, total: int, trains: Trains) -> None:
        bench = student.bench
        self.bench, self.student = bench, student
        self.batch, self.seen = bench.config.batch, {}
        self.update = Update(optimizer, (p for p in student.unet.parameters() if p.requires_grad), total)
        self.parts = {"student": student.unet, "optimizer": self.update.optimizer}
        self.average: Average | None = None
        if bench.config.averages(trains):
            self.average = self.parts["average"] = Average(student.unet, bench.config.ema_half_life)

    def start(self, images: int, use: str) -> Start:
        """The inputs of the micro-batch after `images` images."""
        student, pure = self.student, self.bench.config.pure_noise
        start = Start(*self.bench.inputs(student.timesteps, images, use, weights=student.weights, pure=pure))
        self.seen[self.bench.share.start] = {"x_t": start.x_t, "timesteps": start.t, **start.condition}
        return start

    def finish(self, facts: dict[str, Tensor], images: int) -> Facts:
        """Moves the student by what the micro-batches gathered; what there is to log."""
        logged: Facts = {**facts, "grad_norm": self.update.step(images)}
        if self.average is not None:
            self.average.update(self.student.unet, images + self.batch, self.batch)
        return logged

    def averaged(self) -> AbstractContextManager[None]:
        """The student holds its averaged weights inside, if it has any."""
        return nullcontext() if self.average is None else averaged(self.student.unet, self.average)

    @torch.no_grad()
    def _sheet(self, path: Path) -> None:
        student, bench = self.student, self.bench
        condition = {name: rows.repeat_interleave(2, 0) for name, rows in bench.previews.items()}
        start = bench.pure_noise(image_seeds(len(condition["pooled"]), "preview"))
        latents = sampling.sample(
            lambda x, t: call_unet(student.unet, x, t, condition),
            start,
            schedule.trailing_timesteps(student.steps),
            prediction_type=student.prediction_type,
        )
        self.drawn = bench.pictures(latents)
        if distributed.is_first():
            with replacing(path) as writing:
                to_sheet(self.drawn, 12).save(writing, format="PNG")

    def handed_on(self) -> AbstractContextManager[None]:
        """The student holds inside what it hands on: its averaged weights if the recipe says so, else its last."""
        return self.averaged() if self.bench.config.hand_on_average else nullcontext()

    def preview(self, path: Path) -> None:
        with self.handed_on(), self.bench.config.drawing():
            self._sheet(path)

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
        super().__init__(student, optimizer, total, "full" if convert else "lora")
        self.teacher, self.substeps, self.convert = teacher, substeps, convert

    def _target_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        bench = self.bench
        with torch.no_grad(), bench.config.autocast():
            output = call_unet(self.teacher.unet, x_t, t, condition)
        return prediction.to_x0(output, x_t, t, bench.alphas_cumprod, bench.prediction_type)

    def _loss(self, start: Start) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._distance(start)
        return loss, {"loss": loss.detach()}

    def _distance(self, start: Start) -> Tensor:
        if self.convert:
            wanted = self._target_x0(*start)
            with self.bench.config.autocast():
                output = call_unet(self.student.unet, *start)
            return losses.distance(output, wanted)
        wanted = self.teacher.walk(*start, self.substeps)
        return losses.distance(self.student.move(*start).x, wanted, self.bench.config.distance)

    def step(self, images: int) -> Facts:
        facts = self.gather(self.update, lambda: self._loss(self.start(images, "regression")))
        return self.finish(facts, images)


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
        config: LightningConfig = student.bench.config
        optimizer, d_optimizer = config.optimizers_of(phase)
        super().__init__(student, optimizer, phase.images, phase.trains)
        self.teacher, self.substeps, self.phase, self.discriminator = teacher, substeps, phase, discriminator
        discriminator.encoder.requires_grad_(not config.discriminator.freeze_backbone)
        trained = (p for p in discriminator.parameters() if p.requires_grad)
        self.d_update = Update(d_optimizer, trained, phase.images)
        self._targets: dict[tuple[int, int], Tensor] = {}
        self.updates = (self.d_update, self.update)
        self.parts |= {"discriminator": discriminator, "d_optimizer": self.d_update.optimizer}

    def _renoise(self, *key: int | str) -> Renoise | None:
        """What the discriminator's inputs are noised with; the same key gives the same t* and ε*."""
        if not self.phase.renoise:
            return None
        t_star = self.bench.timesteps(self.phase.renoise, *key, "renoise", weights=self.phase.renoise_weights)
        return Renoise(t_star, self.bench.seeds(*key))

    def _judge(
        self, shown: Sequence[tuple[Tensor, str]], level: Tensor, start: Start, text: Condition
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """D's logits and losses of several batches of latents at one level, each with what it is to be judged.

        (x_t, c) passes through D once for all of them.
        """
        d, count, options = self.discriminator, len(shown), self.bench.config.discriminator
        # Only attention as plain matrix products can be differentiated twice.
        attention = sdpa_kernel(SDPBackend.MATH) if options.r1 else nullcontext()
        texts = {name: torch.cat([value] * count) for name, value in text.items()}
        with self.bench.config.autocast(), attention:
            feature_t = d.features(start.x_t, start.t, text) if d.conditional else None
            features = d.features(torch.cat([latents for latents, _ in shown]), level.repeat(count), texts)
            return tuple(
                d.verdict(feature, feature_t, f"non_saturating_{wanted}")
                for feature, (_, wanted) in zip(features.chunk(count), shown, strict=True)
            )

    def _discriminator_loss(self, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Real: the teacher's x_{t-ns}; fake: the student's."""
        bench, options = self.bench, self.bench.config.discriminator
        key = (images, "discriminator")
        start = self.start(*key)
        with torch.no_grad():
            renoise = self._renoise(*key)
            real = self.teacher.walk(*start, self.substeps)
            if renoise is not None:
                then = schedule.next_timesteps(start.t, self.student.stride)
                real = where_clean(then, bench.renoised(real, renoise), real)
            fake = self.student.move(*start, renoise)
        shown = [(real.requires_grad_(options.r1 > 0), "real"), (fake.shown, "fake")]
        if options.approximate_r1:
            noise = bench.pure_noise(bench.seeds(*key, "r1"), real.shape[1:])
            shown.append((real.detach() + options.approximate_r1_std * noise, "real"))
        (real_logits, real_losses), (fake_logits, fake_losses), *noisy = self._judge(
            shown, fake.level, start, start.condition
        )
        loss = real_losses.mean() + fake_losses.mean()  # eq. 19
        facts = {"d_loss": loss.detach(), "d_accuracy": losses.accuracy(real_logits, fake_logits)}
        if options.r1:
            loss = loss + options.r1 * losses.gradient_penalty(real_logits, real)
        if noisy:
            loss = loss + options.approximate_r1 * losses.distance(noisy[0][0], real_logits)
        if options.misaligned_text:
            _, others = bench.batch(*key, text_of_next=True)
            another = (others["prompt_embeds"] != start.condition["prompt_embeds"]).flatten(1).any(1)
            ((_, misaligned),) = self._judge([(real.detach(), "fake")], fake.level, start, others)
            loss = loss + options.misaligned_text * (misaligned * another).mean()  # captions may come twice
        return loss, facts

    def discriminator_step(self, images: int) -> Facts:
        """Moves D alone; the student computes no gradient."""
        facts = self.gather(self.d_update, lambda: self._discriminator_loss(images))
        return {**facts, "d_grad_norm": self.d_update.step(images)}

    def _target(self, start: Start, images: int) -> Tensor:
        """Where the teacher walks to; kept if these inputs come again."""
        if not self.phase.repeat:
            return self.teacher.walk(*start, self.substeps)
        key = (images, self.bench.share.start)
        if key not in self._targets:
            self._targets[key] = self.teacher.walk(*start, self.substeps)
        return self._targets[key]

    def _student_loss(self, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        phase = self.phase
        images = images % phase.repeat if phase.repeat else images
        start = self.start(images, "student")
        fake = self.student.move(*start, self._renoise(images, "student"))
        loss, facts = fake.x.new_zeros(()), dict[str, Tensor]()
        if phase.adversarial_weight:
            ((_, verdicts),) = self._judge([(fake.shown, "real")], fake.level, start, start.condition)
            adversarial = verdicts.mean()  # eq. 20
            loss, facts["g_loss"] = loss + phase.adversarial_weight * adversarial, adversarial.detach()
        if phase.regression_weight:
            regression = losses.distance(fake.x, self._target(start, images), self.bench.config.distance)
            loss, facts["regression"] = loss + phase.regression_weight * regression, regression.detach()
        return loss, facts

    def student_step(self, images: int) -> Facts:
        """The non-saturating loss through D, whose weights neither move nor collect gradients."""
        moved = self.d_update.moved_after == images
        with frozen(self.d_update.parameters):
            facts = self.gather(self.update, lambda: self._student_loss(images), moved=moved)
        return self.finish(facts, images)

    def step(self, images: int) -> Facts:
        logged = self.discriminator_step(images) if self.phase.adversarial_weight else {}
        if images >= self.phase.d_warmup:
            logged |= self.student_step(images)
        return logged
