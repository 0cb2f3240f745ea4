"""What keeps a picture out of a training set, one function per question, and the picture in the form that is kept.

SDXL-Lightning's filters (§3.6): more than 1024 px, LAION's aesthetic score above 5.5, sharpness by a Laplacian, cleaned
captions. The paper gives neither the sharpness threshold nor what cleaning did; both are ours and say so below.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from ..text import one_line
from .buckets import Size

Reason = Literal[
    "bad record",  # metadata that cannot be read
    "no caption",
    "aesthetic",
    "no picture",
    "unreadable",
    "too small",
    "blurred",
    "duplicate",
    "not finite",  # latents or embeddings
]
"""Why a picture was dropped: the first that was found."""

REASONS: tuple[Reason, ...] = get_args(Reason)
CORRUPT: tuple[Reason, ...] = ("bad record", "no picture", "unreadable", "not finite")
"""Reasons that say the input is broken, not that it was unwanted."""

MIN_SHARPNESS = 50.0
# Fifteen photographs of scikit-image at about 500 px: untouched, all but three lie between 176 and 5300 (the three, at
# 9, 24 and 65, are a retina, a motion-blurred clock and the moon: low in contrast or blurred); under a Gaussian blur of
# 1.5 px all lie below 46. The paper's own threshold is not published.

AESTHETIC_COLUMNS = ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE", "aesthetics", "laion_aesthetic")


class Filters(BaseModel):
    """Thresholds. The defaults are the paper's where it gives any."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_side: int = Field(1024, ge=0, description="pixels that the shorter side must exceed")
    min_aesthetic: float = Field(5.5, description="score to exceed, where a picture comes with one")
    aesthetic_column: str | None = Field(None, description=f"None: the first of {', '.join(AESTHETIC_COLUMNS)}")
    min_sharpness: float = Field(MIN_SHARPNESS, ge=0, description="least variance of the Laplacian, after resizing")
    deduplicate: bool = True


class Dropped(Exception):  # noqa: N818  (not an error: an answer)
    """The picture stays out; `reason` and, for people, `detail`."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


CAPTION_READ = 4096  # characters of a caption that are looked at: the text encoders read 77 tokens of it
# What begins with \S begins at a word's start: tried at every character, a long word would take its length squared.
_TAG = re.compile(r"<[A-Za-z/!][^<>]*>")  # neither "<3" nor "a < b"
_LINK = re.compile(r"(?:https?://|www\.)\S+|(?<!\S)[^\s@]+@\S+\.\w+")
_FILE_NAME = re.compile(r"(?<!\S)\S+\.(?:jpe?g|png|gif|webp|tiff?|bmp|pdf)\b", re.IGNORECASE)
_REPEATED = re.compile(r"([!?.,;:\-_=*#~|/\\+])\1{2,}")
_EMPTY_BRACKETS = re.compile(r"\(\s*\)|\[\s*\]|\{\s*\}")
_SPACE_BEFORE = re.compile(r"\s+([,.;:!?])")
_EDGES = " ,;:|_/\\*~="
_SIGNS = "+-"  # at the edges only as words of their own: not those of "C++" and "-5 °C"


def _trimmed(text: str) -> str:
    """Text with single blanks, without the punctuation that stands around it."""
    words = text.split(" ")
    content = [number for number, word in enumerate(words) if word.strip(_EDGES + _SIGNS)]
    return " ".join(words[content[0] : content[-1] + 1]).strip(_EDGES) if content else ""


def _says_something(character: str) -> bool:
    """Letters and digits of any script, and symbols that are not Latin-1's signs: emoji stand for words."""
    category = unicodedata.category(character)
    return category[0] in "LN" or (category == "So" and ord(character) > 0xFF)


def clean_caption(text: str) -> str:
    """The caption without what web pages leave in it; empty when only punctuation remains.

    HTML entities and tags, links, e-mail addresses, file names, control and zero-width characters, lone surrogates and
    empty brackets go, long runs of punctuation become one character, white space one blank. Words and their order stay.
    Of longer texts only the first `CAPTION_READ` characters are read.
    """
    text = text[:CAPTION_READ]
    for _ in range(2):  # &amp;quot; is common
        text = html.unescape(text)
    text = unicodedata.normalize("NFC", text)
    text = _FILE_NAME.sub(" ", _LINK.sub(" ", _TAG.sub(" ", text)))
    text = "".join(" " if c.isspace() or unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    # zero-width joiners hold emoji and some scripts together; the rest of the format characters hold nothing
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" or c in "\u200c\u200d")
    text = _EMPTY_BRACKETS.sub(" ", _REPEATED.sub(r"\1", text))
    text = _trimmed(_SPACE_BEFORE.sub(r"\1", " ".join(text.split())))
    for quote in ('"', "'"):
        if len(text) > 1 and text[0] == text[-1] == quote and quote not in text[1:-1]:
            text = _trimmed(text[1:-1].strip())
    return text if any(map(_says_something, text)) else ""


def check_caption(text: object) -> str:
    """The cleaned caption.

    Raises:
        Dropped: there is none, or nothing is left of it.
    """
    if text is None:
        raise Dropped("no caption", "missing")
    if not isinstance(text, str):
        raise Dropped("bad record", f"the caption is {type(text).__name__}, not text")
    if not (cleaned := clean_caption(text)):
        raise Dropped("no caption", f"nothing is left of {text[:80]!r}" if text.strip() else "empty")
    return cleaned


def check_aesthetic(facts: Mapping[str, Any], filters: Filters) -> float | None:
    """The picture's score, None where it has none.

    Raises:
        Dropped: the score is too low, or not a number.
    """
    columns = AESTHETIC_COLUMNS if filters.aesthetic_column is None else (filters.aesthetic_column,)
    value = next((facts[column] for column in columns if facts.get(column) is not None), None)
    if value is None:
        return None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Dropped("bad record", f"the aesthetic score is {str(value)[:80]!r}") from None
    if math.isinf(score):
        raise Dropped("bad record", f"the aesthetic score is {score}")
    if math.isnan(score):  # how tables write a missing number
        return None
    if not score > filters.min_aesthetic:
        raise Dropped("aesthetic", f"{score:g}, needed more than {filters.min_aesthetic:g}")
    return score


# Pillow's readers of the raster files that the web is made of, MPO among JPEG's; that of PostScript starts a program.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")


def open_picture(content: bytes, filters: Filters) -> Image.Image:
    """The picture as sRGB, turned upright by its EXIF orientation, transparency on white, first frame of an animation.

    EXIF data and colour profiles that cannot be read are passed over.

    Raises:
        Dropped: unreadable or too small. The size is read from the header, before anything is decoded.
    """
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)  # refuses more than 179 megapixels by itself
        size = Size(picture.height, picture.width)
        if min(size) <= filters.min_side:
            raise Dropped("too small", f"{size}, needed more than {filters.min_side}")
        return _to_rgb(_upright(picture))
    except (Dropped, MemoryError):
        raise
    except UnidentifiedImageError:  # its text holds an address in memory
        raise Dropped("unreadable", f"not a picture ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's readers raise a dozen types on a broken file, SyntaxError among them
        raise Dropped("unreadable", one_line(error, named=True)) from None


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()  # which turns a TIFF
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # EXIF is parsed by the rules of TIFF, and fails in as many ways
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("F"):
        raise ValueError("floating-point pixels have no agreed range")
    if picture.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion would clip at 255
        grey = np.array(picture, dtype=np.float32)
        if isinstance(clear := picture.info.get("transparency"), int):
            grey[grey == clear] = 65535
        return Image.fromarray((grey / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        cutout = _to_srgb(picture.convert("RGBA"))
        picture = Image.new("RGBA", cutout.size, "white")
        picture.alpha_composite(cutout)
        return picture.convert("RGB")
    if picture.mode in ("P", "1", "LAB", "HSV"):
        picture = picture.convert("RGB")
    return _to_srgb(picture).convert("RGB")


def _to_srgb(picture: Image.Image) -> Image.Image:
    """The picture by its colour profile in sRGB, alpha kept; as it is where there is none that fits its mode."""
    content = picture.info.get("icc_profile")
    if not content:
        return picture
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "sRGB" in ImageCms.getProfileDescription(profile):  # most are, and the way through changes pixels by one
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        found = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except MemoryError:
        raise
    except Exception:  # damaged, of another colour space than the pixels, or a Pillow without LittleCMS
        return picture
    return picture if found is None else found


def content_hash(picture: Image.Image) -> str:
    """32 hex digits of BLAKE2b over size and pixels: equal for the same picture in another lossless file."""
    digest = hashlib.blake2b(f"{picture.width} {picture.height} ".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def sharpness(picture: Image.Image) -> float:
    """Variance of the 4-neighbour Laplacian of luma in 0..255, over the inner pixels (Pech-Pacheco et al. 2000)."""
    luma = np.asarray(picture.convert("L"), dtype=np.int16)
    inner = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    return float(inner.var(dtype=np.float64)) if inner.size else 0.0


def check_sharpness(picture: Image.Image, filters: Filters) -> float:
    """The sharpness of the picture in the size it is trained at.

    Raises:
        Dropped: too low.
    """
    value = sharpness(picture)
    if value < filters.min_sharpness:
        raise Dropped("blurred", f"sharpness {value:.1f}, needed {filters.min_sharpness:g}")
    return value
