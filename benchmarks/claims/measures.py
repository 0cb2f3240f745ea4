# SPDX-License-Identifier: Apache-2.0
"""What is measured of pictures beside the package's own metrics, and how each number depends on the prompts.

All students answer the same prompts from the same noise and are held against the same real pictures. A number is
therefore kept with its replicates, what it would be without a block of the prompts: in the difference of two students'
replicates all that the prompts, the noise and the real pictures do to both cancels, and their jackknife is the error of
measuring that difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdxl_fast.eval import kid, retrieval
from sdxl_fast.eval.dataset import Questions
from sdxl_fast.eval.features import Extractor
from sdxl_fast.eval.sharpness import laplacian, laplacian_variance

TILE = 8  # px, of `grains`


def grains(images: Tensor) -> Tensor:
    """Noise where a picture is plain: the variance of the Laplacian in the quietest quarter of its 8 px tiles.

    Args:
        images: float [N, 3, H, W] in 0..1, sides at least 24.

    Returns:
        float [N]; `grain` makes one number of them.
    """
    tiles = functional.unfold(laplacian(images), TILE, stride=TILE).var(dim=1, correction=0)  # [N, tiles]
    return tiles.quantile(0.25, dim=1)


def grain(variances: Tensor) -> Tensor:
    """The root of mean variances, in levels of 255."""
    return 255.0 * variances.sqrt()


def flow_distances(images: Tensor, teachers: Tensor) -> Tensor:
    """How far each picture is from where the teacher ends from the same noise: root mean square [N], 0..1."""
    return (images.float() - teachers.float()).square().mean((1, 2, 3)).sqrt()


def without_blocks(values: Tensor, blocks: int) -> Tensor:
    """Means [blocks] of values [N] without one of the blocks that `kid.kernel_distance` makes, float64."""
    parts = values.double().tensor_split(blocks)
    sums, sizes = torch.stack([part.sum() for part in parts]), torch.tensor([len(part) for part in parts])
    return (sums.sum() - sums) / (sizes.sum() - sizes)


def measure(
    pictures: Tensor, row: Mapping[str, Any], questions: Questions, extract: Extractor, ends: Tensor | None
) -> dict[str, Any]:
    """Grain, flow and the replicates of all that is compared.

    Args:
        pictures: float [N, 3, H, W] in 0..1, of the questions' prompts.
        row: what `report.evaluate` says of them.
        questions: the same.
        extract: the same feature network.
        ends: pictures of the checkpoint that taught, the flow's ends; None where there is none.

    Returns:
        `grain`, `flow` and `replicates`, which has a list for every number that claims compare.
    """
    features, blocks = extract(pictures), min(kid.BLOCKS, len(pictures) // 2)
    hits = retrieval.ranks(features, extract(questions.database), questions.targets) < 5
    scale, quiet = row["sharpness"] / row["laplacian_variance"], grains(pictures)
    replicates = {
        "top5": without_blocks(hits, blocks),
        # the distance of the VAE's own pictures, which the excess is over, is the same for all and cancels
        "kid_excess": kid.kernel_distance(features, extract(questions.reference), blocks=blocks).replicates,
        "sharpness": scale * without_blocks(laplacian_variance(pictures), blocks),
        "grain": grain(without_blocks(quiet, blocks)),
    }
    found: dict[str, Any] = {"grain": float(grain(quiet.mean())), "flow": None}
    if ends is not None:
        distances = flow_distances(pictures, ends)
        found["flow"], replicates["flow"] = float(distances.mean()), without_blocks(distances, blocks)
    found["replicates"] = {name: [round(value, 7) for value in values.tolist()] for name, values in replicates.items()}
    return found
