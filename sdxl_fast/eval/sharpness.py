# SPDX-License-Identifier: Apache-2.0
"""Sharpness: the variance of a picture's Laplacian (Pech-Pacheco et al. 2000), relative to that of reference pictures.

Blur lowers it and grain raises it: resizing 64 px pictures to 48 px and back leaves 0.27 of it, noise of deviation
0.02 makes it 1.33. So a ratio near one says that edges are as steep and areas as clean as in the reference, if both
sets show the same things.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sdxl_fast.eval.features import check_images

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def laplacian(images: Tensor) -> Tensor:
    """The 4-neighbour Laplacian of luma at the inner pixels of each picture.

    Args:
        images: float [N, 3, H, W] in 0..1, H and W at least 3.

    Returns:
        float32 [N, 1, H - 2, W - 2].
    """
    check_images(images)
    if min(images.shape[-2:]) < 3:
        raise ValueError(f"images has shape {list(images.shape)}; allowed: height and width of at least 3")
    luma = (images.float() * torch.tensor(_LUMA, device=images.device).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor(_LAPLACIAN, device=images.device)[None, None]
    return functional.conv2d(luma, kernel)


def laplacian_variance(images: Tensor) -> Tensor:
    """The variance of `laplacian` over each picture's inner pixels, float32 [N]."""
    return laplacian(images).flatten(1).var(dim=1, correction=0)
