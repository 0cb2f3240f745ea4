"""Image folders and tars, whole and broken."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sdxl_fast.data.filters import Dropped
from sdxl_fast.data.rows import Damage, Row, Source, Stray
from sdxl_fast.data.sources import open_source
from sdxl_fast.data.tars import Tars
from sdxl_fast.errors import DataError
from sdxl_fast.testing.pictures import encoded, good_files, good_rows, picture, write_folder, write_tar


def _all(source: Source) -> tuple[list[Row], list[Damage]]:
    found = [row for part in range(len(source)) for row in source.rows(part) if not isinstance(row, Stray)]
    return [row for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, Damage)]


def _problem(row: Row) -> tuple[str, str] | None:
    if row.read is not None:
        try:
            row.read()
        except Dropped as dropped:
            return dropped.reason, dropped.detail
    return row.problem


def test_image_folder(tmp_path: Path) -> None:
    rows = good_rows(5)
    source = open_source(str(write_folder(tmp_path / "set", rows)), rows_per_part=2)
    assert len(source) == 3
    assert [len(list(source.rows(part))) for part in range(3)] == [2, 2, 1]
    found, _ = _all(source)
    assert [row.name for row in found] == [facts["file_name"] for facts, _ in rows]
    assert [row.read() for row in found] == [content for _, content in rows]  # type: ignore[misc]
    assert found[3].facts == rows[3][0]


def test_broken_rows_of_an_image_folder(tmp_path: Path) -> None:
    rows: list[tuple[Any, bytes | None]] = [
        ('{"file_name": "x.png", "te', None),
        ("[1, 2]", None),
        ({"text": "no file"}, None),
        ({"file_name": "missing.png", "text": "a"}, None),
        ({"file_name": "../secret.png", "text": "a"}, None),
        ({"file_name": "/etc/passwd", "text": "a"}, None),
        ({"file_name": ".", "text": "a"}, None),
        *good_rows(1),
    ]
    found, _ = _all(open_source(str(write_folder(tmp_path / "set", rows))))
    problems = [_problem(row) for row in found]
    reasons = [problem and problem[0] for problem in problems]
    assert reasons == ["bad record"] * 3 + ["no picture"] + ["bad record"] * 2 + ["no picture", None]
    assert found[0].name == "metadata.jsonl:1"
    assert "No such file" in problems[3][1]  # type: ignore[index]


def test_rows_are_named_by_their_line_blank_ones_counted(tmp_path: Path) -> None:
    rows: list[tuple[Any, bytes | None]] = [
        ("", None),
        *good_rows(1),
        ("  ", None),
        ("", None),
        ("{", None),
        ("", None),
    ]
    source = open_source(str(write_folder(tmp_path / "set", rows)), rows_per_part=2)
    assert [row.name for row in _all(source)[0]] == ["0000.png", "metadata.jsonl:5"]


def test_tars(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number:02d}.tar", good_files(2, 2 * number))
    write_tar(tmp_path / "packed.tar.gz", good_files(2, 6), "w:gz")
    (tmp_path / "notes.txt").touch()
    for pattern, parts in (
        (str(tmp_path), 4),
        (f"{tmp_path}/{{00..02}}.tar", 3),
        (f"{tmp_path}/*.tar", 3),
        (f"{tmp_path}/0[01].tar", 2),
        (f"{tmp_path}/packed.tar.gz", 1),
        (f"{tmp_path}/{{00..09}}.tar", 10),
    ):
        source = open_source(pattern)
        assert len(source) == parts
        found, damage = _all(source)
        assert len(damage) == (7 if parts == 10 else 0)
        assert len(found) == 2 * (parts - len(damage))
        assert all(row.facts.keys() == {"aesthetic"} and _problem(row) is None for row in found)
    found, _ = _all(open_source(str(tmp_path)))
    assert [row.read() for row in found] == [content for _, content in good_rows(8)]  # type: ignore[misc]
    assert [row.caption("text") for row in found] == [facts["text"] for facts, _ in good_rows(8)]


def test_members_of_a_tar_that_make_no_sample(tmp_path: Path) -> None:
    image = encoded(picture(0), "WEBP")
    files = [
        ("folder/a.WEBP", image),
        ("folder/a.txt", b"a caption"),
        ("README", b"no extension, no sample"),
        ("b.txt", b"no picture"),
        ("c.jpg", image),
        ("c.json", b'{"text": "from the json", "aesthetic": 7}'),
        ("d.jpg", image),
        ("d.json", b"{broken"),
        ("e.jpg", image),
        ("e.json", b"[1]"),
        ("f.jpg", image),
        ("f.txt", b"\xff\xfe"),
        ("g.gif", image),
    ]
    found, damage = _all(Tars([write_tar(tmp_path / "x.tar", files)]))
    assert not damage
    assert [row.name for row in found] == [f"x.tar/{key}" for key in ("folder/a", *"bcdefg")]
    reasons = [problem and problem[0] for problem in map(_problem, found)]
    assert reasons == [None, "no picture", None, "bad record", "bad record", "bad record", "no picture"]
    assert found[2].facts == {"text": "from the json", "aesthetic": 7}


def test_a_file_that_comes_again_is_another_sample_and_one_without_extension_is_noted(tmp_path: Path) -> None:
    files = [
        ("a.png", b"1"),
        ("a.txt", b"one"),
        ("a.PNG", b"2"),
        ("a.txt", b"two"),
        ("a.txt", b"three"),
        ("LICENSE", b""),
    ]
    found = list(Tars([write_tar(tmp_path / "x.tar", files)]).rows(0))
    rows = [row for row in found if isinstance(row, Row)]
    assert [(row.name, row.text) for row in rows] == [("x.tar/a", "one"), ("x.tar/a", "two"), ("x.tar/a", "three")]
    assert [row.read and row.read() for row in rows] == [b"1", b"2", None]
    assert [row for row in found if not isinstance(row, Row)] == [Stray("LICENSE")]


@pytest.mark.parametrize(
    ("column", "files", "caption"),
    [
        ("text", {"json": b'{"text": "json"}', "txt": b"txt"}, "txt"),
        ("text", {"json": b'{"text": "json"}', "txt": b" \n"}, "json"),
        ("text", {"json": b"{}", "txt": b"txt"}, "txt"),
        ("text", {"json": b'{"text": "json"}'}, "json"),
        ("alt", {"json": b'{"alt": "json"}', "txt": b"txt"}, "json"),
        ("alt", {"json": b'{"alt": ""}', "txt": b"txt"}, ""),
        ("alt", {"json": b'{"alt": null, "text": "other"}', "txt": b"txt"}, "txt"),
        ("alt", {"json": b'{"text": "other"}'}, None),
    ],
)
def test_a_named_caption_column_comes_before_the_txt(
    tmp_path: Path, column: str, files: dict[str, bytes], caption: str | None
) -> None:
    members = [(f"a.{suffix}", content) for suffix, content in files.items()]
    (row,), _ = _all(Tars([write_tar(tmp_path / "x.tar", [("a.png", b"picture"), *members])]))
    assert row.caption(column) == caption


def _headers(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


DAMAGES = ["content", "header", "boundary", "broken header", "zeros", "joined", "long end", "empty", "text", "gzip"]


@pytest.mark.parametrize("record", [512, 10_240, 65_536, 1 << 20])
def test_a_tar_may_end_in_a_record_of_any_size(tmp_path: Path, record: int) -> None:
    path = write_tar(tmp_path / "x.tar", good_files(2))
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512 + 1024)
    path.write_bytes(content + bytes(-len(content) % record))
    found, damages = _all(Tars([path]))
    assert len(found) == 2 and not damages


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tars_give_what_they_have_and_say_so(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "x.tar", good_files(30), "w:gz" if damage == "gzip" else "w")
    whole = path.read_bytes()
    third = _headers(path)[6]  # three files a sample
    path.write_bytes(
        {
            "content": whole[: third + 700],
            "header": whole[: third + 100],
            "boundary": whole[:third],
            "broken header": whole[:third] + b"garbage!" * 64 + whole[third + 512 :],
            "zeros": whole[:third].ljust(len(whole), b"\0"),
            "joined": whole[:third] + bytes(1024) + whole,
            "long end": whole[:third] + bytes(2_000_000),
            "empty": b"",
            "text": b"<html>not found</html>" * 100,
            "gzip": whole[: len(whole) // 2],
        }[damage]
    )
    found, damages = _all(Tars([path]))
    (one,) = damages
    assert one.name == str(path) and one.detail
    usable = [row for row in found if _problem(row) is None]
    if damage in DAMAGES[:7]:
        # the second sample might have had more files behind the damage
        assert [row.name for row in found] == ["x.tar/0000", "x.tar/0001"]
        assert [row.name for row in usable] == ["x.tar/0000"]
        assert _problem(found[1])[0] == "unreadable"  # type: ignore[index]
    elif damage == "gzip":
        assert len(usable) < 30
    else:
        assert not found


def test_the_identity_follows_the_part(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", good_rows(5))

    def identities() -> list[str]:
        source = open_source(str(folder), rows_per_part=2)
        return [source.identity(part) for part in range(len(source))]

    before = identities()
    assert len(set(before)) == 3 and identities() == before
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0000.png", "text": "again"}\n')
    assert identities()[:2] == before[:2] and identities()[2] != before[2]
    tar, moved = write_tar(tmp_path / "x.tar", good_files(1)), tmp_path / "elsewhere" / "x.tar"
    first = Tars([tar]).identity(0)
    assert Tars([write_tar(moved, good_files(1))]).identity(0) == first
    assert Tars([write_tar(moved, good_files(1, 1))]).identity(0) != first
    tar.unlink()
    assert Tars([tar]).identity(0) != first


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "nothing", [])
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "0.parquet").touch()
    for source, message in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "empty", "neither metadata.jsonl nor tars"),
        (tmp_path / "nothing", "has no rows"),
        (tmp_path / "x.tar", "none of these 1 tars exists"),
        (tmp_path / "*.tar", "no tar of that name"),
        ("s3://bucket/{000..099}.tar", "URLs are not read; copy the data here, or mount them"),
        ("https://example.org/set.tar", "URLs are not read"),
        ("pipe:aws s3 cp s3://bucket/0.tar -", "URLs are not read"),
        (tmp_path / "table", "read as a Hugging Face data set"),
        (tmp_path / "table" / "0.parquet", r"load_dataset\('parquet'"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(str(source))


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(DataError, match=r"sdxl-fast\[hf\]"):
        open_source("somebody/some-data-set")
    with pytest.raises(DataError, match=r"sdxl-fast\[data\]"):
        open_source(f"{tmp_path}/{{0..3}}.tar")
