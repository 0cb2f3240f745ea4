"""The VAE of the embedded pipeline: diffusers' AutoencoderKL trained on random pictures drawn from the art."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from ..data import emoji
from ..data.render import load_art, render
from ..files import replacing
from ..models.discriminators import PatchDiscriminator
from ..models.feature_nets import EfficientNetLite0, perceptual_distance
from ..nn import fuse
from ..random import generator
from . import losses
from .base import open_vae
from .checkpoint import Average
from .config import DataConfig, VaeConfig, cache_folder
from .trainer import Facts, Task, Update


def art_of(config: DataConfig) -> tuple[Tensor, list[dict[str, str]]]:
    """The training split's art, uint8 [M, 4, S, S], and its metadata rows; builds the emoji set when it is missing."""
    folder = (
        Path(config.folder) if config.folder else emoji.build(cache_folder() / "data" / "emoji", log=lambda _: None)
    )
    rows = emoji.load_metadata(folder, style=config.style, split="train")
    return load_art(folder, rows, config.art_size), rows


def to_sheet(pictures: Tensor, columns: int) -> Image.Image:
    """Pictures [N, 3, H, W] in -1..1 side by side, row by row."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    sheet = torch.full((rows * columns, 3, height, width), 255, dtype=torch.uint8)
    sheet[:count] = pixels
    sheet = sheet.reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray(sheet.reshape(rows * height, columns * width, 3).numpy())


class VaeTask(Task):
    """L1 + perceptual + KL on pictures drawn anew for every batch."""

    def __init__(self, config: VaeConfig) -> None:
        self.config, self.batch = config, config.batch
        torch.manual_seed(config.seed)
        source: Any = open_vae(config.initial) if config.initial else None
        # Given here: a factor registered later would be lost where another network is made of this one's config.
        scaling = {} if source is None else {"scaling_factor": source.config.scaling_factor}
        vae: Any = AutoencoderKL(**config.model | scaling)
        self.vae = vae.to(config.torch_device, memory_format=torch.channels_last)
        if source is not None:
            self.vae.load_state_dict(source.state_dict())
        if config.freeze_encoder:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        if config.fuse:
            fuse(self.vae)
        self.features = EfficientNetLite0().to(config.torch_device)
        self.art = art_of(config.data)[0].to(config.torch_device)
        trained = [p for p in self.vae.parameters() if p.requires_grad]
        self.update = Update(config.optimizer, trained, config.images)
        self.average = Average(self.vae, config.ema_half_life)
        self.parts = {"vae": self.vae, "optimizer": self.update.optimizer, "average": self.average}
        if config.adversarial:
            if config.discriminator_optimizer is None:
                raise ValueError("adversarial is on, but discriminator_optimizer is missing; give its lr")
            self.discriminator = PatchDiscriminator().to(config.torch_device)
            self.d_update = Update(config.discriminator_optimizer, self.discriminator.parameters(), config.images)
            self.updates = (self.d_update, self.update)
            self.parts |= {"discriminator": self.discriminator, "d_optimizer": self.d_update.optimizer}

    def _pictures(self, count: int, *key: int | str) -> Tensor:
        draw = generator(self.config.seed, *key)
        chosen = torch.randint(len(self.art), (count,), generator=draw).to(self.art.device)
        data = self.config.data
        pictures = render(self.art[chosen], data.resolution, draw, scale_range=data.scale_range)
        return pictures.contiguous(memory_format=torch.channels_last)

    def _encode(self, pictures: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """A sample of the posterior and the KL; the mode and 0 when the encoder is frozen."""
        with torch.set_grad_enabled(not self.config.freeze_encoder):
            posterior = self.vae.encode(pictures).latent_dist
        if self.config.freeze_encoder:
            return posterior.mode(), torch.zeros(())
        noise = generator(self.config.seed, images, "posterior")
        return posterior.sample(noise), posterior.kl().float().mean()

    def step(self, images: int) -> Facts:
        config = self.config
        pictures = self._pictures(self.batch, images, "vae")
        self.seen = {0: {"pictures": pictures}}
        with config.autocast():
            latents, kl = self._encode(pictures, images)
            decoded = self.vae.decode(latents).sample
            with torch.no_grad():
                wanted = self.features(pictures)
            perceptual = perceptual_distance(self.features(decoded), wanted)
        l1 = (decoded.float() - pictures).abs().mean()
        loss = config.l1 * l1 + config.perceptual * perceptual + config.kl * kl
        logged = {"l1": l1.item(), "perceptual": perceptual.item(), "kl": kl.item()}
        if config.adversarial:
            logged |= self._discriminator_step(pictures, decoded.detach(), images)
            self.discriminator.requires_grad_(False)
            loss = loss + config.adversarial * losses.hinge_generator(self.discriminator(decoded.float()))
        loss.backward()
        logged["grad_norm"] = self.update.step(images)
        if config.adversarial:
            self.discriminator.requires_grad_(True)
        self.average.update(self.vae, images + self.batch, self.batch)
        mse = (decoded.detach().float() - pictures).square().mean()
        return {"loss": loss.item(), "psnr_db": (10.0 * torch.log10(4.0 / mse)).item(), **logged}

    def _discriminator_step(self, real: Tensor, fake: Tensor, images: int) -> dict[str, float]:
        logits = self.discriminator(torch.cat([real, fake.float()]))
        loss = losses.hinge_discriminator(*logits.chunk(2))
        loss.backward()  # type: ignore[no-untyped-call]
        self.d_update.step(images)
        return {"d_loss": loss.item(), "d_accuracy": losses.accuracy(*logits.chunk(2)).item()}

    def _averaged(self) -> Any:
        averaged: Any = AutoencoderKL.from_config(self.vae.config)
        averaged.load_state_dict(self.vae.state_dict())
        self.average.copy_to(averaged)
        return averaged.to(self.config.torch_device).eval()

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        pictures = self._pictures(48, "preview")
        vae = self._averaged()
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        pairs = torch.stack([pictures, decoded], dim=1).flatten(0, 1)
        with replacing(path) as writing:
            to_sheet(pairs, 16).save(writing, format="PNG")

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Saves the averaged VAE; latents get mean 0 and variance 1 by its quant convolutions and scaling factor."""
        vae = self._averaged()
        if not self.config.freeze_encoder:
            normalise_latents(vae, torch.cat([self._pictures(64, "normalise", i) for i in range(32)]))
        vae.save_pretrained(folder)


@torch.no_grad()
def normalise_latents(vae: Any, pictures: Tensor) -> None:
    """Folds each latent channel's mean and scale into the quant convolutions and sets `scaling_factor` to 1.

    Afterwards the latents of `pictures` have mean 0 and standard deviation 1 per channel, and stock diffusers, which
    knows no per-channel statistics, needs nothing more.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(64)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2.0 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
