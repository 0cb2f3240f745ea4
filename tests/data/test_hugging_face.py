"""Data sets of the `datasets` library: every way it stores pictures, broken rows, and shards made of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdxl_fast.data import precompute
from sdxl_fast.data.filters import Dropped, Filters, open_picture
from sdxl_fast.data.report import Report
from sdxl_fast.data.rows import Row
from sdxl_fast.data.shards import LatentShards
from sdxl_fast.data.sources import HuggingFace, open_source
from sdxl_fast.errors import DataError
from sdxl_fast.testing.pictures import contents, good_rows, picture, prepare_small

datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra hf is not installed")

ROWS = good_rows(5)
CONTENTS = [content for _, content in ROWS]
TEXTS = [facts["text"] for facts, _ in ROWS]
PICTURES = {"image": datasets.Image(), "text": datasets.Value("string")}


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def _data(images: list[Any], features: dict[str, Any] | None = None, **columns: list[Any]) -> Any:
    columns = {"image": images, "text": TEXTS[: len(images)], **columns}
    return datasets.Dataset.from_dict(columns, features=None if features is None else datasets.Features(features))


def _rows(source: Any) -> list[Row]:
    return [row for part in range(len(source)) for row in source.rows(part)]


def _read(row: Row) -> bytes | tuple[str, str]:
    try:
        return row.problem or row.read()  # type: ignore[misc]
    except Dropped as dropped:
        return dropped.reason, dropped.detail


def _written(folder: Path) -> list[str]:
    folder.mkdir()
    for content, name in zip(CONTENTS, "abcde", strict=True):
        (folder / f"{name}.png").write_bytes(content)
    return [str(folder / f"{name}.png") for name in "abcde"]


def _stored(kind: str, place: Path) -> Any:
    """The five pictures as the library holds them."""
    if kind == "files' bytes":
        return _data(CONTENTS, PICTURES)
    if kind == "paths":
        return _data(_written(place / "files"), PICTURES)
    if kind == "column of bytes":
        return _data(CONTENTS)
    if kind == "column of paths":
        return _data(_written(place / "files"))
    if kind == "picked rows":
        return _data([b"other", *CONTENTS[::-1]], PICTURES, text=["other", *TEXTS[::-1]]).select([5, 4, 3, 2, 1])
    if kind == "tensors":
        return _data(CONTENTS, PICTURES).with_format("torch", columns=["image"])
    _data(CONTENTS, PICTURES).to_parquet(place / "table.parquet")
    whole = datasets.load_dataset("parquet", data_files=str(place / "table.parquet"), cache_dir=str(place / "cache"))
    return whole if kind == "splits of Parquet" else whole["train"]


KINDS = ("files' bytes", "paths", "column of bytes", "column of paths", "picked rows", "tensors", "Parquet")


@pytest.mark.parametrize(
    ("kind", "saved"), [*((kind, saved) for kind in KINDS for saved in (True, False)), ("splits of Parquet", True)]
)
def test_pictures_come_as_they_were_stored(tmp_path: Path, kind: str, saved: bool) -> None:
    data = _stored(kind, tmp_path)
    if saved:
        data.save_to_disk(tmp_path / "saved")
        source = open_source(str(tmp_path / "saved"), rows_per_part=2)
    else:
        source = HuggingFace(data, rows_per_part=2)
    assert [len(list(source.rows(part))) for part in range(len(source))] == [2, 2, 1]
    found = _rows(source)
    assert [row.name for row in found] == [f"row {number}" for number in range(5)]
    assert [_read(row) for row in found] == CONTENTS
    assert [row.facts for row in found] == [{"text": text} for text in TEXTS]


def test_pictures_made_in_memory_are_stored_without_loss(tmp_path: Path) -> None:
    _data([picture(0), picture(1, 40, 72)], PICTURES).save_to_disk(tmp_path / "saved")
    read = [open_picture(_read(row), Filters(min_side=32)) for row in _rows(open_source(str(tmp_path / "saved")))]  # type: ignore[arg-type]
    assert [found.tobytes() for found in read] == [picture(0).tobytes(), picture(1, 40, 72).tobytes()]


def test_nothing_is_decoded_in_any_column() -> None:
    broken = {"bytes": b"not a picture", "path": None}
    features = {
        **PICTURES,
        "other": datasets.Image(),
        "several": [datasets.Image()],
        "inside": {"it": datasets.Image()},
        "score": datasets.ClassLabel(names=["bad", "good"]),
    }
    data = _data(
        [b"not one either"], features, other=[broken], several=[[broken] * 2], inside=[{"it": broken}], score=[1]
    )
    (row,) = _rows(HuggingFace(data))
    assert _read(row) == b"not one either"
    assert row.facts == {
        "text": TEXTS[0],
        "other": broken,
        "several": [broken] * 2,
        "inside": {"it": broken},
        "score": 1,
    }


def test_a_broken_row_is_named_and_the_others_come() -> None:
    not_text = pa.array([b"\xff\xfe", b"b", b"c", b"d"], type=pa.binary()).view(pa.string())
    images = [{"bytes": CONTENTS[0], "path": None}, None, {"bytes": None, "path": "/gone.png"}, {"bytes": None}]
    table = pa.table({"image": pa.array(images), "text": not_text})
    found = [_read(row) for row in _rows(HuggingFace(datasets.Dataset(table)))]
    assert found[0][0] == "bad record" and "UnicodeDecodeError" in found[0][1]  # type: ignore[operator]
    assert found[1:] == [
        ("no picture", "image is empty"),
        ("no picture", "No such file or directory"),
        ("no picture", "image holds dict"),
    ]
    (row,) = _rows(HuggingFace(_data([3])))
    assert row.problem == ("no picture", "image holds int")


def test_columns_and_splits_that_are_missing_are_named(tmp_path: Path) -> None:
    data = _data(CONTENTS, PICTURES)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    assert len(_rows(open_source(str(tmp_path / "splits"), split="test"))) == 1
    for options, message in (
        ({"split": "validation"}, "its splits are train, test"),
        ({"caption_column": "caption"}, "has no column 'caption'; its columns are image, text"),
        ({"image_column": "jpg"}, "has no column 'jpg'; its columns are image, text"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / "splits"), **options)  # type: ignore[arg-type]


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    _data(CONTENTS, PICTURES).save_to_disk(tmp_path / "cut")
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut: cannot be loaded \("):
        open_source(str(tmp_path / "cut"))
    with pytest.raises(DataError, match=r"nobody/nothing: cannot be loaded \(.*Hub"):
        open_source("nobody/nothing")


def test_the_identity_is_that_of_what_was_saved(tmp_path: Path) -> None:
    def identities(folder: str) -> list[str]:
        source = open_source(str(tmp_path / folder), rows_per_part=2)
        return [source.identity(part) for part in range(len(source))]

    _data(CONTENTS, PICTURES).save_to_disk(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    _data(CONTENTS[::-1], PICTURES).save_to_disk(tmp_path / "other")
    assert len(set(identities("one"))) == 3
    assert identities("copy") == identities("one")
    assert not set(identities("other")) & set(identities("one"))


def test_prepared_by_two_ranks_one_of_them_killed(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = good_rows(14)
    images: list[Any] = [content for _, content in rows]
    images[3], images[8] = None, b"not a picture"
    columns = {"picture": images, "caption": [facts["text"] for facts, _ in rows], "aesthetic": [6.0] * 13 + [5.0]}
    features = {"picture": datasets.Image(), "caption": datasets.Value("string"), "aesthetic": datasets.Value("float")}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict({"good": data}).save_to_disk(tmp_path / "set")
    made, prepare_part = list[int](), precompute.prepare_part

    def noted(number: int, **rest: Any) -> Any:
        made.append(number)
        if made == [1, 0]:
            raise KeyboardInterrupt
        return prepare_part(number, **rest)

    def prepared(out: str, *ranks: tuple[int, int]) -> Report:
        options = {"image_column": "picture", "caption_column": "caption", "split": "good", "ranks": list(ranks)}
        return prepare_small(tmp_path / "set", tmp_path / out, toy_folder, **options)

    report = prepared("whole", (0, 1))
    assert (report.input, report.kept) == (14, 11)
    assert {reason: count for reason, count in report.dropped.items() if count} == {
        "no picture": 1,
        "unreadable": 1,
        "aesthetic": 1,
    }
    data = LatentShards(tmp_path / "whole")
    assert sorted(data[k].caption for k in range(11)) == sorted(
        rows[k][0]["text"] for k in range(13) if k not in (3, 8)
    )
    monkeypatch.setattr(precompute, "prepare_part", noted)
    with pytest.raises(KeyboardInterrupt):
        prepared("ranks", (1, 2), (0, 2))
    assert prepared("ranks", (0, 2)) == report and made == [1, 0, 0, 2]
    assert prepared("ranks", (0, 1)) == report and len(made) == 4
    assert contents(tmp_path / "ranks") == contents(tmp_path / "whole")
