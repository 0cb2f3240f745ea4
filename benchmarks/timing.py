# SPDX-License-Identifier: Apache-2.0
"""How long a call takes: rotating inputs, interleaved rounds, medians with their spread.

A *clock* turns calls into something that can be sampled. On the CPU it is the wall clock around a run of calls; on a
GPU the calls are captured in a CUDA graph and events time its replays, so that launch gaps and Python stay out; calls
that no graph can hold have the events around themselves. All keep the outputs of as many calls as there are inputs, so
that a call neither reads nor writes what is still cached.

Contestants take turns, one sample each per round, in an order that moves on every round: what the machine does to one
of them (a clock that drops, a neighbour that wakes up) it does to all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], object]

MAX_SETS = 512


@dataclass(frozen=True)
class Summary:
    """What a list of samples comes to.

    Attributes:
        median: of the samples.
        low, high: the quarter points.
        best: the smallest sample.
        rounds: how many samples there were.
    """

    median: float
    low: float
    high: float
    best: float
    rounds: int

    @property
    def spread(self) -> float:
        """Distance of the quarter points relative to the median: half of all samples lie within it."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def as_dict(self) -> dict[str, float]:
        """Returns the attributes and the spread, for JSON."""
        return {**asdict(self), "spread": self.spread}


def quantile(samples: Sequence[float], q: float) -> float:
    """Returns the ``q`` quantile, 0 <= q <= 1, between the two nearest samples by linear interpolation."""
    if not samples:
        raise ValueError("samples is empty; a quantile needs at least one")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def summarise(samples: Sequence[float]) -> Summary:
    """Returns median, quarter points and best of ``samples``."""
    return Summary(quantile(samples, 0.5), quantile(samples, 0.25), quantile(samples, 0.75), min(samples), len(samples))


def quotient(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Returns the summary of the quotients round by round: neighbours in time share what disturbed them."""
    return summarise([a / b for a, b in zip(numerator, denominator, strict=True)])


class Timed(Protocol):
    """Something prepared for timing."""

    def sample(self) -> float:
        """Runs it for a while and returns seconds per call."""


class Clock(Protocol):
    """Prepares calls for timing."""

    @property
    def name(self) -> str:
        """How it times, for the results file."""

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Warms up; ``calls`` are one and the same call on different inputs, run in turn."""


class _Loop:
    """Calls in turn under the wall clock."""

    def __init__(self, calls: Sequence[Call], min_seconds: float) -> None:
        self._calls, self._next = calls, 0
        self._held: list[object] = [None] * len(calls)
        self._run(len(calls))  # lazy set-up, and the memory of every output
        seconds = self._run(len(calls)) / len(calls)
        self._count = max(1, min(100_000, math.ceil(min_seconds / max(seconds, 1e-9))))

    def _run(self, count: int) -> float:
        calls, held, size = self._calls, self._held, len(self._calls)
        start = time.perf_counter()
        for i in range(self._next, self._next + count):
            held[i % size] = calls[i % size]()
        elapsed = time.perf_counter() - start
        self._next = (self._next + count) % size
        return elapsed

    def sample(self) -> float:
        return self._run(self._count) / self._count


class CpuClock:
    """The wall clock. A sample repeats the call until ``min_seconds`` have passed."""

    name = "wall clock"

    def __init__(self, min_seconds: float = 0.05) -> None:
        self.min_seconds = min_seconds

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Runs every call twice, and counts how many a sample takes."""
        return _Loop(calls, self.min_seconds)


class _Replay:
    """A captured graph of ``count`` calls, replayed between two events."""

    def __init__(self, graph: torch.cuda.CUDAGraph, held: list[object], count: int, min_seconds: float) -> None:
        self._graph, self._held, self._count, self._replays = graph, held, count, 1
        self.sample()
        self._replays = max(1, min(1000, math.ceil(min_seconds / max(self.sample() * count, 1e-9))))

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (self._count * self._replays)


class _Events(_Loop):
    """Calls in turn between two events, what the host takes to launch them with it."""

    def _run(self, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        super()._run(count)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class EventClock:
    """Events around calls that no graph can hold. A sample repeats the call until ``min_seconds`` have passed."""

    name = "CUDA events"

    def __init__(self, min_seconds: float = 0.01) -> None:
        self.min_seconds = min_seconds

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Runs every call twice, and counts how many a sample takes."""
        return _Events(calls, self.min_seconds)


class GraphClock:
    """Replays of a CUDA graph that holds the call on every input at least once.

    A sample replays for ``min_seconds`` or longer. Raises RuntimeError for a call that cannot be captured.
    """

    name = "CUDA graph replay"

    def __init__(self, min_seconds: float = 0.01, min_calls: int = 32) -> None:
        self.min_seconds, self.min_calls = min_seconds, min_calls

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Runs every call twice on a side stream, as capture asks for, then captures them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in (*calls, *calls):
                call()
            side.synchronize()
            start = time.perf_counter()
            for call in calls:
                call()
            side.synchronize()
            seconds = (time.perf_counter() - start) / len(calls)
        torch.cuda.current_stream().wait_stream(side)
        # One replay must outlast its own launch many times over; a long call does so alone.
        wanted = min(self.min_calls, math.ceil(self.min_seconds / max(seconds, 1e-9)))
        count = len(calls) * max(1, math.ceil(wanted / len(calls)))
        held: list[object] = [None] * len(calls)
        graph = torch.cuda.CUDAGraph()
        # the outer one: a capture that fails to end leaves its own stream current
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            for i in range(count):
                held[i % len(calls)] = calls[i % len(calls)]()
        torch.cuda.synchronize()
        return _Replay(graph, held, count, self.min_seconds)


def clock_for(device: str, *, quick: bool = False) -> Clock:
    """Returns the clock of a device type; ``quick`` samples for a tenth of the time."""
    scale = 0.1 if quick else 1.0
    return GraphClock(0.01 * scale) if device == "cuda" else CpuClock(0.05 * scale)


def kernel_seconds(call: Call) -> float:
    """Returns the seconds that a GPU computes for a call; what is missing to its wall clock, it waits."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    kernels = (event for event in found.key_averages() if event.device_type.name == "CUDA")
    return sum(event.self_device_time_total for event in kernels) / 1e6


def without_graph(clock: Clock) -> Clock:
    """Returns what times as ``clock`` does, but captures nothing."""
    return EventClock(clock.min_seconds) if isinstance(clock, GraphClock) else clock


def interleave(
    contestants: Mapping[str, Timed], *, rounds: int, budget_s: float = math.inf, least: int = 3
) -> dict[str, list[float]]:
    """Samples the contestants in turn.

    Args:
        contestants: prepared calls by name.
        rounds: samples of each.
        budget_s: seconds after which no further round starts, once there are ``least``.
        least: rounds that run whatever they take.

    Returns:
        Seconds per call by name, one entry per round.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for r in range(rounds):
        if r >= least and time.perf_counter() - start > budget_s:
            break
        shift = r % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            samples[name].append(contestants[name].sample())
    return samples


def sets_to_exceed(cache_bytes: int, bytes_per_set: int) -> int:
    """Returns how many input sets together are twice the cache, so that none is still in it when its turn comes."""
    return max(1, min(MAX_SETS, math.ceil(2 * cache_bytes / max(bytes_per_set, 1))))


def tensor_bytes(values: Mapping[str, Any]) -> int:
    """Returns the bytes of the tensors among ``values``."""
    return sum(v.numel() * v.element_size() for v in values.values() if isinstance(v, torch.Tensor))
