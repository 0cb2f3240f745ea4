"""Draws training pictures from cut-out art; what a caption leaves open (place, size, turn, flip, ground) is random."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SCALE = (0.75, 0.98)  # the art's side over the picture's
ROTATION = math.radians(14.0)


def load_art(folder: str | Path, rows: list[dict[str, str]], size: int) -> Tensor:
    """Premultiplied RGBA art of the rows, uint8 [N, 4, size, size]."""
    art = np.empty((len(rows), 4, size, size), dtype=np.uint8)
    for index, row in enumerate(rows):
        with Image.open(Path(folder) / row["file_name"]) as picture:
            resized = picture.convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.BOX)
        art[index] = np.asarray(resized).transpose(2, 0, 1)
    return torch.from_numpy(art)


def _hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[N] each, in 0..1, to [N, 3]."""
    k = (hue.new_tensor([5.0, 3.0, 1.0]) + hue[:, None] * 6.0) % 6.0
    ramp = torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)
    return value[:, None] * (1.0 - saturation[:, None] * ramp)


def backgrounds(count: int, size: int, generator: torch.Generator, device: torch.device | str | None = None) -> Tensor:
    """Soft two-colour gradients in a random direction, float [count, 3, size, size] in 0..1."""
    hue, saturation, value, angle, spread = torch.rand(5, count, generator=generator).to(device)
    first = _hsv_to_rgb(hue, 0.05 + 0.40 * saturation, 0.78 + 0.20 * value)
    second = _hsv_to_rgb((hue + 0.08 * (spread - 0.5)) % 1.0, 0.05 + 0.40 * saturation, 0.70 + 0.26 * value)
    line = torch.linspace(-1.0, 1.0, size, device=device)
    y, x = torch.meshgrid(line, line, indexing="ij")
    turn = 2.0 * math.pi * angle
    along = turn.cos()[:, None, None] * x + turn.sin()[:, None, None] * y
    weight = (0.5 + 0.35 * along)[:, None]
    return first[:, :, None, None] * (1.0 - weight) + second[:, :, None, None] * weight


def render(art: Tensor, size: int, generator: torch.Generator, *, scale_range: tuple[float, float] = SCALE) -> Tensor:
    """Places each cut-out at random on a random ground.

    Args:
        art: premultiplied RGBA uint8 [N, 4, S, S], S at least twice `size` for clean edges.
        size: side of the pictures in pixels.
        generator: on the CPU, source of every random choice, so that every device draws the same pictures.
        scale_range: least and greatest side of the art over the picture's.

    Returns:
        float32 [N, 3, size, size] in -1..1.
    """
    count = art.shape[0]
    scale, turn, flip, right, down = torch.rand(5, count, generator=generator).to(art.device)
    scale = scale_range[0] + (scale_range[1] - scale_range[0]) * scale
    turn = ROTATION * (2.0 * turn - 1.0)
    mirror = torch.where(flip < 0.5, 1.0, -1.0)
    room = 1.0 - scale
    shift = torch.stack([room * (2.0 * right - 1.0), room * (2.0 * down - 1.0)], dim=1)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    rotation = torch.stack([torch.stack([mirror * cos, mirror * sin], 1), torch.stack([-sin, cos], 1)], 1)
    theta = torch.cat([rotation, -(rotation @ shift[:, :, None])], dim=2)
    grid = F.affine_grid(theta, [count, 4, 2 * size, 2 * size], align_corners=False)
    placed = F.grid_sample(art.float() / 255.0, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    placed = F.avg_pool2d(placed, 2)
    pictures = placed[:, :3] + backgrounds(count, size, generator, art.device) * (1.0 - placed[:, 3:])
    return pictures.clamp(0.0, 1.0) * 2.0 - 1.0


def upright(art: Tensor, size: int) -> Tensor:
    """The art as it is, centred on white: the un-augmented pictures that retrieval compares with; -1..1."""
    small = F.interpolate(art.float() / 255.0, size=(size, size), mode="area")
    return (small[:, :3] + 1.0 - small[:, 3:]).clamp(0.0, 1.0) * 2.0 - 1.0
