# SPDX-License-Identifier: Apache-2.0
"""A small picture set in the emoji set's format, and a feature network that needs no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

SHAPES = ("disc", "square", "triangle", "ring")
COLOURS = ("red", "green", "blue")


def _draw(shape: str, colour: str) -> Image.Image:
    picture = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    if shape == "disc":
        pen.ellipse((14, 14, 114, 114), fill=colour)
    elif shape == "square":
        pen.rectangle((20, 20, 108, 108), fill=colour)
    elif shape == "triangle":
        pen.polygon(((64, 10), (118, 110), (10, 110)), fill=colour)
    else:
        pen.ellipse((14, 14, 114, 114), outline=colour, width=16)
    return picture


@pytest.fixture(scope="session")
def picture_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training pictures and one of another split."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for shape in SHAPES:
        for colour in COLOURS:
            name = f"{colour} {shape}"
            rows.append({"file_name": f"{name.replace(' ', '-')}.png", "text": name, "name": name, "split": "train"})
            _draw(shape, colour).save(folder / rows[-1]["file_name"])
    rows.append({**rows[0], "text": "left out", "name": "left out", "split": "held_out"})
    lines = [json.dumps({**row, "style": "fluent-3d", "category": "shape"}) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


class ColourGrid:
    """Pictures averaged down to 6 x 6: enough to tell coloured shapes apart, and deterministic."""

    def __call__(self, images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(images, 6).flatten(1)

    def provenance(self) -> dict[str, str | int]:
        return {"network": "colour grid", "input_size": 6}


@pytest.fixture
def colour_grid() -> ColourGrid:
    return ColourGrid()
