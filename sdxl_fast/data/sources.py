"""Where pictures and captions come from: image folders, webdataset tars, Hugging Face data sets.

Every source is a fixed sequence of parts, and a part a fixed sequence of rows, so that any process can do any part and
what it makes depends on nothing else. What cannot be read comes out as a row or part with its reason; an exception says
that the file system failed, and a later try may not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..text import one_line, printable
from .rows import CAPTION, Row, Source, Unavailable, check_final, digest_of, read_file
from .tars import TAR, Tars, tar_paths

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PARTS_LOOKED_AT, _ROWS_LOOKED_AT = 16, 512  # for the names of columns


class ImageFolder(Source):
    """A folder of pictures with `metadata.jsonl`: one JSON object per line with file_name, a caption, other columns."""

    def __init__(self, folder: Path, *, rows_per_part: int = 2048) -> None:
        self.folder, self.rows_per_part = folder, rows_per_part
        content = (folder / "metadata.jsonl").read_bytes().rstrip()
        self.lines = content.split(b"\n") if content else []  # blank ones too: rows are named by their line's number

    def __len__(self) -> int:
        return -(-len(self.lines) // self.rows_per_part)

    def identity(self, part: int) -> str:
        first = part * self.rows_per_part
        return digest_of(*self.lines[first : first + self.rows_per_part])

    def rows(self, part: int) -> Iterator[Row]:
        first = part * self.rows_per_part
        for number, line in enumerate(self.lines[first : first + self.rows_per_part], first + 1):
            if line.strip():
                yield self._row(line, f"metadata.jsonl:{number}")

    def _row(self, line: bytes, where: str) -> Row:
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Row(where, None, problem=("bad record", f"not JSON: {error}"))
        name = facts.get("file_name") if isinstance(facts, dict) else None
        if not isinstance(name, str) or not name:
            return Row(where, None, problem=("bad record", "no file_name"))
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return Row(name, None, facts, problem=("bad record", "the file lies outside the folder"))
        return Row(name, partial(read_file, self.folder / name), facts)


class HuggingFace(Source):
    """A data set of the `datasets` library, in its cache or made by `save_to_disk`; nothing in it is decoded.

    Pictures are the files' bytes or paths, as `datasets.Image` stores them or in a column of their own.
    """

    def __init__(
        self, data: Any, *, caption_column: str = CAPTION, image_column: str = "image", rows_per_part: int = 2048
    ) -> None:
        for column in (image_column, caption_column):
            if column not in data.column_names:
                known = ", ".join(data.column_names)
                raise DataError(f"the data set has no column {column!r}; its columns are {known}")
        # Arrow's rows: decoding one broken picture, sound or video, in any column, would end the reading
        self.data, self.stored = data, data.with_format("arrow")
        self.image_column, self.rows_per_part = image_column, rows_per_part

    def __len__(self) -> int:
        return -(-len(self.data) // self.rows_per_part)

    def identity(self, part: int) -> str:
        return digest_of(self.data._fingerprint.encode(), f"{part} {self.rows_per_part}".encode())

    def rows(self, part: int) -> Iterator[Row]:
        first = part * self.rows_per_part
        for number in range(first, min(first + self.rows_per_part, len(self.data))):
            yield self._row(number)

    def _row(self, number: int) -> Row:
        name = f"row {number}"
        try:
            (facts,) = self.stored[number].to_pylist()
        except MemoryError:
            raise
        except Exception as error:  # of Arrow, of text that is none
            check_final(error, name)
            return Row(name, None, problem=("bad record", one_line(error, named=True)))
        picture = facts.pop(self.image_column)
        stored = picture if isinstance(picture, dict) else {"bytes": picture, "path": picture}
        content, path = stored.get("bytes"), stored.get("path")
        if isinstance(content, bytes):
            return Row(name, partial(bytes, content), facts)
        if isinstance(path, str):
            return Row(name, partial(read_file, Path(path)), facts)
        what = "is empty" if picture is None else f"holds {type(picture).__name__}"
        return Row(name, None, facts, problem=("no picture", f"{self.image_column} {what}"))


def open_source(
    source: str,
    *,
    caption_column: str = CAPTION,
    image_column: str = "image",
    split: str = "train",
    rows_per_part: int = 2048,
) -> Source:
    """Finds out what `source` is.

    Args:
        source: a folder with metadata.jsonl, a folder of tars, a pattern of tars with braces or wildcards, a folder
            made by `save_to_disk`, or a data set's id on the hub, `owner/name`.
        caption_column: of a Hugging Face data set, which must have it.
        image_column: of a Hugging Face data set.
        split: of a Hugging Face data set.
        rows_per_part: rows per output shard, where the source is not divided into tars.

    Raises:
        DataError: none of these, or nothing in it.
    """
    if _URL.match(source):
        raise DataError(f"{source}: URLs are not read; copy the data here, or mount them, and give the folder")
    path = Path(source).expanduser()
    found: Source
    if (path / "metadata.jsonl").is_file():
        found = ImageFolder(path, rows_per_part=rows_per_part)
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file() or _is_hub_id(source):
        data = _load_hugging_face(source, path, split)
        found = HuggingFace(data, caption_column=caption_column, image_column=image_column, rows_per_part=rows_per_part)
    else:
        found = Tars(tar_paths(str(path)))
    if not len(found):
        raise DataError(f"{source}: has no rows")
    return found


def check_columns(source: Source, caption: str, aesthetic: str | None) -> None:
    """Looks for the named columns among the first rows of parts all over the source.

    A score may be missing from most parts of a mixed set, and a caption from some rows: one row that has it will do.

    Args:
        source: where to look.
        caption: column of the captions; the .txt of a tar counts as `text`.
        aesthetic: column of the scores, None where any usual name will do.

    Raises:
        DataError: there is none.
    """
    parts = range(0, len(source), -(-len(source) // _PARTS_LOOKED_AT))
    wanted, known, looked_at = {caption, aesthetic} - {None}, set[str](), 0
    for part in parts:
        with suppress(Unavailable):  # says so when the part's turn comes
            for row in islice(source.rows(part), -(-_ROWS_LOOKED_AT // len(parts))):
                if isinstance(row, Row) and row.problem is None:
                    looked_at += 1
                    known |= row.facts.keys() if row.text is None else {*row.facts, CAPTION}
                    if wanted <= known:
                        return
    for column in (caption, aesthetic):
        if column is not None and column not in known and looked_at:
            option = "--caption-column" if column == caption else "--aesthetic-column"
            raise DataError(
                f"{option}: none of the {looked_at} rows looked at has {column!r}; "
                f"they have {', '.join(sorted(map(printable, known))) or 'no column at all'}"
            )


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists() and not TAR.search(source)


def _load_hugging_face(source: str, path: Path, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading it needs the datasets library: pip install 'sdxl-fast[hf]'") from None
    try:
        data = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises a dozen unrelated types
        raise DataError(f"{source}: cannot be loaded ({one_line(error)})") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"{source}: has no split {split!r}; its splits are {', '.join(data)}")
        data = data[split]
    return data
