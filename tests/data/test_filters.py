"""Each filter by example, and every kind of picture file that has to become RGB."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter, ImageOps

from sdxl_fast.data.filters import (
    CAPTION_READ,
    Dropped,
    Filters,
    check_aesthetic,
    check_caption,
    check_sharpness,
    clean_caption,
    content_hash,
    open_picture,
    sharpness,
)

SMALL = Filters(min_side=8)


def _file(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format=kind, **options)
    return out.getvalue()


def _noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _reason(call: Any, *arguments: Any) -> str:
    with pytest.raises(Dropped) as caught:
        call(*arguments)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a red  apple\non a\ttable", "a red apple on a table"),
        ("Tom &amp; Jerry &amp;quot;live&amp;quot;", 'Tom & Jerry "live"'),
        ("<b>Sale</b> shoes <br/> only today", "Sale shoes only today"),
        ("see https://x.example/a?b=1 for a cat, or www.cats.example", "see for a cat, or"),
        ("photo IMG_2041.JPG of the sea", "photo of the sea"),
        ("write to me@example.com about dogs", "write to about dogs"),
        ("great!!!!! view --- at dawn ...", "great! view - at dawn."),
        ("a\u200bb \ufeffc\x00d", "ab c d"),
        ('"a quoted title"', "a quoted title"),
        ('"one" and "two"', '"one" and "two"'),
        ("  | - sunset -  ", "sunset"),
        ("a cat ( ) [  ]", "a cat"),
        ("café", "caf\u00e9"),
        ("猫が寝ている", "猫が寝ている"),
        ("🍎", "🍎"),
        ("1967 Ford, 3/4 view (front)", "1967 Ford, 3/4 view (front)"),
        ("C++", "C++"),
        ("- C++ at -5 °C -", "C++ at -5 °C"),
        ("a <3 dogs and > 2 cats", "a <3 dogs and > 2 cats"),
        ("I &lt;3 <a href='x'>you</a><!-- note -->", "I <3 you"),
        ("...", ""),
        ("—", ""),
        ("……", ""),
        ("• ©", ""),
        ("IMG_1.jpg", ""),
        ("", ""),
    ],
)
def test_captions_are_cleaned(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned
    assert clean_caption(cleaned) == cleaned
    if cleaned:
        assert check_caption(text) == cleaned
    else:
        assert _reason(check_caption, text) == "no caption"


@pytest.mark.parametrize("part", ["a", "@", "a@", "a.", ".jpg", "<", "( ", "&amp;", "- ", "-=", " ,"])
def test_a_long_caption_takes_no_time(part: str) -> None:
    text = part * (100_000 // len(part))
    begun = time.perf_counter()
    assert len(clean_caption(text)) <= CAPTION_READ
    assert time.perf_counter() - begun < 1


def test_captions_that_are_none() -> None:
    assert _reason(check_caption, None) == "no caption"
    assert _reason(check_caption, ["a", "b"]) == "bad record"


def test_aesthetic_score() -> None:
    filters = Filters()
    assert check_aesthetic({"aesthetic": 5.51}, filters) == 5.51
    assert check_aesthetic({"AESTHETIC_SCORE": "6"}, filters) == 6.0
    assert check_aesthetic({"aesthetic": None, "aesthetic_score": 7}, filters) == 7.0
    for missing in ({}, {"aesthetic": None}, {"aesthetic": float("nan")}, {"mine": 1.0}):
        assert check_aesthetic(missing, filters) is None
    assert _reason(check_aesthetic, {"aesthetic": 5.5}, filters) == "aesthetic"  # the paper says greater
    assert _reason(check_aesthetic, {"aesthetic": "high"}, filters) == "bad record"
    assert _reason(check_aesthetic, {"mine": 1.0}, Filters(aesthetic_column="mine")) == "aesthetic"
    assert check_aesthetic({"aesthetic": 1.0, "mine": 6}, Filters(aesthetic_column="mine")) == 6.0


def test_minimum_side_is_exceeded_not_met() -> None:
    filters = Filters()
    for size in ((1024, 3000), (3000, 1024), (1023, 1023)):
        assert _reason(open_picture, _file(Image.new("L", size), "JPEG"), filters) == "too small"
    assert open_picture(_file(Image.new("L", (1025, 1025)), "JPEG"), filters).size == (1025, 1025)


def test_a_small_picture_is_told_from_its_header_alone() -> None:
    content = _file(Image.fromarray(_noise(64, 64, 3)))
    assert _reason(open_picture, content[:200], Filters(min_side=64)) == "too small"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "flipped"])
def test_broken_files_are_unreadable(kind: str, damage: str) -> None:
    content = _file(Image.fromarray(_noise(64, 64, 3)), kind)
    broken = {
        "empty": b"",
        "text": b"<html>404</html>",
        "half": content[: len(content) // 2],
        "flipped": content[:8] + bytes(255 - byte for byte in content[8:60]) + content[60:],
    }[damage]
    assert _reason(open_picture, broken, SMALL) == "unreadable"


def test_a_decompression_bomb_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
    assert _reason(open_picture, _file(Image.new("RGB", (64, 64))), SMALL) == "unreadable"


def test_grey_palette_and_cmyk_become_rgb() -> None:
    picture = Image.fromarray(_noise(16, 16, 3))
    for mode, kind in (("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG")):
        stored = picture.convert(mode)
        found = open_picture(_file(stored, kind, **({"quality": 100} if kind == "JPEG" else {})), SMALL)
        assert (found.mode, found.size) == ("RGB", (16, 16))
        if kind == "PNG":
            assert np.array_equal(np.asarray(found), np.asarray(stored.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    found = np.asarray(open_picture(_file(Image.fromarray(ramp)), SMALL))
    assert np.array_equal(found[..., 0].ravel(), np.arange(256))


def test_transparency_is_white() -> None:
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[:8, :, 3] = 255
    found = np.asarray(open_picture(_file(Image.fromarray(pixels)), SMALL))
    assert (found[:8] == 0).all() and (found[8:] == 255).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30] + 255 * [0, 0, 0])
    found = np.asarray(open_picture(_file(palette, transparency=0), SMALL))
    assert (found == 255).all()


def test_exif_orientation_is_applied() -> None:
    picture = Image.new("RGB", (40, 20), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert open_picture(_file(picture, "JPEG", exif=exif), SMALL).size == (20, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows_own(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = _file(Image.fromarray(_noise(24, 16, 3)), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(np.asarray(open_picture(content, SMALL)), np.asarray(expected))


def test_damaged_exif_is_passed_over() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x02\0\xff\xff\xff\x7f\xff\xff\xff\xff" * 2
    found = open_picture(_file(Image.new("RGB", (40, 20), "black"), "JPEG", exif=exif), SMALL)
    assert found.size == (40, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "getexif", lambda self: 1 / 0)
        assert open_picture(_file(Image.new("RGB", (40, 20))), SMALL).size == (40, 20)


def test_sixteen_bit_grey_may_be_transparent() -> None:
    grey = np.full((16, 16), 300, dtype=np.uint16)
    grey[8:] = 40000
    found = np.asarray(open_picture(_file(Image.fromarray(grey), transparency=300), SMALL))
    assert (found[:8] == 255).all() and (found[8:] == round(40000 / 257)).all()


def test_colour_profiles_are_followed() -> None:
    """A profile like sRGB's with the primaries of red and blue exchanged: its red is our blue."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(srgb.replace(b"s\0R\0G\0B", b"o\0w\0n\0 ").replace(b"sRGB", b"own "))
    red, blue = (swapped.index(tag, 128) for tag in (b"rXYZ", b"bXYZ"))
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    for mode in ("RGB", "RGBA", "P"):
        picture = Image.new("RGB", (16, 16), (255, 0, 0)).convert(mode)
        for profile, colour in ((bytes(swapped), (0, 0, 255)), (srgb, (255, 0, 0)), (b"damaged", (255, 0, 0))):
            found = np.asarray(open_picture(_file(picture, icc_profile=profile), SMALL), dtype=int)
            assert np.abs(found - colour).max() <= 2, (mode, profile[:8])
    grey = Image.new("L", (16, 16), 100)  # not of its mode: passed over
    assert open_picture(_file(grey, icc_profile=bytes(swapped)), SMALL).getpixel((0, 0)) == (100, 100, 100)


def test_no_other_reader_is_tried() -> None:
    for kind in ("EPS", "PPM", "ICO"):
        with pytest.raises(Dropped) as caught:
            open_picture(_file(Image.new("RGB", (32, 32)), kind), SMALL)
        assert caught.value.detail == "not a picture (JPEG, PNG, GIF, BMP, TIFF, WEBP)"


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    content = _file(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert open_picture(content, SMALL).getpixel((0, 0)) == (255, 0, 0)


def test_the_hash_is_of_the_pixels() -> None:
    picture = Image.fromarray(_noise(16, 24, 3))
    png, webp = (open_picture(_file(picture, kind, **options), SMALL) for kind, options in (
        ("PNG", {}), ("WEBP", {"lossless": True}),
    ))  # fmt: skip
    assert content_hash(png) == content_hash(webp)
    other = picture.copy()
    other.putpixel((3, 3), tuple(255 - value for value in picture.getpixel((3, 3))))
    turned = Image.frombytes("RGB", (16, 24), picture.tobytes())  # the same bytes in another shape
    assert len({content_hash(one) for one in (picture, other, turned)}) == 3


def test_sharpness_against_the_definition() -> None:
    picture = Image.fromarray(_noise(20, 30, 3))
    luma = np.asarray(picture.convert("L"), dtype=np.float64)
    found = [
        4 * luma[y, x] - luma[y - 1, x] - luma[y + 1, x] - luma[y, x - 1] - luma[y, x + 1]
        for y in range(1, 19)
        for x in range(1, 29)
    ]
    assert sharpness(picture) == pytest.approx(np.var(found), rel=1e-12)
    assert sharpness(Image.new("RGB", (2, 2))) == 0.0


def test_the_default_threshold_separates_edges_from_blur() -> None:
    """Discs with hard edges, as drawn and under a blur of 2 px."""
    y, x = np.mgrid[:128, :128]
    discs = ((((x % 32) - 16) ** 2 + ((y % 32) - 16) ** 2) < 100) * np.uint8(180)
    picture = Image.fromarray(discs.astype(np.uint8)).convert("RGB")
    assert check_sharpness(picture, Filters()) > 500
    assert _reason(check_sharpness, picture.filter(ImageFilter.GaussianBlur(2)), Filters()) == "blurred"
    assert check_sharpness(picture.filter(ImageFilter.GaussianBlur(2)), Filters(min_sharpness=0)) > 0
