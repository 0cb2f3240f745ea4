"""Pictures in and out: what a caller gives to start from, and what he gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .start import check_strength

AS_BYTES = ("uint8", "pil")
"""Output types whose pictures are uint8 on the device first."""


def finish(pixels: Tensor, output_type: str) -> Any:
    """Pictures as the caller wants them, see `OneStepPipeline`: of [N, 3, H, W] in -1..1, or uint8 [N, H, W, 3]."""
    if output_type == "latent":
        return pixels
    if output_type in AS_BYTES:
        pixels = pixels if pixels.dtype == torch.uint8 else ops.to_uint8(pixels)
        if output_type == "uint8":
            return pixels
        from PIL import Image

        return [Image.fromarray(picture) for picture in pixels.cpu().numpy()]
    unit = (pixels.float() * 0.5 + 0.5).clamp(0.0, 1.0)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().contiguous().numpy()


def to_start_from(
    image: Any, strength: float | None, sides: tuple[int | None, int | None], total: int, factor: int
) -> Tensor | None:
    """The pictures that `total` pictures are drawn from, as `pixels_of`; None without any.

    Raises:
        ValueError: one of image and strength without the other, or they do not fit.
    """
    if (image is None) != (strength is None):
        given = "image without strength" if strength is None else "strength without image"
        raise ValueError(f"{given}: give both, or neither")
    if image is None or strength is None:
        return None
    check_strength(strength)
    pixels = pixels_of(image, factor, sides)
    if total % len(pixels):
        raise ValueError(f"{len(pixels)} pictures in image for {total} to draw")
    return pixels


def pixels_of(image: Any, factor: int, sides: tuple[int | None, int | None]) -> Tensor:
    """Pictures to start from as [N, 3, H, W] float32 in -1..1.

    Args:
        image: PIL picture, array [H, W, 3] or [N, H, W, 3], tensor [3, H, W] or [N, 3, H, W] in 0..1, or a list.
        factor: of the VAE; sides are made multiples of it.
        sides: height and width to resize to; None keeps the picture's own.

    Raises:
        ValueError: something else, or numbers that are not finite.
    """
    from diffusers.image_processor import VaeImageProcessor

    if isinstance(image, Tensor) and not (image.ndim in (3, 4) and image.shape[-3] == 3):
        raise ValueError(f"image must be [3, H, W] or [N, 3, H, W], got {list(image.shape)}")
    try:
        pixels: Tensor = VaeImageProcessor(vae_scale_factor=factor).preprocess(image, height=sides[0], width=sides[1])
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"image cannot be read as pictures: {error}") from None
    if not bool(pixels.isfinite().all()):
        raise ValueError("image holds numbers that are not finite")
    return pixels.float()


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """The clean latents [N, C, h, w], scaled as the UNet takes them, of pictures in -1..1: the posterior's mean."""
    pixels = pixels.to(vae.device, vae.dtype).contiguous(memory_format=torch.channels_last)
    found = vae.encode(pixels)
    latents: Tensor = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
    statistics = _statistics(vae, latents)
    if statistics is not None:
        latents = (latents - statistics[0]) / statistics[1]
    return latents * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures [N, 3, H, W], nominally in -1..1, of clean latents [N, C, h, w] as the UNet makes them."""
    latents = unscaled(vae, latents).to(vae.dtype).contiguous(memory_format=torch.channels_last)
    pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Clean latents as the VAE made them, from the scale that the UNet works in."""
    latents = latents / vae.config.scaling_factor
    statistics = _statistics(vae, latents)
    return latents if statistics is None else latents * statistics[1] + statistics[0]


def output(images: Any) -> Any:
    """Pictures in the object that diffusers' pipelines return."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput

    return StableDiffusionXLPipelineOutput(images=images)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation [1, C, 1, 1] of a VAE whose config has them; SDXL's has none."""
    values = [vae.config.get(name) for name in ("latents_mean", "latents_std")]
    if None in values:
        return None
    mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in values)
    return mean, std
