"""The emoji set from small archives of the real packages' layout."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_fast.data import emoji
from sdxl_fast.errors import DataError

ENTRIES = [
    ("RED APPLE", "1F34E", "food-fruit", (200, 20, 20)),
    ("GREEN APPLE", "1F34F", "food-fruit", (20, 200, 20)),
    ("APPLE AGAIN", "1F35E", "food-fruit", (202, 21, 20)),
    ("TIGER", "1F405", "animal-mammal", (230, 150, 20)),
    ("FLAG", "1F3F4", "country-flag", (0, 0, 0)),
]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _picture(colour: tuple[int, int, int], size: int, suffix: str) -> bytes:
    pixels = np.zeros((size, size, 4), dtype=np.uint8)
    pixels[size // 4 : -size // 4, size // 4 : -size // 4] = (*colour, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=suffix[1:].upper(), lossless=True)
    return stream.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Archives as `npm pack` names them, with the pinned hashes replaced by theirs."""
    import base64
    import hashlib

    folder = tmp_path / "packages"
    folder.mkdir()
    table = [
        {
            "name": name,
            "unified": code,
            "non_qualified": None,
            "category": "Flags" if "flag" in sub else "Food",
            "subcategory": sub,
            "sort_order": index,
        }
        for index, (name, code, sub, _) in enumerate(ENTRIES)
    ]
    sources = {}
    for style, package in emoji.SOURCES.items():
        path = folder / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
        with tarfile.open(path, "w:gz") as archive:
            _add(archive, "package/package.json", b"{}")
            if style == "noto":
                _add(archive, "package/emoji.json", json.dumps(table).encode())
            for _, code, _, colour in ENTRIES:
                name = f"{package.folder}{code.lower()}{package.suffix}"
                _add(archive, name, _picture(colour, 64, package.suffix))
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        sources[style] = replace(package, sha512=digest)
    monkeypatch.setattr(emoji, "SOURCES", sources)
    return folder


def test_build_writes_pictures_metadata_and_licences(packages: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    out = emoji.build(tmp_path / "set", packages=packages, log=lines.append)
    rows = emoji.load_metadata(out)
    assert len(rows) == 2 * len(ENTRIES)
    assert all((out / row["file_name"]).is_file() for row in rows)
    assert set(rows[0]) == {"file_name", "text", "split", "style", "name", "category"}
    split = {row["name"]: row["split"] for row in rows}
    assert split["flag"] == "variant", "kinds full of look-alikes do not train"
    assert split["apple again"] == "variant", "a copy of an earlier picture does not train"
    assert split["red apple"] in ("train", "held_out")
    captions = {row["style"]: row["text"] for row in rows if row["name"] == "tiger"}
    assert captions == {"fluent-3d": "tiger", "noto": "tiger, noto style"}
    assert json.loads((out / "LICENCES.json").read_text())["noto"]["version"] == "16.0.0"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    emoji.build(out, packages=packages, log=lines.append)
    assert lines[-1].endswith("is already there")


def test_the_held_out_rule_is_fixed_by_the_name() -> None:
    names = [f"name {index}" for index in range(2000)]
    held = [name for name in names if emoji.split_of(name) == "held_out"]
    assert 60 < len(held) < 140
    assert held == [name for name in reversed(names) if emoji.split_of(name) == "held_out"][::-1]


def test_a_damaged_archive_is_refused_and_leaves_nothing(packages: Path, tmp_path: Path) -> None:
    archive = next(packages.glob("lobehub*"))
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="sha512"):
        emoji.build(tmp_path / "set", packages=packages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packages"]


def test_missing_npm_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm is not on PATH.*--packages DIR"):
        emoji.build(tmp_path / "set")


def test_a_folder_that_is_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="holds no metadata"):
        emoji.build(tmp_path / "set")
    assert (tmp_path / "set" / "mine.txt").read_text() == "keep"
