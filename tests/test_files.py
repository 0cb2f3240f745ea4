"""A file is whole or not there."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_fast.files import file_sha256, replacing, replacing_folder
from sdxl_fast.train import checkpoint


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


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is waited for until it is on the disk, and what is renamed, in order."""
    found: list[Any] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: found.append(os.fstat(handle).st_ino) or fsync(handle))
    for name in ("replace", "rename"):
        real = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda self, to, name=name, real=real: found.append(name) or real(self, to))
    return found


def _inode(path: Path) -> int:
    return path.stat().st_ino


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, events: list[Any]) -> None:
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("all")
    assert events == [_inode(tmp_path / "file.txt"), "replace", _inode(tmp_path)]
    events.clear()
    with replacing(tmp_path / "file.txt", durable=False) as temporary:
        temporary.write_text("all")
    assert events == ["replace"]


def test_a_folder_is_on_the_disk_before_its_name(tmp_path: Path, events: list[Any]) -> None:
    target = tmp_path / "model"
    with replacing_folder(target) as writing:
        (writing / "unet").mkdir()
        for name in ("index.json", "unet/weights"):
            (writing / name).write_text("all")
    assert events[-2:] == ["rename", _inode(tmp_path)]
    assert sorted(events[:-2]) == sorted(map(_inode, (target, *target.rglob("*"))))


def test_a_checkpoint_is_on_the_disk_before_its_name(tmp_path: Path, events: list[Any]) -> None:
    path = checkpoint.save(tmp_path, {"module": torch.nn.Linear(1, 1)}, {"images": 4})
    assert events[-2:] == ["rename", _inode(tmp_path)]
    assert sorted(events[:-2]) == sorted(map(_inode, (path, *path.rglob("*"))))


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
