# SPDX-License-Identifier: Apache-2.0
"""The Laplacian's variance by hand, and its answer to blur and grain."""

import pytest
import torch
from torch.nn import functional

from sdxl_fast.eval.sharpness import laplacian_variance


def _edges(count: int = 8, size: int = 32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return functional.interpolate(torch.rand(count, 3, 4, 4, generator=draw), size=(size, size), mode="nearest")


def _mean(images: torch.Tensor) -> float:
    return laplacian_variance(images).mean().item()


def test_by_hand() -> None:
    image = torch.zeros(1, 3, 5, 5)
    image[:, :, 2, 2] = 1.0
    # 3 x 3 inner values: -4 in the middle, 1 at its four neighbours, 0 in the corners: mean 0, mean square 20 / 9.
    assert laplacian_variance(image).item() == pytest.approx(20 / 9, rel=1e-5)


def test_luma_weights() -> None:
    image = torch.zeros(1, 3, 5, 5)
    image[:, 1, 2, 2] = 1.0
    assert laplacian_variance(image).item() == pytest.approx(20 / 9 * 0.587**2, rel=1e-5)


def test_flat_and_linear_pictures_have_none() -> None:
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert laplacian_variance(ramp).item() == pytest.approx(0.0, abs=1e-10)
    assert laplacian_variance(torch.full((2, 3, 8, 8), 0.3)).tolist() == [0.0, 0.0]


def test_blur_lowers_and_grain_raises() -> None:
    images = _edges()
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    more = functional.avg_pool2d(functional.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    assert _mean(more) < _mean(blurred) < 0.5 * _mean(images)
    noise = 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert _mean((images + noise).clamp(0, 1)) > 1.03 * _mean(images)


def test_refusals() -> None:
    images = _edges()
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        laplacian_variance(images * 255)
    with pytest.raises(ValueError, match="floating point"):
        laplacian_variance(images.byte())
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        laplacian_variance(images * torch.nan)
    with pytest.raises(ValueError, match="at least 3"):
        laplacian_variance(images[..., :2])
