"""What a run says of itself while it works, and before it begins in vain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdxl_fast.data.filters import Filters
from sdxl_fast.data.precompute import prepare
from sdxl_fast.data.progress import Progress
from sdxl_fast.data.report import Entry, Record
from sdxl_fast.data.sources import check_columns, open_source
from sdxl_fast.errors import DataError
from sdxl_fast.testing.pictures import good_files, good_rows, small_config, write_folder, write_tar


def test_a_line_per_shard_and_a_warning_of_none_kept() -> None:
    lines, times = list[str](), iter([10.0, 110.0, 210.0])
    progress = Progress("r3", 12, 2, lines.append, clock=lambda: next(times))
    record = Record(input=1000, samples=[Entry("a", "00", (4, 8, 8), 0, 1, True, False)] * 990)
    for reason, count in (("blurred", 4), ("too small", 3), ("duplicate", 2), ("aesthetic", 1)):
        for _ in range(count):
            record.drop("x", reason, "")  # type: ignore[arg-type]
    progress.tell(19, record)
    progress.tell(27, Record(input=500, damaged=[("x.tar", "cut off")]))
    assert lines == [
        "r3: shard 3/12 (000019): kept 990 of 1000 (blurred 4, too small 3, duplicate 2); 10 pictures/s, 15 min left",
        "r3: shard 4/12 (000027): kept 0 of 500, 1 damaged files; 7.5 pictures/s, 13 min left",
        "warning: nothing of part 000027 was kept",
    ]


def test_a_run_says_what_became_of_each_shard(source: Path, toy_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra data is not installed")
    lines: list[str] = []
    prepare(small_config(source, tmp_path / "out", toy_folder), rank=1, world_size=2, log=lines.append)
    assert [line.partition(";")[0] for line in lines[:2]] == [
        "rank 1: shard 1/2 (000001): kept 6 of 6",
        "rank 1: shard 2/2 (000003): kept 2 of 2",
    ]


def test_a_column_that_no_row_has_is_named_before_anything_is_made(toy_folder: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", good_rows(20))
    for settings, message in (
        ({"caption_column": "alt"}, "--caption-column: none of the 20 rows looked at has 'alt'; they have aesthetic, "),
        (
            {"filters": Filters(aesthetic_column="score")},
            "--aesthetic-column: none of the 20 rows looked at has 'score'",
        ),
    ):
        with pytest.raises(DataError, match=message):
            prepare(small_config(folder, tmp_path / "out", toy_folder, **settings))
    assert not (tmp_path / "out").exists()


def test_a_column_may_be_rare_and_a_txt_is_the_default_caption(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra data is not installed")
    for number in range(40):
        write_tar(tmp_path / f"{number:02d}.tar", [file for file in good_files(2) if not file[0].endswith("json")])
    source = open_source(str(tmp_path))
    check_columns(source, "text", None)
    with pytest.raises(DataError, match=r"none of the 28 rows .* they have text"):
        check_columns(source, "text", "score")
    scored = [*good_files(2), ("a.png", b""), ("a.json", json.dumps({"score": 6}).encode())]
    write_tar(tmp_path / "39.tar", scored)
    check_columns(source, "text", "score")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.tar").write_bytes(b"no tar")
    check_columns(open_source(str(tmp_path / "bad")), "alt", "score")  # which the report will say
