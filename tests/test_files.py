"""A file is whole or not there."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from sdxl_fast.files import file_sha256, replacing, replacing_folder


def test_the_file_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with replacing(target) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("all")
        assert not target.exists()
    assert target.read_text() == "all"
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_ino) or fsync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append("replace") or replace(self, to))
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("all")
    assert events == [(tmp_path / "file.txt").stat().st_ino, "replace", tmp_path.stat().st_ino]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["file.txt"]
    assert target.read_text() == "old"


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for number in range(2):
        with replacing_folder(target) as writing:
            (writing / f"{number}.txt").write_text("all")
        assert os.listdir(tmp_path) == ["model"]
        assert os.listdir(target) == [f"{number}.txt"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise OSError("renaming")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match=where), replacing_folder(target) as writing:
        (writing / "new.txt").write_text("half")
        if where == "writing":
            raise OSError("writing")
    assert os.listdir(tmp_path) == ["model"]
    assert (target / "old.txt").read_text() == "old"


def test_a_digest_does_not_hold_the_file(tmp_path: Path) -> None:
    content = os.urandom(9 << 20)
    (tmp_path / "weights").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    tracemalloc.start()
    assert file_sha256(tmp_path / "weights") == expected
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
