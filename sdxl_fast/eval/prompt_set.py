# SPDX-License-Identifier: Apache-2.0
"""Pictures of a list of prompts in a folder: drawn in batches, one file each, so that a run stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdxl_fast.errors import DataError
from sdxl_fast.eval.features import check_images
from sdxl_fast.eval.sheets import to_pil
from sdxl_fast.eval.sources import Generate
from sdxl_fast.files import replacing
from sdxl_fast.random import derive_seed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """Prompts of a file: one per line, or in a `.jsonl` JSON objects with `text`; at most the first `limit`.

    UTF-8, with a byte order mark or without; empty lines are passed over.

    Raises:
        DataError: no such file, another encoding, no prompts, or a line that is no object with `text`.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as prompts in UTF-8 ({error})") from error
    lines = [(number, line.strip()) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no prompts")
    lines = lines[:limit]
    return [_text_of(line, f"{path} line {number}") if path.suffix == ".jsonl" else line for number, line in lines]


def _text_of(line: str, where: str) -> str:
    """`text` of a JSON object; raises DataError for anything else."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise DataError(f'{where}: is {line[:80]}; allowed: an object whose text is not empty, as {{"text": "a cat"}}')
    return row["text"].strip()


def draw_set(
    folder: str | Path,
    prompts: Sequence[str],
    generate: Generate,
    *,
    seed: int = 0,
    batch: int = 8,
    settings: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Draws what is missing of one picture per prompt, and returns all files in the prompts' order.

    Args:
        folder: made if it is not there; gets `000000.png` and so on, and `settings.json`.
        prompts: what to draw; the seed of each derives from `seed` and its position.
        generate: (prompts, seeds) -> pictures, float [N, 3, H, W] in 0..1.
        seed: of the whole set.
        batch: pictures drawn at once.
        settings: how they are drawn; pictures drawn otherwise, or of other prompts, are not mixed with these.

    Raises:
        DataError: the folder holds pictures of other settings or prompts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"seed": seed, **(settings or {}), "prompts": list(prompts)}
    record = folder / "settings.json"
    files = [folder / f"{index:06d}.png" for index in range(len(prompts))]
    if record.is_file() and any(folder.glob("*[0-9].png")):
        found = json.loads(record.read_text())
        other = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if other:
            raise DataError(f"{folder} holds pictures with other {', '.join(other)}; give another folder or delete it")
    else:
        with replacing(record) as writing:
            writing.write_text(json.dumps(wanted, indent=1, ensure_ascii=False))
    # A picture is not waited for until it is on the disk: after a crash of the machine it may be empty.
    missing = [index for index, file in enumerate(files) if not file.is_file() or not file.stat().st_size]
    for start in tqdm(range(0, len(missing), batch), desc=folder.name, unit="batch", disable=not missing):
        chosen = missing[start : start + batch]
        seeds = [derive_seed(seed, index, "prompt set") >> 31 for index in chosen]  # 32 bits: any pipeline takes them
        pictures = check_images(generate([prompts[index] for index in chosen], seeds).float().cpu())
        for index, picture in zip(chosen, to_pil(pictures), strict=True):
            with replacing(files[index], durable=False) as writing:
                picture.save(writing, format="PNG")
    return files


def pictures_of(folder: str | Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        DataError: there are none.
    """
    found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not found:
        raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return found


def read_picture(path: Path) -> Tensor:
    """float32 [3, H, W] in 0..1."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255.0


def batches(files: Sequence[Path], size: int = 16) -> Iterator[Tensor]:
    """The pictures in order, [n, 3, H, W], neighbours of one size together."""
    waiting: list[Tensor] = []
    for file in files:
        picture = read_picture(file)
        if waiting and (len(waiting) == size or picture.shape != waiting[0].shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(picture)
    if waiting:
        yield torch.stack(waiting)
