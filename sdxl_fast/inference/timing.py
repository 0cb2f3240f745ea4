"""How long each stage of a call took, without slowing the call down."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch

C = TypeVar("C", bound=Callable[..., Any])


def on_its_gpu(call: C) -> C:
    """A method that runs with the GPU of its object's `device` current, whose streams and events are then its own."""

    @functools.wraps(call)
    def placed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return call(self, *args, **kwargs)

    return cast(C, placed)


class StageClock:
    """Accumulates seconds by stage name, and in total since it was made.

    On a GPU a stage is two events on the current stream; they are read, and waited for, only when `seconds` is called,
    so the host never stalls inside the measured call. On the CPU it is the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._start = self._now()
        self._end: float | torch.cuda.Event | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the block takes under `name`."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def stop(self) -> None:
        """Mark the end of the total."""
        self._end = self._now()

    def seconds(self) -> dict[str, float]:
        """Seconds by stage in order of first use, and "total"."""
        found: dict[str, float] = {}
        for name, start, end in self._spans:
            found[name] = found.get(name, 0.0) + self._between(start, end)
        found["total"] = self._between(self._start, self._now() if self._end is None else self._end)
        return found

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        return end - start  # type: ignore[operator]
