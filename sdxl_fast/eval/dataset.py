# SPDX-License-Identifier: Apache-2.0
"""The question every row of a report answers: which prompts, which seeds, and the real pictures to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdxl_fast.data import emoji
from sdxl_fast.data.render import load_art, render, upright
from sdxl_fast.files import file_sha256
from sdxl_fast.random import derive_seed, generator

VIEWS = 4  # placed real pictures per name from which the whitening is fitted


@dataclass(frozen=True, slots=True)
class Questions:
    """N prompts with one seed each, and real pictures (float32 [*, 3, H, W] in 0..1, multiples of 1/255).

    Prompts, `placed` and `reference` are independent draws: a kernel distance between samples with an equal number of
    pictures per name would be biased downwards.
    """

    prompts: list[str]
    seeds: list[int]
    targets: Tensor
    """int64 [N]: each prompt's index in `database`."""
    database: Tensor
    """One upright picture per name on white."""
    placed: Tensor
    """[N]: a real picture of each prompt, placed at random. The ceiling, and what the VAE reconstructs."""
    reference: Tensor
    """[N]: real pictures of other draws, for the kernel distance."""
    views: Tensor
    """[K * VIEWS], those of a name together."""
    metadata_sha256: str
    seed: int


def quantise(images: Tensor) -> Tensor:
    """Rounds pictures in 0..1 to multiples of 1/255, as an image file would."""
    return (images.float().clamp(0.0, 1.0) * 255.0).round() / 255.0


def _draw(art: Tensor, chosen: Tensor, size: int, *key: int | str) -> Tensor:
    draw = generator(*key)
    parts = [render(art[part], size, draw) for part in chosen.split(64)]
    return quantise((torch.cat(parts) + 1.0) / 2.0)


def emoji_questions(
    data_dir: str | Path,
    *,
    num_images: int = 2000,
    seed: int = 0,
    resolution: int = 64,
    style: str = "fluent-3d",
    split: str = "train",
) -> Questions:
    """Questions about the emoji set's names, drawn uniformly with replacement.

    Args:
        data_dir: folder made by `sdxl-fast data emoji`.
        num_images: prompts; the reference has as many pictures.
        seed: everything drawn derives from it.
        resolution: side of the pictures in pixels.
        style, split: which rows of the metadata take part.

    Raises:
        ValueError: fewer than 2 images or a resolution below 16.
        DataError: no metadata in the folder.
    """
    if num_images < 2 or resolution < 16:
        raise ValueError(f"num_images is {num_images} and resolution {resolution}; allowed: from 2 and from 16")
    rows = emoji.load_metadata(data_dir, style=style, split=split)
    if not rows:
        raise ValueError(f"{data_dir} has no pictures of style {style!r} in split {split!r}")
    art = load_art(data_dir, rows, 2 * resolution)
    targets = torch.randint(len(rows), (num_images,), generator=generator(seed, "eval", "prompts"))
    others = torch.randint(len(rows), (num_images,), generator=generator(seed, "eval", "reference"))
    each = torch.arange(len(rows)).repeat_interleave(VIEWS)
    return Questions(
        prompts=[rows[index]["text"] for index in targets.tolist()],
        seeds=[derive_seed(seed, "eval", "image", index) for index in range(num_images)],
        targets=targets,
        database=quantise((torch.cat([upright(part, resolution) for part in art.split(64)]) + 1.0) / 2.0),
        placed=_draw(art, targets, resolution, seed, "eval", "placed"),
        reference=_draw(art, others, resolution, seed, "eval", "reference pictures"),
        views=_draw(art, each, resolution, seed, "eval", "views"),
        metadata_sha256=file_sha256(Path(data_dir) / "metadata.jsonl"),
        seed=seed,
    )
