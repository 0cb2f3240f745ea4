"""Is this weight file safe and whole? Answered from its first bytes and its length, before any loader opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_MAX_HEADER = 100_000_000  # the format's own limit


def check_safetensors(path: str | Path) -> dict[str, Any]:
    """Check that `path` is a whole safetensors file and return its header (tensor name to dtype, shape and offsets).

    Nothing is executed and no tensor is read.

    Raises:
        ModelError: missing, a pickle whatever its name, a pointer of git LFS, truncated, or with a broken header.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(f"{path}: a pickled weight file, which could run code; only .safetensors files are loaded")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise ModelError(f"{path}: {_what_it_is(start)}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"{path}: corrupt (its safetensors header cannot be read)") from None
    if 8 + length + end != size:
        raise ModelError(f"{path}: truncated or corrupt ({size} bytes, its header promises {8 + length + end})")
    return header


def _what_it_is(start: bytes) -> str:
    # torch.save writes a zip since 1.6, before it a bare pickle of protocol 2 or later
    if start.startswith(b"PK\x03\x04") or (len(start) == 8 and start[0] == 0x80 and 2 <= start[1] <= 5):
        return "a pickled weight file in disguise, which could run code; it was not loaded"
    if start == b"version ":
        return "a git LFS pointer, not the weights; fetch them with `git lfs pull`"
    return "corrupt or truncated (no safetensors header)"
