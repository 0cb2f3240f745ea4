"""Aspect-ratio buckets: to which of a few sizes a picture is brought, and what SDXL is told about how."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Size(NamedTuple):
    """Height and width in pixels; height first, as in all of SDXL's size conditioning."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


# Height by width, Podell et al. 2023, Appendix I. The list is theirs: 704x1344 has no transposed twin.
_PUBLISHED = """
    512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472
    704x1408 704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024
    1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832 1216x832 1280x768 1344x768 1408x704
    1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512
"""


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Sizes from "1024x1024, 832x1216": HEIGHTxWIDTH, separated by commas or spaces.

    Raises:
        ValueError: a part is not of that form.
    """
    sizes = []
    for part in text.replace(",", " ").split():
        if not (match := re.fullmatch(r"(\d+)x(\d+)", part)):
            raise ValueError(f"bucket {part!r} is not of the form HEIGHTxWIDTH, as in 832x1216")
        sizes.append(Size(int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(sizes))


SDXL_BUCKETS = parse_sizes(_PUBLISHED)
"""The 40 sizes SDXL was trained on, all multiples of 64 and at most 1024² pixels."""

NATIVE = 1024
"""Side of the square among SDXL's buckets."""


def make_buckets(kind: str, resolution: int, multiple: int) -> tuple[Size, ...]:
    """The buckets of a data set.

    Args:
        kind: "sdxl" for the published list scaled to `resolution`, "square" for the one size the Lightning paper used,
            or a list as `parse_sizes` reads it.
        resolution: side of the square bucket, pixels.
        multiple: what both sides must be multiples of: pixels per latent times the UNet's own downsampling.

    Raises:
        ValueError: a side is not a multiple of `multiple`, or the list is empty.
    """
    if kind == "sdxl":

        def side(published: int) -> int:
            # the published sides are multiples of 64; scaled, they fall on the nearest side the model can take
            return max(multiple, round(published * resolution / (NATIVE * multiple)) * multiple)

        buckets = [Size(side(size.height), side(size.width)) for size in SDXL_BUCKETS]
    else:
        buckets = [Size(resolution, resolution)] if kind == "square" else list(parse_sizes(kind))
    if not buckets:
        raise ValueError(f"buckets is {kind!r}; allowed: sdxl, square, or a list as in '1024x1024,832x1216'")
    for bucket in buckets:
        if bucket.height % multiple or bucket.width % multiple or 0 in bucket:
            raise ValueError(f"bucket {bucket}: this model takes only multiples of {multiple} pixels, at least one")
    return tuple(dict.fromkeys(buckets))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest by its logarithm; of equally near ones the first."""
    ratio = math.log(size.width / size.height)
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - ratio))


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture of `original` size becomes one of `target` size: resized to `resized`, then cropped at `crop`."""

    original: Size
    resized: Size
    crop: tuple[int, int]  # top, left, in pixels of the resized picture
    target: Size

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning in its order: original size, crop, target size."""
        return (*self.original, *self.crop, *self.target)


def fit(original: Size, target: Size, position: tuple[float, float] = (0.5, 0.5)) -> Fit:
    """The smallest resize of `original` that covers `target`, and where to cut.

    Args:
        original: size of the picture.
        target: its bucket.
        position: of the cut, vertically and horizontally: 0 top or left, 0.5 centred, 1 bottom or right.
    """
    scale = max(target.height / original.height, target.width / original.width)
    # one side is exact; the other may miss its target by the rounding alone
    height = max(target.height, round(original.height * scale))
    width = max(target.width, round(original.width * scale))
    top = round((height - target.height) * position[0])
    left = round((width - target.width) * position[1])
    return Fit(original, Size(height, width), (top, left), target)
