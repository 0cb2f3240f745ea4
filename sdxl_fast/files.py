"""Files that are either whole or not there, and what they are known by."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PIECE = 1 << 20  # bytes


def file_sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file's content, which is never in memory as a whole."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(_PIECE):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` when the block ends well and vanishes when it does not.

    The parent folder is made. The temporary name keeps the suffix, where image and weight writers read the format. The
    content is on the disk before the file has its name, so that no crash of the machine leaves an empty one.

    Args:
        path: of the file.
        durable: False does not wait for the disk, for many small files of which an empty one is made again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            sync_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_names(folder: Path) -> None:
    """Waits until the names of what lies in a folder are on the disk, where the file system can do that."""
    with suppress(OSError):  # what it would save is the names alone
        _sync(folder)


def sync_folder(folder: Path) -> None:
    """Waits until a folder is on the disk with all that lies in it.

    Raises:
        OSError: the content of a file cannot be written.
    """
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        sync_names(Path(parent))


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well and vanishes when it does not.

    Its content is on the disk before it has its name.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    old = temporary / "replaced"
    try:
        writing = temporary / "new"
        writing.mkdir()
        yield writing
        sync_folder(writing)
        if path.exists():
            path.rename(old)  # a folder with something in it cannot be renamed over
        writing.rename(path)
        sync_names(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
