"""`data prepare` by many ranks, killed, taken up again, with other settings: the same files, or a reason."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdxl_fast.data import precompute, tars
from sdxl_fast.data.config import PrepareConfig
from sdxl_fast.data.filters import Filters
from sdxl_fast.data.precompute import prepare
from sdxl_fast.data.rows import Unavailable
from sdxl_fast.data.shards import LatentShards
from sdxl_fast.data.tars import Tars
from sdxl_fast.errors import DataError
from sdxl_fast.testing.pictures import (
    contents,
    good_files,
    good_rows,
    prepare_small,
    small_config,
    write_folder,
    write_tar,
)
from sdxl_fast.testing.toy import toy_pipeline

pytest.importorskip("webdataset", reason="the extra data is not installed")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_two_ranks_make_the_files_of_one(
    source: Path, made: Path, toy_folder: Path, tmp_path: Path, order: list[int]
) -> None:
    prepare_small(source, tmp_path / "out", toy_folder, ranks=[(rank, 2) for rank in order])
    assert contents(tmp_path / "out") == contents(made)


def test_more_ranks_than_shards(source: Path, made: Path, toy_folder: Path, tmp_path: Path) -> None:
    prepare_small(source, tmp_path / "out", toy_folder, ranks=[(rank, 5) for rank in (0, 1, 3, 2)])
    assert contents(tmp_path / "out") == contents(made)
    config = PrepareConfig(
        source=str(source), out=tmp_path / "out", model=str(toy_folder), filters=Filters(min_side=32), rows_per_shard=6
    )
    assert prepare(config, rank=4, world_size=5) is not None  # nothing to do, and all is there


@pytest.mark.parametrize("workers", [1, 7])
def test_the_number_of_threads_changes_nothing(
    source: Path, made: Path, toy_folder: Path, tmp_path: Path, workers: int
) -> None:
    prepare_small(source, tmp_path / "out", toy_folder, workers=workers)
    assert contents(tmp_path / "out") == contents(made)


def test_finished_shards_are_not_done_again(
    source: Path, made: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_small(source, tmp_path / "out", toy_folder)
    for name in ("000001.json", "000002.tar"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / ".000003-killed.tar").touch()  # of a part that is done: left alone
    (tmp_path / "out" / ".000001-killed.tar").touch()
    made_now = []
    prepare_part = precompute.prepare_part
    monkeypatch.setattr(
        precompute, "prepare_part", lambda number, **rest: made_now.append(number) or prepare_part(number, **rest)
    )
    prepare_small(source, tmp_path / "out", toy_folder)
    assert made_now == [1, 2]
    (tmp_path / "out" / ".000003-killed.tar").unlink()
    assert contents(tmp_path / "out") == contents(made)


def test_a_repaired_input_is_done_again_and_nothing_else(toy_folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / "tars" / f"{number}.tar", good_files(3, 3 * number))
    good = (tmp_path / "tars" / "1.tar").read_bytes()
    (tmp_path / "tars" / "1.tar").write_bytes(good[:3000])
    assert prepare_small(tmp_path / "tars", tmp_path / "out", toy_folder).kept < 6
    before = (tmp_path / "out" / "000000.tar").stat()
    (tmp_path / "tars" / "1.tar").write_bytes(good)
    report = prepare_small(tmp_path / "tars", tmp_path / "out", toy_folder)
    assert (report.kept, report.damaged, len(LatentShards(tmp_path / "out"))) == (6, [], 6)
    assert (tmp_path / "out" / "000000.tar").stat() == before
    (tmp_path / "tars" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"more parts than .* has now \(000001.json\)"):
        prepare_small(tmp_path / "tars", tmp_path / "out", toy_folder)


def test_a_tar_is_looked_at_once_and_one_that_changes_meanwhile_is_made_again(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_tar(tmp_path / "tars" / f"{number}.tar", good_files(3, 3 * number)) for number in range(3)]
    opened, prepare_part = Counter[Path](), precompute.prepare_part

    def noted(path: Path, mode: str) -> Any:
        opened[path] += 1
        return open(path, mode)

    def changing(number: int, **rest: Any) -> Any:
        if number == 0:
            write_tar(paths[2], good_files(4, 60))
        return prepare_part(number, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(tars, "open", noted, raising=False)
        patch.setattr(precompute, "prepare_part", changing)
        assert prepare_small(tmp_path / "tars", tmp_path / "out", toy_folder).kept == 10
    assert [opened[path] for path in paths] == [1, 1, 1]
    assert prepare_small(tmp_path / "tars", tmp_path / "out", toy_folder).kept == 10
    prepare_small(tmp_path / "tars", tmp_path / "fresh", toy_folder)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_what_the_file_system_fails_to_give_is_left_for_the_next_run(
    source: Path, made: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read_bytes = tmp_path / "out", Path.read_bytes

    def failing(self: Path) -> bytes:
        if self.name == "0007.png":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_bytes(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(DataError, match=r"1 parts were left.*000001 \(.*0007.png: Stale file handle\)"):
            prepare_small(source, out, toy_folder)
    assert sorted(path.name for path in out.glob("0*.tar")) == ["000000.tar", "000002.tar", "000003.tar"]
    assert not (out / "index.safetensors").exists()
    prepare_small(source, out, toy_folder)
    assert contents(out) == contents(made)


def test_a_tar_on_a_failing_disk_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", good_files(2))

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tarfile.ExFileObject, "read", failing)
    with pytest.raises(Unavailable, match=r"x.tar: Input/output error"):
        list(Tars([path]).rows(0))


def test_retry_makes_parts_with_missing_pictures_again(toy_folder: Path, tmp_path: Path) -> None:
    rows = good_rows(12)
    gone = write_folder(tmp_path / "set", rows) / "0008.png"
    gone.unlink()
    assert prepare_small(tmp_path / "set", tmp_path / "out", toy_folder).kept == 11
    first = (tmp_path / "out" / "000000.tar").stat()
    gone.write_bytes(rows[8][1])
    assert prepare_small(tmp_path / "set", tmp_path / "out", toy_folder).kept == 11
    config = small_config(tmp_path / "set", tmp_path / "out", toy_folder)
    report = prepare(config, retry=True)
    assert report is not None and report.kept == 12
    assert (tmp_path / "out" / "000000.tar").stat() == first


_HOLDING = """
import fcntl, sys
file = open(sys.argv[1], "wb")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 2)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_part_that_another_process_makes_is_left_to_it(
    source: Path, made: Path, toy_folder: Path, tmp_path: Path
) -> None:
    out, lines = tmp_path / "out", list[str]()
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDING, str(out / ".parts.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == b"held\n"
        theirs = out / ".000002-theirs.tar"
        theirs.touch()
        assert prepare(small_config(source, out, toy_folder), log=lines.append) is None
        assert theirs.exists()
        other.stdin.close()
    assert any("part 000002 is left out: another process is making it; is RANK set" in line for line in lines)
    assert "1 of 4 shards are missing" in lines[-1]
    prepare_small(source, out, toy_folder)
    assert contents(out) == contents(made)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_will_do(
    source: Path, made: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def none(*_: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(precompute.fcntl, "lockf", none)
    prepare_small(source, tmp_path / "out", toy_folder)
    assert contents(tmp_path / "out") == contents(made)


# Kills itself at the n-th call of a function that writes; forked before torch has computed anything.
_KILLED = """
import os, pathlib, signal, sys
import diffusers, transformers, webdataset
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer
from sdxl_fast.data.filters import Filters
from sdxl_fast.data.config import PrepareConfig
from sdxl_fast.data.precompute import prepare

source, model, out = sys.argv[1:]

def run_until(owner, name, count):
    if os.fork() == 0:
        calls, function = [], getattr(owner, name)
        def replacement(*arguments, **options):
            calls.append(None)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        setattr(owner, name, replacement)
        filters = Filters(min_side=32)
        prepare(PrepareConfig(source=source, out=out, model=model, filters=filters, rows_per_shard=10))
        os._exit(0)
    return os.WIFSIGNALED(os.wait()[1])

assert run_until(webdataset.TarWriter, "write", 1)
assert run_until(webdataset.TarWriter, "write", 7)
print(sorted(os.listdir(out)))
count, before = 3, None  # two more files each time; the last four are written anew by everyone who gets there
while run_until(pathlib.Path, "replace", count):
    print(sorted(os.listdir(out)), flush=True)
    listing = sorted(name for name in os.listdir(out) if name[0] != ".")
    count += listing == before
    before = listing
"""


def test_killed_at_any_moment_and_taken_up_again(source: Path, toy_folder: Path, tmp_path: Path) -> None:
    """Kill after kill: inside a shard, between a shard and its record, between the files of the end."""
    prepare_small(source, tmp_path / "whole", toy_folder, rows_per_shard=10)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(source), str(toy_folder), str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    listings = done.stdout.splitlines()
    assert len(listings) >= 5
    assert ".000000-" in listings[0]  # a half-written shard, under a name of its own
    assert all("'index.safetensors'" not in listing for listing in listings)  # whoever can read it reads all of it


@pytest.mark.parametrize("damage", [b"", b"[]\n", b"\0" * 100, None])
def test_a_damaged_record_is_made_again(
    source: Path, made: Path, toy_folder: Path, tmp_path: Path, damage: bytes | None
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    record = out / "000001.json"
    record.write_bytes(record.read_bytes()[:-10] if damage is None else damage)
    prepare_small(source, out, toy_folder)
    assert contents(out) == contents(made)


def test_damaged_settings_are_named(source: Path, made: Path, toy_folder: Path, tmp_path: Path) -> None:
    for damage in ("", "[1]"):
        out = tmp_path / f"out{len(damage)}"
        shutil.copytree(made, out)
        (out / "settings.json").write_text(damage)
        with pytest.raises(DataError, match=r"settings.json: damaged .* prepare it anew"):
            prepare_small(source, out, toy_folder)


def test_a_source_that_grows_or_is_spelled_otherwise_goes_on(toy_folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / "tars" / f"{number}.tar", good_files(3, 3 * number))
    out = tmp_path / "out"
    prepare_small(f"{tmp_path}/tars/{{0..1}}.tar", out, toy_folder)
    first = (out / "000000.tar").stat()
    assert prepare_small(tmp_path / "tars", out, toy_folder, batch=2, seed=1).kept == 9
    assert (out / "000000.tar").stat() == first
    prepare_small(tmp_path / "tars", tmp_path / "random", toy_folder, crop="random")
    with pytest.raises(DataError, match="another seed"):
        prepare_small(tmp_path / "tars", tmp_path / "random", toy_folder, crop="random", seed=1)


def test_an_output_folder_begun_otherwise_is_refused(source: Path, toy_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_small(source, out, toy_folder)
    before = contents(out)
    for change, message in (
        ({"buckets": "square"}, "was begun with another buckets"),
        ({"filters": Filters(min_side=33)}, "another filters"),
        ({"precision": "bf16"}, r"another precision \(fp32 there, bf16 now\)"),
        ({"rows_per_shard": 7}, "another rows_per_shard"),
        ({"crop": "random"}, "another crop"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_small(source, out, toy_folder, **change)  # type: ignore[arg-type]
    assert contents(out) == before
    (out / "000001.json").unlink()
    other = toy_pipeline(tmp_path / "toy", seed=1, few_steps=())
    with pytest.raises(DataError, match="another encoders"):
        prepare_small(source, out, other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(DataError, match="holds other files"):
        prepare_small(source, tmp_path / "full", toy_folder)
