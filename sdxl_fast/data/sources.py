"""Where pictures and captions come from: image folders, webdataset tars, Hugging Face data sets.

Every source is a fixed sequence of parts, and a part a fixed sequence of rows, so that any process can do any part and
what it makes depends on nothing else. What cannot be read comes out as a row or part with its reason, never as an
exception.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError
from .filters import Dropped, Reason

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_TAR = re.compile(r"\.tar(?:\.(?:gz|bz2|xz))?$|\.tgz$")
_ENDS = 65536  # bytes at both ends of a tar that tell it from another of the same size
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One picture as its source has it.

    `read` gives the picture file's bytes and may raise `Dropped`; `facts` are the caption and all other columns;
    `problem` is set instead where the source itself knows that the row is broken.
    """

    name: str
    read: Callable[[], bytes] | None
    facts: dict[str, Any] = field(default_factory=dict)
    problem: tuple[Reason, str] | None = None


@dataclass(frozen=True, slots=True)
class Damage:
    """An input file that could not be read to its end; what it held beyond the rows before is unknown."""

    name: str
    detail: str


class Source(ABC):
    """A sequence of parts, `len` of them."""

    caption_column: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, part: int) -> Iterator[Row | Damage]:
        """The rows of one part, in order."""

    @abstractmethod
    def identity(self, part: int) -> str:
        """Changes when the part does, as far as can be told without reading all of it."""


def _digest(*contents: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


class ImageFolder(Source):
    """A folder of pictures with `metadata.jsonl`: one JSON object per line with file_name, a caption, other columns."""

    def __init__(self, folder: Path, *, caption_column: str = "text", rows_per_part: int = 2048) -> None:
        self.folder, self.caption_column, self.rows_per_part = folder, caption_column, rows_per_part
        self.lines = [line for line in (folder / "metadata.jsonl").read_bytes().split(b"\n") if line.strip()]

    def __len__(self) -> int:
        return -(-len(self.lines) // self.rows_per_part)

    def identity(self, part: int) -> str:
        first = part * self.rows_per_part
        return _digest(*self.lines[first : first + self.rows_per_part])

    def rows(self, part: int) -> Iterator[Row]:
        first = part * self.rows_per_part
        for number, line in enumerate(self.lines[first : first + self.rows_per_part], first + 1):
            yield self._row(line, f"metadata.jsonl:{number}")

    def _row(self, line: bytes, where: str) -> Row:
        try:
            facts = json.loads(line)
        except ValueError as error:
            return Row(where, None, problem=("bad record", f"not JSON: {error}"))
        name = facts.get("file_name") if isinstance(facts, dict) else None
        if not isinstance(name, str) or not name:
            return Row(where, None, problem=("bad record", "no file_name"))
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return Row(name, None, facts, problem=("bad record", "the file lies outside the folder"))
        return Row(name, partial(_read, self.folder / name), facts)


class Tars(Source):
    """webdataset tars: files of the same name up to the first dot are one sample; a picture and .txt or .json or both.

    Each tar is one part. The columns of the .json are the facts; the .txt is the caption where there is one.
    """

    def __init__(self, paths: list[Path], *, caption_column: str = "text") -> None:
        self.paths, self.caption_column = paths, caption_column

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self, part: int) -> str:
        path = self.paths[part]
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - _ENDS))
                tail = file.read()
                file.seek(0)
                return _digest(path.name.encode(), str(size).encode(), file.read(_ENDS), tail)
        except OSError:
            return _digest(path.name.encode())

    def rows(self, part: int) -> Iterator[Row | Damage]:
        path = self.paths[part]
        key, files = "", dict[str, bytes]()
        try:
            for name, content in _members(path):
                # webdataset's own rule, case of the extension aside
                match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
                if match is None:
                    continue
                if match[1] != key and files:
                    yield self._row(path, key, files)
                    files = {}
                key = match[1]
                files[match[2].lower()] = content
        # zlib.error and lzma's have no common base with OSError and tarfile's
        except Exception as error:
            if files:
                # what is missing may be the very column that would have kept it out
                broken: tuple[Reason, str] = ("unreadable", "the tar breaks off inside or right after this sample")
                yield Row(f"{path.name}/{key}", None, problem=broken)
            yield Damage(str(path), " ".join(f"{type(error).__name__}: {error}".split())[:200])
        else:
            if files:
                yield self._row(path, key, files)

    def _row(self, path: Path, key: str, files: dict[str, bytes]) -> Row:
        name = f"{path.name}/{key}"
        facts: dict[str, Any] = {}
        try:
            if "json" in files:
                facts = json.loads(files["json"])
                if not isinstance(facts, dict):
                    return Row(name, None, problem=("bad record", "its .json is not an object"))
            if "txt" in files:
                facts = facts | {self.caption_column: files["txt"].decode("utf-8")}
        except ValueError as error:
            return Row(name, None, problem=("bad record", f"its .json or .txt cannot be read: {error}"))
        suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in files), None)
        if suffix is None:
            return Row(name, None, facts, problem=("no picture", f"has only {', '.join(sorted(files))}"))
        return Row(name, partial(bytes, files[suffix]), facts)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar, in order.

    Raises:
        Exception: of any kind, where it cannot be read on. A header broken in the middle and a tar cut off between two
        members count too, which tarfile takes for the end.
    """
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                stream = tar.extractfile(member)
                content = stream.read() if stream is not None else b""
                if len(content) != member.size:
                    raise tarfile.ReadError(f"{member.name} has {len(content)} of {member.size} bytes")
                yield member.name, content
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        mark = tar.fileobj.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end-of-archive mark: cut off between two files")
        if mark.strip(b"\0"):
            raise tarfile.ReadError(f"broken header at byte {tar.offset}")


class HuggingFace(Source):
    """A data set of the `datasets` library, in its cache or made by `save_to_disk`; pictures stay undecoded."""

    def __init__(
        self, data: Any, *, caption_column: str = "text", image_column: str = "image", rows_per_part: int = 2048
    ) -> None:
        from datasets import Image as ImageFeature

        for column in (image_column, caption_column):
            if column not in data.column_names:
                known = ", ".join(data.column_names)
                raise DataError(f"the data set has no column {column!r}; its columns are {known}")
        if isinstance(data.features[image_column], ImageFeature):
            data = data.cast_column(image_column, ImageFeature(decode=False))
        self.data, self.caption_column, self.image_column = data, caption_column, image_column
        self.rows_per_part = rows_per_part

    def __len__(self) -> int:
        return -(-len(self.data) // self.rows_per_part)

    def identity(self, part: int) -> str:
        return _digest(self.data._fingerprint.encode(), f"{part} {self.rows_per_part}".encode())

    def rows(self, part: int) -> Iterator[Row]:
        first = part * self.rows_per_part
        for number in range(first, min(first + self.rows_per_part, len(self.data))):
            facts = dict(self.data[number])
            picture = facts.pop(self.image_column)
            content = picture.get("bytes") if isinstance(picture, dict) else picture
            path = picture.get("path") if isinstance(picture, dict) else None
            if isinstance(content, bytes):
                yield Row(f"row {number}", partial(bytes, content), facts)
            elif path is not None:
                yield Row(f"row {number}", partial(_read, Path(path)), facts)
            else:
                what = "empty" if picture is None else f"holds {type(picture).__name__}"
                yield Row(f"row {number}", None, facts, problem=("no picture", f"{self.image_column} {what}"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Dropped("no picture", error.strerror or str(error)) from None


def open_source(
    source: str,
    *,
    caption_column: str = "text",
    image_column: str = "image",
    split: str = "train",
    rows_per_part: int = 2048,
) -> Source:
    """Finds out what `source` is.

    Args:
        source: a folder with metadata.jsonl, a folder of tars, a pattern of tars with braces or wildcards, a folder
            made by `save_to_disk`, or a data set's id on the hub, `owner/name`.
        caption_column: of metadata.jsonl, of a tar's .json, or of the data set.
        image_column: of a Hugging Face data set.
        split: of a Hugging Face data set.
        rows_per_part: rows per output shard, where the source is not divided into tars.

    Raises:
        DataError: none of these, or nothing in it.
    """
    path = Path(source).expanduser()
    found: Source
    if (path / "metadata.jsonl").is_file():
        found = ImageFolder(path, caption_column=caption_column, rows_per_part=rows_per_part)
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file() or _is_hub_id(source):
        data = _load_hugging_face(source, path, split)
        found = HuggingFace(data, caption_column=caption_column, image_column=image_column, rows_per_part=rows_per_part)
    else:
        found = Tars(_tar_paths(str(path)), caption_column=caption_column)
    if not len(found):
        raise DataError(f"{source}: has no rows")
    return found


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists() and not _TAR.search(source)


def _tar_paths(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        paths = sorted(path for path in Path(pattern).iterdir() if _TAR.search(path.name))
        if not paths:
            raise DataError(f"{pattern}: holds neither metadata.jsonl nor tars nor a saved data set")
        return paths
    if not _TAR.search(pattern):
        raise DataError(f"{pattern}: no such folder; give a folder, tars (data/{{000..099}}.tar) or a hub id")
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise DataError("reading tars needs webdataset: pip install 'sdxl-fast[data]'") from None
    paths = []
    for one in expand_urls(pattern):
        matches = sorted(glob.glob(one)) if glob.has_magic(one) else [one]  # a missing tar is reported, not passed over
        if not matches:
            raise DataError(f"{one}: no tar of that name")
        paths += [Path(match) for match in matches]
    if not any(path.exists() for path in paths):
        raise DataError(f"{pattern}: none of these {len(paths)} tars exists")
    return list(dict.fromkeys(paths))


def _load_hugging_face(source: str, path: Path, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading it needs the datasets library: pip install 'sdxl-fast[hf]'") from None
    try:
        data = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises a dozen unrelated types
        raise DataError(f"{source}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"{source}: has no split {split!r}; its splits are {', '.join(data)}")
        data = data[split]
    return data
