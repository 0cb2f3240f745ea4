"""For tests: small pictures with edges, files of them, tars and folders of those, and shards made of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.config import PrepareConfig
from ..data.filters import Filters
from ..data.precompute import prepare
from ..data.report import Report


def picture(seed: int, height: int = 48, width: int = 48) -> Image.Image:
    """Blocks of random colours: sharp, and different for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)[:height, :width])


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The picture's file."""
    out = io.BytesIO()
    image.save(out, format=kind)
    return out.getvalue()


def write_folder(folder: Path, rows: list[tuple[Any, bytes | None]]) -> Path:
    """An image folder: each row is a metadata object (or a raw line) and the bytes of its file, None for no file."""
    folder.mkdir(parents=True)
    lines = []
    for facts, content in rows:
        lines.append(facts if isinstance(facts, str) else json.dumps(facts))
        if content is not None:
            (folder / facts["file_name"]).write_bytes(content)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def good_rows(count: int, first: int = 0) -> list[tuple[dict[str, Any], bytes]]:
    """Rows that pass every filter at 32 px, in several aspect ratios."""
    sizes = [(48, 48), (40, 72), (72, 40), (64, 64)]
    return [
        (
            {"file_name": f"{first + k:04d}.png", "text": f"a picture of {first + k}", "aesthetic": 6.0},
            encoded(picture(first + k, *sizes[(first + k) % 4])),
        )
        for k in range(count)
    ]


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def good_files(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """The same samples as `good_rows` as files of a tar."""
    files = []
    for facts, content in good_rows(count, first):
        key = facts["file_name"].removesuffix(".png")
        files += [(f"{key}.png", content), (f"{key}.txt", facts["text"].encode())]
        files += [(f"{key}.json", json.dumps({"aesthetic": facts["aesthetic"]}).encode())]
    return files


def small_config(source: Path | str, out: Path, model: Path, **settings: Any) -> PrepareConfig:
    """For pictures over 32 px, six rows a shard."""
    chosen = {"filters": Filters(min_side=32), "rows_per_shard": 6, **settings}
    return PrepareConfig(source=str(source), out=out, model=str(model), **chosen)


def prepare_small(source: Path | str, out: Path, model: Path, **settings: Any) -> Report:
    """`data prepare` by `small_config`; `ranks`: (rank, world size) of one after the other."""
    ranks = settings.pop("ranks", [(0, 1)])
    config = small_config(source, out, model, **settings)
    reports = [prepare(config, rank=rank, world_size=size, log=lambda _: None) for rank, size in ranks]
    assert all(report is None for report in reports[:-1])  # only the last one finds everything there
    assert reports[-1] is not None
    return reports[-1]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
