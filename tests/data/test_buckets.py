"""Buckets: SDXL's own list, the nearest one, and how a picture is brought to it."""

from __future__ import annotations

import random

import pytest

from sdxl_fast.data.buckets import SDXL_BUCKETS, Size, fit, make_buckets, nearest_bucket, parse_sizes

# The aspect ratios (height over width) printed beside the sizes in Podell et al. 2023, Appendix I.
PRINTED = (
    "0.25 0.26 0.27 0.28 0.32 0.33 0.35 0.4 0.42 0.48 0.5 0.52 0.57 0.6 0.68 0.72 0.78 0.82 0.88 0.94 "
    "1.0 1.07 1.13 1.21 1.29 1.38 1.46 1.67 1.75 2.0 2.09 2.4 2.5 2.89 3.0 3.11 3.62 3.75 3.88 4.0"
)


def test_the_published_list() -> None:
    assert " ".join(str(round(size.height / size.width, 2)) for size in SDXL_BUCKETS) == PRINTED
    assert all(size.height % 64 == size.width % 64 == 0 for size in SDXL_BUCKETS)
    assert all(0.9 * 1024**2 < size.height * size.width <= 1024**2 for size in SDXL_BUCKETS)
    assert make_buckets("sdxl", 1024, 32) == make_buckets("sdxl", 1024, 64) == SDXL_BUCKETS


def test_scaled_lists() -> None:
    assert make_buckets("sdxl", 512, 32) == tuple(Size(s.height // 2, s.width // 2) for s in SDXL_BUCKETS)
    small = make_buckets("sdxl", 64, 16)
    assert all(side % 16 == 0 and side > 0 for size in small for side in size)
    assert Size(64, 64) in small and Size(32, 128) in small and len(set(small)) == len(small) < 40
    assert make_buckets("square", 1024, 32) == (Size(1024, 1024),)
    assert make_buckets("1024x1024, 832x1216 1024x1024", 1024, 32) == (Size(1024, 1024), Size(832, 1216))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("832*1216", "HEIGHTxWIDTH"), ("", "allowed: sdxl"), ("1000x1024", "multiples of 32"), ("0x32", "at least one")],
)
def test_impossible_buckets(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_buckets(kind, 1024, 32)
    with pytest.raises(ValueError, match="multiples of 32"):
        make_buckets("square", 1000, 32)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ("1500x1500", "1024x1024"),
        ("3000x2000", "1216x832"),
        ("2000x3000", "832x1216"),
        ("1080x1920", "768x1344"),
        ("1100x9000", "512x2048"),
        ("1030x1000", "1024x1024"),
    ],
)
def test_nearest(size: str, bucket: str) -> None:
    ((wanted,), (original,)) = parse_sizes(bucket), parse_sizes(size)
    assert nearest_bucket(original, SDXL_BUCKETS) == wanted


def test_fit_covers_the_bucket_with_the_smallest_resize() -> None:
    draw = random.Random(0)
    for _ in range(500):
        original = Size(draw.randint(20, 5000), draw.randint(20, 5000))
        target = draw.choice(SDXL_BUCKETS)
        position = (draw.random(), draw.random())
        found = fit(original, target, position)
        room = [have - want for have, want in zip(found.resized, target, strict=True)]
        assert min(room) == 0
        assert all(0 <= cut <= left for cut, left in zip(found.crop, room, strict=True))
        # the aspect ratio stays, up to rounding to whole pixels
        assert abs(found.resized.height * original.width / original.height - found.resized.width) <= max(
            0.5, 0.5 * original.width / original.height, 0.5 * original.height / original.width
        )


def test_time_ids_say_original_crop_target() -> None:
    found = fit(Size(2000, 3000), Size(832, 1216))
    assert found.resized == (832, 1248)
    assert found.time_ids == (2000, 3000, 0, 16, 832, 1216)
    assert fit(Size(3000, 2000), Size(1216, 832), (0.0, 1.0)).crop == (0, 0)
    assert fit(Size(3000, 2000), Size(1216, 832), (1.0, 0.0)).crop == (32, 0)
    assert fit(Size(1024, 1024), Size(1024, 1024)).time_ids == (1024, 1024, 0, 0, 1024, 1024)
