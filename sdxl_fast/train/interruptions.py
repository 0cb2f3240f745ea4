"""Being told to stop, and what an earlier process left lying about when it was killed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class StepAbandonedError(Exception):
    """A step was left before it had moved anything, because some process was told to stop."""


class _StopRequest:
    """Whether SIGTERM or SIGINT came since the outermost `watching` began; the loops read it between steps, and between
    micro-batches as long as nothing has moved."""

    def __init__(self) -> None:
        self.set = False
        self._depth = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the first signal only sets the flag; the handlers that were there come back afterwards."""
        if self._depth:
            yield
            return
        self.set, self._depth = False, 1
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            self._depth = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.set = True


STOP = _StopRequest()


def clear_temporaries(folder: Path) -> None:
    """Removes what a killed process was writing in a run's folder: names with a dot in front are never whole."""
    for path in sorted(folder.rglob(".*"), reverse=True):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
