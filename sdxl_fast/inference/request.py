"""What a caller asked for, checked: prompts, seeds, sizes. Nothing here touches a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

OutputType = Literal["pil", "np", "pt", "latent", "uint8"]
CALLBACK_TENSORS = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")
MAX_SIDE = 4096
"""Pixels; beyond it the VAE alone needs tens of gigabytes, and no few-step model makes sensible pictures."""


@dataclass(slots=True)
class Noise:
    """Where a call's noise comes from: one seed per picture, or a generator and perhaps latents as in diffusers.

    Attributes:
        seeds: int64 [N] on the CPU.
        generator: torch generators, or None for torch's default one.
        latents: the initial unit normal noise [N, C, h, w].
    """

    seeds: Tensor | None
    generator: torch.Generator | list[torch.Generator] | None
    latents: Tensor | None

    def initial(self, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The initial noise, unit normal of `shape` [N, C, h, w]."""
        if self.latents is not None:
            return self.latents.to(device)
        return self.draw(shape, stream=None, dtype=dtype, device=device)

    def draw(
        self, shape: tuple[int, int, int, int], *, stream: int | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Unit normal noise: the `stream` of the seeds (None: the initial one), or the generator's next numbers."""
        from ..diffusion import sampling

        if self.seeds is not None:
            stream = sampling.STREAM_START if stream is None else stream
            return sampling.pure_noise(shape[1:], self.seeds.to(device, non_blocking=True), stream=stream, dtype=dtype)
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(shape, generator=self.generator, device=device, dtype=dtype)


def check_prompts(prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None, pooled: Tensor | None) -> list[str]:
    """The prompts as a list, empty when embeddings are given instead.

    Raises:
        ValueError: neither or both given, an empty list, something that is not text, one embedding without the other.
    """
    if (prompt is None) == (prompt_embeds is None):
        given = "neither" if prompt is None else "both"
        raise ValueError(f"give either prompt or prompt_embeds; {given} came")
    if (prompt_embeds is None) != (pooled is None):
        missing = "pooled_prompt_embeds" if pooled is None else "prompt_embeds"
        raise ValueError(f"prompt_embeds and pooled_prompt_embeds go together; {missing} is missing")
    if prompt_embeds is not None and pooled is not None:
        if prompt_embeds.ndim != 3 or pooled.ndim != 2 or len(prompt_embeds) != len(pooled) or not len(pooled):
            raise ValueError(
                "prompt_embeds must be [B, L, D] and pooled_prompt_embeds [B, P], "
                f"got {list(prompt_embeds.shape)} and {list(pooled.shape)}"
            )
        return []
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one text")
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"prompt must be text or a list of texts, got {type(text).__name__} in it")
    return prompts


def rows_of(given: tuple[Tensor | None, Tensor | None], per_prompt: int, unet: Any) -> tuple[Tensor, ...] | None:
    """Given embeddings with `per_prompt` rows each; None when none were given.

    Raises:
        ValueError: they have not the widths that the UNet reads.
    """
    embeds, pooled = given
    if embeds is None or pooled is None:
        return None
    config = unet.config
    wanted = (config.cross_attention_dim, unet.add_embedding.linear_1.in_features - 6 * config.addition_time_embed_dim)
    found = (embeds.shape[-1], pooled.shape[-1])
    if found != wanted:
        raise ValueError(
            f"prompt_embeds and pooled_prompt_embeds are {found[0]} and {found[1]} wide; this UNet reads {wanted[0]} "
            f"and {wanted[1]}"
        )
    return tuple(rows if per_prompt == 1 else rows.repeat_interleave(per_prompt, 0) for rows in (embeds, pooled))


def check_size(height: int | None, width: int | None, default: int, factor: int) -> tuple[int, int]:
    """Picture height and width in pixels, the native side where not given.

    Raises:
        ValueError: not a multiple of the VAE's factor, or out of range.
    """
    sides = {"height": default if height is None else height, "width": default if width is None else width}
    for name, side in sides.items():
        if type(side) is not int:
            raise ValueError(f"{name} must be a whole number of pixels, got {side!r}")
        if side % factor or not factor <= side <= MAX_SIDE:
            nearest = min(max(factor, round(side / factor) * factor), MAX_SIDE // factor * factor)
            raise ValueError(
                f"{name} is {side}; this VAE makes multiples of {factor} from {factor} to {MAX_SIDE} pixels, "
                f"the nearest is {nearest}"
            )
    return sides["height"], sides["width"]


def check_latents(latents: Tensor, count: int, channels: int, sides: tuple[int | None, int | None], factor: int) -> Any:
    """Picture height and width that the given initial latents stand for.

    Raises:
        ValueError: latents of another rank, count or channel number, that contradict a given height or width, or that
            are not finite.
    """
    if latents.ndim != 4 or latents.shape[:2] != (count, channels):
        wanted = f"[{count}, {channels}, height/{factor}, width/{factor}]"
        raise ValueError(f"latents must be {wanted}, got {list(latents.shape)}")
    found = tuple(side * factor for side in latents.shape[2:])
    for name, side, given in zip(("height", "width"), found, sides, strict=True):
        if given is not None and given != side:
            raise ValueError(f"{name} is {given}, but latents are those of {side} pixels; give only one of them")
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents holds NaN or infinity, which would spread over the whole picture")
    return found


def check_seeds(seed: int | Sequence[int] | None, num_prompts: int, per_prompt: int) -> Tensor:
    """One seed per picture, int64 [num_prompts · per_prompt] on the CPU, the pictures of a prompt side by side.

    An int serves every prompt, so that a prompt has the noise it would have alone; a list gives one per prompt, or one
    per picture. Further pictures of a prompt count up from its seed. None draws from torch's default generator.

    Raises:
        ValueError: a list of another length, or a seed outside 0..2^63-1.
    """
    total = num_prompts * per_prompt
    if seed is None:
        return torch.randint(2**63 - 1, (total,), dtype=torch.int64)
    seeds = [seed] * num_prompts if isinstance(seed, int) else list(seed)
    for value in seeds:
        if type(value) is not int or not 0 <= value <= 2**63 - per_prompt:
            raise ValueError(f"seed is {value!r}; it must be an integer from 0 to 2^63-1")
    if len(seeds) == num_prompts:
        seeds = [value + k for value in seeds for k in range(per_prompt)]
    elif len(seeds) != total:
        wanted = str(num_prompts) if total == num_prompts else f"{num_prompts} or {total}"
        raise ValueError(f"seed has {len(seeds)} entries for {num_prompts} prompts and {total} pictures; give {wanted}")
    return torch.tensor(seeds, dtype=torch.int64)


def check_noise(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
    *,
    num_prompts: int,
    per_prompt: int,
) -> Noise:
    """The call's source of noise; raises ValueError when seed and generator contradict each other."""
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator, not both")
    total = num_prompts * per_prompt
    if isinstance(generator, list) and len(generator) != total:
        raise ValueError(f"generator has {len(generator)} entries for {total} pictures")
    by_seed = generator is None and (latents is None or seed is not None)
    return Noise(check_seeds(seed, num_prompts, per_prompt) if by_seed else None, generator, latents)


def check_output(output_type: str, tensor_inputs: Sequence[str], num_images_per_prompt: int) -> None:
    """Raises ValueError for an unknown output type or callback tensor, or fewer than one picture per prompt."""
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type is {output_type!r}; allowed: {', '.join(get_args(OutputType))}")
    unknown = [name for name in tensor_inputs if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {unknown[0]!r}; allowed: {', '.join(CALLBACK_TENSORS)}"
        )
    if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt!r}; it must be 1 or more")


def check_device(device: str | torch.device) -> torch.device:
    """`device` as a torch.device that is there; raises ValueError otherwise."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; allowed: cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; allowed: cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device}, but torch sees {torch.cuda.device_count()} GPUs here; use cpu")
    return device
