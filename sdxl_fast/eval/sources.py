# SPDX-License-Identifier: Apache-2.0
"""Where pictures come from: the teacher with guidance, a VAE's reconstructions, a folder; students from outside."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from sdxl_fast.diffusion import sampling, schedule
from sdxl_fast.diffusion.prediction import PredictionType
from sdxl_fast.errors import DataError
from sdxl_fast.eval.tables import TEACHER, student_row
from sdxl_fast.models import loading
from sdxl_fast.models.conditioning import encode_prompts, time_ids
from sdxl_fast.models.config import vae_scale_factor

Generate = Callable[[Sequence[str], Sequence[int]], Tensor]
"""(prompts, one seed each) to pictures, float [N, 3, H, W] in 0..1."""

Source = Generate | Tensor | Path
"""What a row of a report is drawn from: a function, pictures in the prompts' order, or a folder of them."""


class Teacher:
    """The base model in many steps with classifier-free guidance, for comparison; plain diffusers modules.

    Args:
        model: diffusers SDXL folder, of which it takes the `unet_base` if there is one, else the `unet`; or an
            all-in-one file; or, with a `base`, a UNet alone or a LoRA.
        guidance_scale: u + scale (c - u), where u has both embeddings zeroed.
        num_steps: trailing steps.
        prediction_type: of the base UNet; None is what the LoRAs on it say, or the scheduler where there is no such.
        device: where it runs.
        dtype: of the networks; latents move in float32.
        base: folder or file that `model` belongs to.
        vae: folder of a VAE to take instead of the model's own.

    Attributes:
        size: height and width of its pictures in pixels, multiples of the VAE's factor; the native ones at first.

    Raises:
        ModelError: not an SDXL model, or unsafe or broken weights.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        guidance_scale: float,
        num_steps: int = 32,
        prediction_type: PredictionType | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        base: Path | None = None,
        vae: Path | None = None,
    ) -> None:
        path = Path(model)
        beside = base is None and (path / "unet_base").is_dir()
        networks = [name for name in loading.NETWORKS if name != "unet" or not beside]
        self.parts = loading.load(path, networks=networks, dtype=dtype, device=device, base=base, vae=vae)
        self.unet: Any = self.parts.unet
        if beside:
            self.unet = loading.load_base_unet(path, dtype=dtype, device=device)
        self.factor = vae_scale_factor(self.parts.vae.config)
        self.size = (self.unet.config.sample_size * self.factor,) * 2
        self.num_steps, self.guidance_scale = num_steps, guidance_scale
        self.prediction_type: PredictionType = prediction_type or self._declared_prediction_type()
        self.device, self.dtype = torch.device(device), dtype

    def _declared_prediction_type(self) -> PredictionType:
        own = self.parts.unet is not None
        declared = self.parts.scheduler.get("prediction_type") if own else self.parts.base_prediction_type
        return cast(PredictionType, declared or "epsilon")

    def in_steps(self, num_steps: int) -> Teacher:
        """The same networks drawing in another number of steps."""
        other = copy.copy(self)
        other.num_steps = num_steps
        return other

    @property
    def label(self) -> str:
        """How a report names the row."""
        return f"{TEACHER}, {student_row(self.num_steps)}, guidance {self.guidance_scale:g}"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        parts = self.parts
        embeds, pooled = encode_prompts(
            prompts, (parts.tokenizer, parts.tokenizer_2), (parts.text_encoder, parts.text_encoder_2)
        )
        condition = {"prompt_embeds": embeds, "pooled": pooled}
        height, width = self.size
        shape = (self.unet.config.in_channels, height // self.factor, width // self.factor)

        def network(x_t: Tensor, timesteps: Tensor, given: dict[str, Tensor]) -> Tensor:
            ids = time_ids(height, width, batch=len(x_t), dtype=self.dtype, device=x_t.device)
            added = {"text_embeds": given["pooled"], "time_ids": ids}
            output: Tensor = self.unet(
                x_t.to(self.dtype), timesteps, given["prompt_embeds"], added_cond_kwargs=added, return_dict=False
            )[0]
            return output.float()

        zeros = {key: torch.zeros_like(value) for key, value in condition.items()}
        latents = sampling.sample(
            sampling.guided(network, condition, zeros, self.guidance_scale),
            sampling.pure_noise(shape, torch.tensor(list(seeds), dtype=torch.int64, device=self.device)),
            schedule.trailing_timesteps(self.num_steps),
            prediction_type=self.prediction_type,
        )
        return decode(parts.vae, latents.to(self.dtype))


def decode(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Latents as the UNet sees them to pictures in 0..1."""
    pictures: Tensor = vae.decode(latents / vae.config.scaling_factor).sample  # type: ignore[operator, union-attr]
    return (pictures.float() / 2.0 + 0.5).clamp(0.0, 1.0)


class Reconstruction:
    """A VAE's reconstructions (mode of the posterior) of pictures in 0..1: what its latents can show at best."""

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu") -> None:
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32)
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        latents = self.vae.encode(images.to(self.device) * 2.0 - 1.0).latent_dist.mode()
        return decode(self.vae, latents * self.vae.config.scaling_factor)


def native_size(folder: str | Path) -> int:
    """Side in pixels of the pictures that a diffusers folder was trained for."""
    folder = Path(folder)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    return int(unet["sample_size"]) * vae_scale_factor(vae)


def read_folder(folder: str | Path, prompts: Sequence[str]) -> Tensor:
    """Pictures of a folder, one per prompt: in the order of its `metadata.jsonl` (`file_name`, `text`), else by name.

    Raises:
        DataError: another number of pictures, other prompts, or pictures of several sizes.
    """
    folder = Path(folder)
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        rows = [json.loads(line) for line in metadata.read_text().splitlines()]
        files = [folder / row["file_name"] for row in rows]
        wrong = [i for i, (row, prompt) in enumerate(zip(rows, prompts, strict=False)) if row["text"] != prompt]
        if wrong:
            raise DataError(f"{metadata} line {wrong[0] + 1} has another prompt than {prompts[wrong[0]]!r}")
    else:
        files = sorted(folder.glob("*.png"))
    if len(files) != len(prompts):
        raise DataError(f"{folder} has {len(files)} pictures for {len(prompts)} prompts; allowed: one each")
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) != 1:
        raise DataError(f"{folder} has pictures of sizes {sorted(sizes)}; allowed: one size")
    return torch.stack(pictures).float() / 255.0
