# SPDX-License-Identifier: Apache-2.0
"""The questions of a report: repeatable, independent draws, pictures that belong to their prompts."""

from pathlib import Path

import pytest
import torch

from sdxl_fast.errors import DataError
from sdxl_fast.eval.dataset import VIEWS, emoji_questions, quantise


def test_same_seed_same_questions(picture_set: Path) -> None:
    one, two = emoji_questions(picture_set, num_images=40), emoji_questions(picture_set, num_images=40)
    assert one.prompts == two.prompts
    assert one.seeds == two.seeds
    for name in ("database", "placed", "reference", "views"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    other = emoji_questions(picture_set, num_images=40, seed=1)
    assert other.prompts != one.prompts
    assert not set(other.seeds) & set(one.seeds)
    assert not torch.equal(other.placed, one.placed)


def test_shapes_and_independence(picture_set: Path) -> None:
    questions = emoji_questions(picture_set, num_images=40, resolution=32)
    assert questions.database.shape == (12, 3, 32, 32)
    assert questions.placed.shape == questions.reference.shape == (40, 3, 32, 32)
    assert questions.views.shape == (12 * VIEWS, 3, 32, 32)
    assert len(set(questions.seeds)) == 40
    assert "left out" not in questions.prompts
    pixels = torch.cat([questions.placed, questions.reference, questions.views]).flatten(1)
    assert len(pixels.unique(dim=0)) == len(pixels)  # no picture is drawn twice
    assert torch.equal(quantise(questions.placed), questions.placed)


def _hue(images: torch.Tensor) -> torch.Tensor:
    """Index of the strongest channel of each picture's most saturated pixels."""
    gap = images.max(1).values - images.min(1).values
    chosen = (gap > 0.95 * gap.flatten(1).max(1).values[:, None, None])[:, None].float()
    return ((images * chosen).sum((2, 3)) / chosen.sum((2, 3))).argmax(1)


def test_pictures_belong_to_their_prompts(picture_set: Path) -> None:
    questions = emoji_questions(picture_set, num_images=60)
    wanted = torch.tensor([("red", "green", "blue").index(prompt.split()[0]) for prompt in questions.prompts])
    assert torch.equal(_hue(questions.placed), wanted)
    assert torch.equal(_hue(questions.database)[questions.targets], wanted)
    names = _hue(questions.database).repeat_interleave(VIEWS)
    assert torch.equal(_hue(questions.views), names)


def test_database_is_upright_on_white(picture_set: Path) -> None:
    corners = emoji_questions(picture_set, num_images=2).database[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.equal(corners, torch.ones_like(corners))


def test_refusals(picture_set: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images is 1"):
        emoji_questions(picture_set, num_images=1)
    with pytest.raises(ValueError, match="no pictures of style 'noto'"):
        emoji_questions(picture_set, style="noto")
    with pytest.raises(DataError, match="does not exist"):
        emoji_questions(tmp_path)
