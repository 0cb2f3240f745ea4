# SPDX-License-Identifier: Apache-2.0
"""Several processes may run the claims side by side: each takes what no other is at."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class BusyError(RuntimeError):
    """Another process is at it."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, a file beside it, which goes with the process.

    Where the file system has no locks it holds none: then one process has to do.

    Raises:
        BusyError: another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as file:  # inside, a training would take it for a leftover
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another process is at {folder.name}; the same command later finds it done") from None
        except OSError:  # of a file system without locks
            pass
        yield
