"""What a caption leaves open varies; what it says does not."""

import torch

from sdxl_fast.data.render import render, upright
from sdxl_fast.random import generator


def _disc() -> torch.Tensor:
    """A green disc with a red left half, premultiplied RGBA uint8 [1, 4, 64, 64]."""
    line = torch.linspace(-1, 1, 64)
    inside = (line[:, None] ** 2 + line[None] ** 2 < 0.8).to(torch.uint8) * 255
    art = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    art[0, 0, :, :32], art[0, 1, :, 32:], art[0, 3] = inside[:, :32], inside[:, 32:], inside
    return art


def test_the_same_generator_draws_the_same_and_another_draws_otherwise() -> None:
    art = _disc().expand(4, -1, -1, -1)
    first, again, other = (render(art, 32, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 3, 32, 32)
    assert first.min() >= -1 and first.max() <= 1


def test_place_and_ground_vary_within_a_batch() -> None:
    pictures = render(_disc().expand(64, -1, -1, -1), 32, generator(0))
    corners = pictures[:, :, 0, 0]
    assert corners.std(0).min() > 0.05
    redness = (pictures[:, 0] - pictures[:, 1]).clamp(min=0)
    columns = (redness * torch.arange(32)).sum((1, 2)) / redness.sum((1, 2))
    assert columns.std() > 1.0
    assert (columns < 14).any() and (columns > 18).any(), "both mirror images occur"


def test_scale_range_bounds_the_size() -> None:
    art = _disc().expand(32, -1, -1, -1)
    areas = []
    for scale in (0.5, 0.9):
        pictures = render(art, 64, generator(3), scale_range=(scale, scale))
        areas.append(((pictures[:, 2] < -0.9) & (pictures[:, :2].amax(1) > 0.9)).float().mean().item())
    assert areas[1] / areas[0] > 2.5  # (0.9 / 0.5)^2 = 3.24, less the soft edge


def test_upright_is_centred_on_white() -> None:
    picture = upright(_disc(), 32)[0]
    assert (picture[:, 0, 0] == 1).all()
    assert picture[0, 16, 8] == 1 and picture[1, 16, 8] == -1
