"""The picture that `sdxl-fast demo` draws: prompts in a grid, each with its label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = (
    "red apple",
    "sailboat",
    "tiger",
    "cactus",
    "hamburger",
    "guitar",
    "rocket",
    "butterfly",
    "ghost",
    "octopus",
    "sunflower",
    "strawberry",
    "bicycle",
    "airplane",
    "rainbow",
    "owl",
    "fire engine",
    "doughnut",
    "snowman",
    "crab",
    "mushroom",
    "television",
    "crystal ball",
    "soccer ball",
)
CELL, LABEL, GAP = 128, 20, 8  # pixels
_BACKGROUND, _TEXT = (255, 255, 255), (60, 60, 60)


def grid(pictures: Sequence[Image], labels: Sequence[str], *, columns: int = 6) -> Image:
    """Pictures of any one size, shown `CELL` px wide and high, row by row with their labels below."""
    from PIL import Image, ImageDraw, ImageFont

    if len(pictures) != len(labels):
        raise ValueError(f"{len(pictures)} pictures for {len(labels)} labels")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = CELL + GAP, CELL + LABEL + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = GAP + index % columns * width, GAP + index // columns * height
        # small pictures are enlarged by whole pixels where that fits, so that what the model drew is what one sees
        method = Image.Resampling.NEAREST if CELL % picture.width == 0 else Image.Resampling.LANCZOS
        sheet.paste(picture.resize((CELL, CELL), method), (left, top))
        draw.text((left + CELL // 2, top + CELL + LABEL // 2), label, fill=_TEXT, font=font, anchor="mm")
    return sheet
