"""What every source of pictures and captions gives: parts, each a fixed sequence of rows."""

from __future__ import annotations

import errno
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..text import printable
from .filters import Dropped, Reason

CAPTION = "text"
"""The column of captions, where no other is named."""


# What the file system says of a file. Any other error is one of its own, and may be gone the next time.
_FINAL = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
}


class Unavailable(Exception):  # noqa: N818  (says so of an input)
    """The file system failed to give an input; what depends on it is left for another run."""


def check_final(error: Exception, name: str) -> None:
    """Returns where an error is about what is read.

    Raises:
        Unavailable: it is about reading, as EIO and ESTALE are.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _FINAL:
        raise Unavailable(printable(f"{name}: {error.strerror or error}")) from error


@dataclass(frozen=True, slots=True)
class Row:
    """One picture as its source has it, under a printable name.

    `read` gives the picture file's bytes and may raise `Dropped`; `facts` are the caption and all other columns;
    `problem` is set instead where the source itself knows that the row is broken. `text` is a caption that comes in a
    file of its own.
    """

    name: str
    read: Callable[[], bytes] | None
    facts: dict[str, Any] = field(default_factory=dict)
    problem: tuple[Reason, str] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))

    def caption(self, column: str) -> object:
        """What is in the caption's column; a file with it comes first for the default column, and last for another."""
        value = self.facts.get(column)
        if self.text is None or (value is not None and (column != CAPTION or not self.text.strip())):
            return value
        return self.text


@dataclass(frozen=True, slots=True)
class Damage:
    """An input file that could not be read to its end; what it held beyond the rows before is unknown."""

    name: str
    detail: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))


@dataclass(frozen=True, slots=True)
class Stray:
    """A file of the input that is part of no row."""

    name: str


class Source(ABC):
    """A sequence of parts, `len` of them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, part: int) -> Iterator[Row | Damage | Stray]:
        """The rows of one part, in order.

        Raises:
            Unavailable: it cannot be read now.
        """

    @abstractmethod
    def identity(self, part: int) -> str:
        """Changes when the part does, as far as can be told without reading all of it."""


def digest_of(*contents: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def read_file(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        Dropped: it cannot be read.
        Unavailable: it cannot be read now.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        check_final(error, str(path))
        raise Dropped("no picture", error.strerror or str(error)) from None
    except ValueError as error:  # NUL, or what is not Unicode
        raise Dropped("bad record", f"no file can have this name ({error})") from None
