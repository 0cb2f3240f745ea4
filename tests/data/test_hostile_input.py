"""Input that nobody would make on purpose: it is counted and listed, and the rest of the set is made."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sdxl_fast.data.buckets import Size
from sdxl_fast.data.config import PrepareConfig
from sdxl_fast.data.filters import Dropped, Filters
from sdxl_fast.data.part import examine
from sdxl_fast.data.rows import Row
from sdxl_fast.data.shards import LatentShards
from sdxl_fast.testing.pictures import encoded, good_files, good_rows, picture, prepare_small, write_folder, write_tar

pytest.importorskip("webdataset", reason="the extra data is not installed")

DEEP = "[" * 100_000


def _dropped(folder: Path) -> dict[str, str]:
    lines = (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}


def test_names_and_captions_that_are_not_unicode(toy_folder: Path, tmp_path: Path) -> None:
    image = encoded(picture(100))
    rows: list[tuple[Any, bytes | None]] = [
        *good_rows(2),
        (r'{"file_name": "half \ud83d.png", "text": "a name"}', None),
        (r'{"file_name": "nul \u0000.png", "text": "a name"}', None),
        (r'{"file_name": "/\ud83d.png", "text": "a name"}', None),
        (f'{{"file_name": "deep.png", "text": {DEEP}', None),
        ({"file_name": "half.png", "text": "half a \ud83d pair"}, image),
        ({"file_name": "score.png", "text": "a score", "aesthetic": 10**400}, image),
        ({"file_name": "endless.png", "text": "a score", "aesthetic": float("inf")}, image),
    ]
    report = prepare_small(write_folder(tmp_path / "set", rows), tmp_path / "out", toy_folder)
    assert (report.input, report.kept) == (9, 3)
    assert _dropped(tmp_path / "out") == dict.fromkeys(
        ["half \\ud83d.png", "nul \0.png", "/\\ud83d.png", "metadata.jsonl:6", "score.png", "endless.png"], "bad record"
    )
    data = LatentShards(tmp_path / "out")
    assert "half a pair" in {data[position].caption for position in range(len(data))}


def test_members_of_tars_that_are_not_unicode(toy_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    latin = [(name.replace("0000", "caf\udce9"), content) for name, content in good_files(1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile, "DEFAULT_FORMAT", tarfile.GNU_FORMAT)
        deep = [("deep.png", encoded(picture(9))), ("deep.json", DEEP.encode())]
        write_tar(path, [*latin, *deep, *good_files(2, 1)])
    report = prepare_small(path, tmp_path / "out", toy_folder)
    assert (report.input, report.kept, report.dropped["bad record"]) == (4, 3, 1)
    data = LatentShards(tmp_path / "out")
    names = {data[position].facts["source"] for position in range(len(data))}
    assert names == {"x.tar/caf\\udce9", "x.tar/0001", "x.tar/0002"}


def test_tars_without_a_row_are_reported(toy_folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "0.tar", [])
    (tmp_path / "tars" / "1.tar").write_bytes(b"<html>404</html>")
    report = prepare_small(tmp_path / "tars", tmp_path / "out", toy_folder)
    assert (report.input, report.kept, len(report.damaged)) == (0, 0, 1)
    assert "0 of 0 pictures kept" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "index.safetensors").is_file()


@pytest.mark.parametrize("error", [RuntimeError("odd\nfile"), MemoryError()])
def test_an_exception_drops_its_row_and_lack_of_memory_ends_the_run(tmp_path: Path, error: Exception) -> None:
    def read() -> bytes:
        raise error

    config = PrepareConfig(source="", out=tmp_path, filters=Filters(min_side=8))
    row = Row("x", read, {"text": "a thing"})
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            examine(0, row, config, (Size(8, 8),))
    else:
        found = examine(0, row, config, (Size(8, 8),))
        assert isinstance(found, Dropped)
        assert (found.reason, found.detail) == ("bad record", "RuntimeError: odd file")
