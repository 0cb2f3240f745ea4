# SPDX-License-Identifier: Apache-2.0
"""The middles of pictures, which show the texture that resizing a whole picture to a feature network's input hides."""

from __future__ import annotations

from torch import Tensor

PATCH = 299  # side of FID-Patch's centre crop, pixels (SDXL-Lightning §4)


def centre_patch(images: Tensor, side: int = PATCH) -> Tensor:
    """The middle `side` x `side` pixels at native resolution, [N, 3, side, side]; a smaller picture as it is."""
    height, width = images.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return images[..., top : top + min(side, height), left : left + min(side, width)]
