# SPDX-License-Identifier: Apache-2.0
"""The middles of pictures, which show the texture that resizing a whole picture to a feature network's input hides."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

PATCH = 299  # side of FID-Patch's centre crop, pixels (SDXL-Lightning §4)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures of another size, bicubic with antialiasing, which may overshoot 0..1; of the same size, as they are."""
    if images.shape[-2:] == size:
        return images
    return functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


def centre_patch(images: Tensor, side: int = PATCH) -> Tensor:
    """The middle `side` x `side` pixels at native resolution, [N, 3, side, side]; a smaller picture as it is."""
    height, width = images.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return images[..., top : top + min(side, height), left : left + min(side, width)]


def enlarged(images: Tensor, shorter: int | None) -> Tensor:
    """Pictures whose shorter side has fewer than `shorter` pixels, enlarged to them (bicubic); others as they are.

    SDXL-Lightning §4 enlarges SDXL-Turbo's 512 px to 1024 before the crop, not saying how.
    """
    if shorter is None or min(images.shape[-2:]) >= shorter:
        return images
    factor = shorter / min(images.shape[-2:])
    height, width = (round(side * factor) for side in images.shape[-2:])
    return resized(images, (height, width)).clamp(0, 1)
