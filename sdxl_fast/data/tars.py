"""Pictures and captions in webdataset tars, whole and broken."""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..text import one_line
from .filters import Reason
from .rows import Damage, Row, Source, Stray, check_final, digest_of

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TAR = re.compile(r"\.tar(?:\.(?:gz|bz2|xz))?$|\.tgz$")
_PARQUET = (
    "Parquet is read as a Hugging Face data set, extra hf: datasets.load_dataset('parquet', data_files=..., "
    "split='train').save_to_disk(FOLDER), then give FOLDER"
)
_RECORD = 10_240  # what tars are filled up to with zeros, unless made with another --blocking-factor ...
_LARGEST_RECORD = 1 << 20  # ... of which powers of two are taken for such, up to this
_ENDS = 65536  # bytes at both ends of a tar that tell it from another of the same size


class Tars(Source):
    """webdataset tars: files of the same name up to the first dot are one sample; a picture and .txt or .json or both.

    Each tar is one part. The columns of the .json are the facts.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._identities: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self, part: int) -> str:
        """That of the tar when it was first asked for: one that changes later is made again by the next run."""
        if part not in self._identities:
            path = self.paths[part]
            try:
                with open(path, "rb") as file:
                    size = file.seek(0, 2)
                    file.seek(max(0, size - _ENDS))
                    tail = file.read()
                    file.seek(0)
                    head = file.read(_ENDS)
            except OSError:
                return digest_of(path.name.encode())
            self._identities[part] = digest_of(path.name.encode(), str(size).encode(), head, tail)
        return self._identities[part]

    def rows(self, part: int) -> Iterator[Row | Damage | Stray]:
        path = self.paths[part]
        key, files = "", dict[str, bytes]()
        try:
            for name, content in _members(path):
                # webdataset's own rule, case of the extension aside
                match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
                if match is None:
                    yield Stray(name)
                    continue
                suffix = match[2].lower()
                if files and (match[1] != key or suffix in files):  # what comes again is another sample of that name
                    yield self._row(path, key, files)
                    files = {}
                key = match[1]
                files[suffix] = content
        # zlib.error and lzma's have no common base with OSError and tarfile's
        except Exception as error:
            check_final(error, str(path))
            if files:
                # what is missing may be the very column that would have kept it out
                broken: tuple[Reason, str] = ("unreadable", "the tar breaks off inside or right after this sample")
                yield Row(f"{path.name}/{key}", None, problem=broken)
            yield Damage(str(path), one_line(error, named=True))
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
            text = files["txt"].decode("utf-8") if "txt" in files else None
        except (ValueError, RecursionError) as error:
            return Row(name, None, problem=("bad record", f"its .json or .txt cannot be read: {error}"))
        suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in files), None)
        if suffix is None:
            problem: tuple[Reason, str] = ("no picture", f"has only {', '.join(sorted(files))}")
            return Row(name, None, facts, problem, text)
        return Row(name, partial(bytes, files[suffix]), facts, text=text)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar, in order.

    Raises:
        Exception: of any kind, where it cannot be read on. A header broken in the middle, a tar cut off between two
        members and one that goes on after its end count too, which tarfile takes for the end.
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
        _check_end(tar.fileobj.read(_LARGEST_RECORD + 2 * tarfile.BLOCKSIZE), tar.offset)


def _check_end(end: bytes, offset: int) -> None:
    """Whether what follows the last member is an end: two blocks of zeros, and more only to fill the last record.

    Raises:
        tarfile.ReadError: it is not.
    """
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end-of-archive mark: cut off between two files")
    if end[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise tarfile.ReadError(f"broken header at byte {offset}")
    size = offset + len(end)
    record = max(_RECORD, min(size & -size, _LARGEST_RECORD))
    if len(end) > record + tarfile.BLOCKSIZE or end.strip(b"\0"):
        raise tarfile.ReadError(
            f"goes on after the end-of-archive mark at byte {offset}: zeros where data was, or several tars in one file"
        )


def tar_paths(pattern: str) -> list[Path]:
    """The tars of a folder, or of a pattern with braces or wildcards, in order.

    Raises:
        DataError: there are none.
    """
    if Path(pattern).is_dir():
        paths = sorted(path for path in Path(pattern).iterdir() if TAR.search(path.name))
        if not paths and any(Path(pattern).glob("*.parquet")):
            raise DataError(f"{pattern}: {_PARQUET}")
        if not paths:
            raise DataError(f"{pattern}: holds neither metadata.jsonl nor tars nor a saved data set")
        return paths
    if pattern.endswith(".parquet"):
        raise DataError(f"{pattern}: {_PARQUET}")
    if not TAR.search(pattern):
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
