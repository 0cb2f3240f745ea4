# SPDX-License-Identifier: Apache-2.0
"""Diversity within a prompt: how far apart pictures of one prompt with different seeds are.

Two distances, averaged over all pairs of a prompt and then over prompts:
content, 1 - cosine of pooled features (shape, pose, style), and layout, the root mean square difference of the pictures
averaged down to 16 x 16 (place, size, ground). The ratio to another set is the geometric mean of the two ratios: losing
either loses it. Garbage is diverse too, so the number means something only beside retrieval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdxl_fast.eval.features import check_images

LAYOUT_SIZE = 16


@dataclass(frozen=True, slots=True)
class Diversity:
    """Mean distance in content (0..2) and in layout (0..1) within a prompt; prompts with at least two pictures."""

    content: float
    layout: float
    prompts: int

    def relative_to(self, other: Diversity) -> float:
        """Geometric mean of the two ratios.

        Raises:
            ValueError: `other` has no diversity.
        """
        if other.content <= 0 or other.layout <= 0:
            raise ValueError(f"{other} has none, so nothing can be relative to it")
        return math.sqrt((self.content / other.content) * (self.layout / other.layout))


def _mean_pair(distances: Tensor) -> Tensor:
    """Mean of a symmetric [K, K] matrix without its diagonal."""
    count = len(distances)
    return (distances.sum() - distances.diagonal().sum()) / (count * (count - 1))


def within_prompt_diversity(images: Tensor, features: Tensor, prompts: Tensor) -> Diversity:
    """Mean pairwise distances between pictures of the same prompt.

    Args:
        images: float [N, 3, H, W] in 0..1, at least 16 px a side.
        features: [N, D], pooled features of the images.
        prompts: int64 [N], equal for pictures of the same prompt; prompts with one picture are left out.

    Raises:
        ValueError: shapes that do not fit, or no prompt with two pictures.
    """
    check_images(images)
    if features.ndim != 2 or len(features) != len(images) or prompts.shape != (len(images),):
        raise ValueError(
            f"features {list(features.shape)} and prompts {list(prompts.shape)} do not fit {len(images)} images"
        )
    if min(images.shape[-2:]) < LAYOUT_SIZE:
        raise ValueError(f"images has shape {list(images.shape)}; allowed: at least {LAYOUT_SIZE} px a side")
    directions = functional.normalize(features.double(), dim=1)
    layouts = functional.adaptive_avg_pool2d(images.double(), LAYOUT_SIZE).flatten(1)
    content, layout = [], []
    for prompt in prompts.unique():
        chosen = (prompts == prompt).nonzero()[:, 0]
        if len(chosen) < 2:
            continue
        content.append(_mean_pair((1.0 - directions[chosen] @ directions[chosen].T).clamp_min(0.0)))
        gaps = layouts[chosen][:, None] - layouts[chosen][None]
        layout.append(_mean_pair(gaps.square().mean(-1).sqrt()))
    if not content:
        raise ValueError("no prompt has two pictures; allowed: at least one that does")
    return Diversity(float(torch.stack(content).mean()), float(torch.stack(layout).mean()), len(content))
