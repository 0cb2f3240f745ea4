"""Adversarial diffusion distillation (arXiv 2311.17042), the training of SDXL-Turbo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .. import ops
from ..diffusion import prediction, sampling, schedule
from ..diffusion.stochastic import ancestral_move
from ..files import replacing
from ..models.config import scheduler_arguments
from ..models.discriminators import AddDiscriminator
from ..models.feature_nets import FeatureNetwork, Features, feature_network
from ..nn import fuse
from ..random import image_seeds
from . import distributed, losses
from .accumulation import AccumulatingTask
from .bench import Bench, Condition, lay_out, make_bench
from .checkpoint import Average
from .config import AddConfig
from .students import averaged, export_student, make_student, untrained_student
from .teacher import call_unet, scaled_text
from .trainer import Facts, Update
from .vae import to_sheet

SHEET_STEPS = (1, 2, 4)
NFSD_LOW = 200  # below it NFSD takes the unconditional estimate for the clean picture's own direction


@dataclass
class ScoreTeacher:
    """The frozen network that says where a noised estimate should have gone (§3.3)."""

    bench: Bench[AddConfig]
    unet: nn.Module
    negative: Condition  # one row

    def _epsilons(self, x_t: Tensor, t: Tensor, *conditions: Condition) -> tuple[Tensor, ...]:
        """ε̂ for each condition, in one batched call."""
        bench, count = self.bench, len(conditions)
        text = {key: torch.cat([c[key] for c in conditions]) for key in conditions[0]}
        with bench.config.autocast():
            output = call_unet(self.unet, torch.cat([x_t] * count), torch.cat([t] * count), text)
        return tuple(
            prediction.to_epsilon(part, x_t, t, bench.alphas_cumprod, bench.prediction_type)
            for part in output.chunk(count)
        )

    def _guided(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        scale = self.bench.config.guidance_scale
        if scale == 1.0:
            return self._epsilons(x_t, t, condition)[0]
        without, with_text = self._epsilons(x_t, t, scaled_text(condition, 0.0), condition)
        return without + scale * (with_text - without)

    def _noise_free(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """NFSD's direction in place of ε̂ - ε: δ_D + s · δ_C (Katzir et al. 2023, eq. 8-9)."""
        negative = {key: value.expand_as(condition[key]) for key, value in self.negative.items()}
        negative["time_ids"] = condition["time_ids"]
        nothing = scaled_text(condition, 0.0)
        without, with_text, unwanted = self._epsilons(x_t, t, nothing, condition, negative)
        low = (t < NFSD_LOW)[:, None, None, None]
        return torch.where(low, without, without - unwanted) + self.bench.config.guidance_scale * (with_text - without)

    @torch.no_grad()
    def target(self, x0: Tensor, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x̂_ψ: what the student's x0 (noised to x_t at t) is pulled towards."""
        config, table = self.bench.config, self.bench.alphas_cumprod
        alpha, sigma = schedule.alpha_sigma(table, t, 4)
        if config.distillation == "nfsd":
            return x0 - sigma / alpha * self._noise_free(x_t, t, condition)
        start = t + 1
        for left in range(config.teacher_steps - 1, -1, -1):
            then = start * left // config.teacher_steps - 1
            x_t, _ = self.bench.move(x_t, self._guided(x_t, t, condition), (t, then), "epsilon")
            t = then.clamp(min=0)
        return x_t


class Drawn(NamedTuple):
    """A micro-batch as both networks see it."""

    condition: Condition
    x0: Tensor
    pictures: Tensor
    fake: list[Tensor]
    real: Features
    image: Tensor


class AddTask(AccumulatingTask):
    """One discriminator and one student step per batch, from the same x̂_θ; neither loss reaches the other's weights.

    The real picture is decoded from its latent, so that the discriminator judges the student and not the VAE.
    """

    def __init__(self, config: AddConfig, folder: Path, bench: Bench[AddConfig] | None = None) -> None:
        self.config, self.batch, self.seen = config, config.batch, {}
        self.bench = bench = bench or make_bench(config, folder, prompts=(config.negative_prompt,))
        torch.manual_seed(config.seed)
        starts_anew = config.student == "random"
        self.student: Any = untrained_student(bench) if starts_anew else make_student(bench, config.trains)
        torch.manual_seed(config.seed)
        self.teacher = ScoreTeacher(bench, bench.frozen_base(), bench.prompts)
        self.features = self._placed(feature_network(config.feature_network, config.feature_size))
        told = config.image_encoder
        self.image_encoder = self._placed(feature_network(told)) if told else self.features
        text = bench.previews["pooled"].shape[1]
        self.discriminator = AddDiscriminator(self.features.widths, text, self.image_encoder.embedding)
        self.discriminator.to(config.torch_device, config.dtype)
        if config.fuse:
            for network in (self.student, self.teacher.unet, bench.vae):
                fuse(network)
        lay_out(config, [self.student], [self.teacher.unet])
        trained = (p for p in self.student.parameters() if p.requires_grad)
        self.update = Update(config.optimizer, trained, config.images)
        self.d_update = Update(config.discriminator_optimizer, self.discriminator.parameters(), config.images)
        self.updates = (self.d_update, self.update)
        self.average = Average(self.student, config.ema_half_life)
        self.parts = {
            **{"student": self.student, "optimizer": self.update.optimizer, "average": self.average},
            **{"discriminator": self.discriminator, "d_optimizer": self.d_update.optimizer},
        }

    def _placed(self, network: FeatureNetwork) -> FeatureNetwork:
        return network.to(self.config.torch_device, self.config.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        if self.config.checkpoint_decoder and torch.is_grad_enabled():
            pictures: Tensor = recompute(self.bench.decode, latents, use_reentrant=False)
            return pictures
        return self.bench.decode(latents)

    def _estimate(self, x_s: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """The student's x̂_θ(x_s, s), float32."""
        bench = self.bench
        with self.config.autocast():
            output = call_unet(self.student, x_s, s, condition)
        return prediction.to_x0(output, x_s, s, bench.alphas_cumprod, bench.prediction_type)

    @torch.no_grad()
    def _real(self, latents: Tensor) -> tuple[Features, Tensor]:
        """Features of the real pictures, and the embedding c_img that conditions the discriminator."""
        with self.config.autocast():
            pictures = self._decode(latents)
            features = self.features.features(pictures)
            if self.image_encoder is self.features:
                return features, features.embedding
            return features, self.image_encoder.features(pictures).embedding

    def _draw(self, images: int) -> Drawn:
        """The student's estimates from the micro-batch, their pictures and features, and those of the real ones."""
        latents, condition = self.bench.batch(images, "add")
        x_s, s = self.bench.noised(latents, self.config.timesteps, images, "add")
        self.seen[self.bench.share.start] = {"x_t": x_s, "timesteps": s, "latents": latents, **condition}
        real, image = self._real(latents)
        x0 = self._estimate(x_s, s, condition)
        with self.config.autocast():
            pictures = self._decode(x0)
            fake = self.features.features(pictures).tokens
        return Drawn(condition, x0, pictures, fake, real, image)

    def discriminator_loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss summed over heads, plus R1 on the heads' real inputs (eq. 3); the student gets no gradient."""
        text, image = self._told(drawn)
        inputs = [tokens.detach().requires_grad_() for tokens in drawn.real.tokens]
        with self.config.autocast():
            real_logits = self.discriminator(inputs, text, image)
            fake_logits = self.discriminator([tokens.detach() for tokens in drawn.fake], text, image)
        pairs = list(zip(real_logits, fake_logits, strict=True))
        hinge = torch.stack([losses.hinge_discriminator(*pair) for pair in pairs]).sum()
        r1 = losses.r1_penalty(real_logits, inputs)
        accuracy = losses.accuracy(*(torch.cat(side, dim=1) for side in zip(*pairs, strict=True)))
        return hinge + self.config.r1 * r1, {"d_loss": hinge.detach(), "r1": r1.detach(), "d_accuracy": accuracy}

    def student_loss(self, drawn: Drawn, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The heads' verdict and the teacher's (eq. 1); the discriminator must not require gradients."""
        with self.config.autocast():
            logits = self.discriminator(drawn.fake, *self._told(drawn))
        adversarial = torch.stack([losses.hinge_generator(logit) for logit in logits]).sum()
        distance = self._distance(drawn.x0, drawn.pictures, drawn.condition, images)
        facts = {"g_loss": adversarial.detach(), "distillation": distance.detach()}
        return self.config.adversarial_weight * adversarial + self.config.distillation_weight * distance, facts

    def _told(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """c_text and c_img; zeros for what the heads are not told (ADD, table 1b)."""
        embeddings = {"text": drawn.condition["pooled"], "image": drawn.image}
        text, image = (e if name in self.config.conditions else torch.zeros_like(e) for name, e in embeddings.items())
        return text, image

    def _distance(self, x0: Tensor, pictures: Tensor, condition: Condition, images: int) -> Tensor:
        """E[c(t) d(x̂_θ, x̂_ψ)], d the mean squared difference (eq. 4); t is uniform, which the paper leaves open."""
        bench, config = self.bench, self.config
        t = bench.timesteps(range(schedule.NUM_TRAIN_TIMESTEPS), images, "teacher")
        x_t, _ = ops.forward_diffusion(
            x0.detach(),
            alphas_cumprod=bench.alphas_cumprod,
            timesteps=t,
            seeds=bench.seeds(images, "teacher"),
            stream=sampling.STREAM_RENOISE,
        )
        target = self.teacher.target(x0.detach(), x_t, t, condition)
        weight = losses.distillation_weight(*schedule.alpha_sigma(bench.alphas_cumprod, t, 1), config.distillation)
        mine, wanted = x0, target
        if config.space == "pixel":
            with torch.no_grad(), config.autocast():
                mine, wanted = pictures, self._decode(target)
        return losses.distance(mine, wanted, weight=weight.view(-1, 1, 1, 1))

    def step(self, images: int) -> Facts:
        """D first, then the student against it; a single micro-batch keeps the student's graph in between."""
        config = self.config
        trains_student = images >= config.d_warmup
        keeps = trains_student and config.accumulate == 1
        kept: list[Drawn] = []

        def judged() -> tuple[Tensor, dict[str, Tensor]]:
            with torch.set_grad_enabled(keeps):
                drawn = self._draw(images)
            if keeps:
                kept.append(drawn)
            return self.discriminator_loss(drawn)

        facts = self.gather(self.d_update, judged)
        logged: Facts = {**facts, "d_grad_norm": self.d_update.step(images)}
        if not trains_student:
            return logged
        self.discriminator.eval().requires_grad_(False)  # nor may spectral norm's vectors move

        def taught() -> tuple[Tensor, dict[str, Tensor]]:
            return self.student_loss(kept.pop() if keeps else self._draw(images), images)

        facts = self.gather(self.update, taught, moved=True)
        self.discriminator.train().requires_grad_(True)
        logged |= {**facts, "grad_norm": self.update.step(images)}
        self.average.update(self.student, images + self.batch, self.batch)
        return logged

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """One, two and four ancestral steps of the same prompts and seeds, block below block."""
        with averaged(self.student, self.average), self.config.drawing():
            blocks = [self._refined(steps) for steps in SHEET_STEPS]
        self.drawn = blocks[0]
        if distributed.is_first():
            with replacing(path) as writing:
                to_sheet(torch.cat(blocks), len(blocks[0])).save(writing, format="PNG")

    def _refined(self, steps: int) -> Tensor:
        """Pictures of the preview prompts in a number of ancestral steps: iterative refinement (§4.2)."""
        bench = self.bench
        condition, count = bench.previews, len(bench.previews["pooled"])
        x_t = bench.pure_noise(image_seeds(count, "preview"))
        grid = schedule.trailing_timesteps(steps)
        for now, then in zip(grid, [*grid[1:], -1], strict=True):
            t = torch.full((count,), now, device=bench.device)
            output = call_unet(self.student, x_t, t, condition)
            noise = bench.pure_noise(image_seeds(count, "preview", now))
            levels = (t, torch.full_like(t, then))
            x_t = ancestral_move(x_t, output, *levels, noise, bench.alphas_cumprod, bench.prediction_type)
        return bench.pictures(x_t)

    def export(self, folder: Path) -> None:
        """A diffusers folder like SDXL-Turbo's: the student and an ancestral Euler scheduler, trailing timesteps."""
        scheduler = EulerAncestralDiscreteScheduler(**scheduler_arguments(self.bench.prediction_type))
        export_student(folder, self.bench, self.student, self.average, scheduler, steps=4)
