# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: the same prompts and seeds down, the sources across."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdxl_fast.files import replacing

CELL = 128  # pictures smaller than this are enlarged towards it by a whole factor
MARGIN = 6


def to_pil(images: Tensor) -> list[Image.Image]:
    """Float [N, 3, H, W] in 0..1 to RGB pictures."""
    pixels = (images.detach().float().clamp(0.0, 1.0) * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _enlarge(picture: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return picture.convert("RGB")
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _check(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str]) -> tuple[int, int]:
    """The common size of all pictures."""
    if not columns or not rows:
        raise ValueError(f"{len(columns)} columns and {len(rows)} rows; allowed: at least one of each")
    for name, pictures in columns.items():
        if len(pictures) != len(rows):
            raise ValueError(f"column {name!r} has {len(pictures)} pictures for {len(rows)} rows; allowed: one each")
    sizes = {picture.size for pictures in columns.values() for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"pictures of sizes {sorted(sizes)}; allowed: one size on a sheet")
    return next(iter(sizes))


def draw_contact_sheet(
    columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str], *, factor: int | None = None
) -> Image.Image:
    """Draws the sheet in memory; arguments as `contact_sheet`."""
    width, height = _check(columns, rows)
    factor = factor or max(1, CELL // max(width, height))
    width, height = width * factor, height * factor
    font_size = max(12, min(width, height) // 9)
    font = ImageFont.load_default(size=font_size)
    line = round(font_size * 1.3)
    letters = max(4, int(1.6 * width / (0.58 * font_size)))
    labels = [textwrap.wrap(text, letters)[: max(1, height // line)] or [""] for text in rows]
    titles = [textwrap.wrap(name, max(4, int(width / (0.58 * font_size)))) or [""] for name in columns]
    left = MARGIN + max(round(font.getlength(text)) for label in labels for text in label) + 2 * MARGIN
    top = MARGIN + max(map(len, titles)) * line + MARGIN
    size = (left + len(columns) * (width + MARGIN), top + len(rows) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        x = left + i * (width + MARGIN) + width // 2
        for j, text in enumerate(title):
            pen.text((x, MARGIN + j * line), text, fill="black", font=font, anchor="ma")
    for i, label in enumerate(labels):
        y = top + i * (height + MARGIN) + (height - len(label) * line) // 2
        for j, text in enumerate(label):
            pen.text((left - 2 * MARGIN, y + j * line), text, fill="black", font=font, anchor="ra")
    for i, pictures in enumerate(columns.values()):
        for j, picture in enumerate(pictures):
            sheet.paste(_enlarge(picture, factor), (left + i * (width + MARGIN), top + j * (height + MARGIN)))
    return sheet


def contact_sheet(
    columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str], path: str | Path, *, factor: int | None = None
) -> Path:
    """Writes a labelled sheet as PNG, whole or not at all.

    Args:
        columns: title to pictures, one per row, all of one size.
        rows: label of each row, usually its prompt.
        path: file to write.
        factor: whole enlargement (Lanczos); None enlarges small pictures to about 128 px.

    Raises:
        ValueError: nothing to draw, a column of another length, or pictures of several sizes.
    """
    path = Path(path)
    sheet = draw_contact_sheet(columns, rows, factor=factor)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return path
