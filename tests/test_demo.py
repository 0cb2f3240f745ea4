"""The demo's grid shows every picture under its own label."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdxl_fast.demo import CELL, GAP, LABEL, PROMPTS, grid


def test_every_picture_lands_in_its_cell() -> None:
    colours = [(10 * k, 255 - 10 * k, 99) for k in range(7)]
    sheet = np.asarray(grid([Image.new("RGB", (16, 16), c) for c in colours], [f"n{k}" for k in range(7)], columns=3))
    assert sheet.shape == (3 * (CELL + LABEL + GAP) + GAP, 3 * (CELL + GAP) + GAP, 3)
    for k, colour in enumerate(colours):
        top, left = GAP + k // 3 * (CELL + LABEL + GAP), GAP + k % 3 * (CELL + GAP)
        assert (sheet[top : top + CELL, left : left + CELL] == colour).all()
        label = sheet[top + CELL : top + CELL + LABEL, left : left + CELL]
        assert label.min() < 128  # there is text
        assert (label[:, :2] == 255).all()  # and it fits


def test_every_prompt_fits_below_its_picture() -> None:
    sheet = np.asarray(grid([Image.new("RGB", (64, 64))] * len(PROMPTS), PROMPTS))
    gaps = [sheet[:, GAP + column * (CELL + GAP) - GAP : GAP + column * (CELL + GAP)] for column in range(6)]
    assert all((gap == 255).all() for gap in gaps)
    assert len(set(PROMPTS)) == len(PROMPTS)


def test_labels_and_pictures_must_match() -> None:
    with pytest.raises(ValueError, match="1 pictures for 2 labels"):
        grid([Image.new("RGB", (8, 8))], ["a", "b"])
