# SPDX-License-Identifier: Apache-2.0
"""How graphs are captured: pools, streams, what a failure leaves; with a stand-in for torch.cuda that is as strict."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_fast.inference import graphs
from sdxl_fast.inference.graphs import CudaCapturer, GraphCache, cache_on


class _Stream:
    def __init__(self, device: int) -> None:
        self.device = device

    def wait_stream(self, other: _Stream) -> None:
        pass


class _Graph:
    """Holds its pool, as torch's does."""

    def __init__(self, cuda: _Cuda) -> None:
        self._cuda, self.pool = cuda, -1

    def begin(self, pool: int) -> None:
        assert pool not in self._cuda.recording, "beginAllocateToPool: already recording to mempool_id"
        assert self._cuda.users.get(pool) != 0, "INTERNAL ASSERT: use_count > 0"
        self.pool = pool
        self._cuda.users[pool] = self._cuda.users.get(pool, 0) + 1

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        if self.pool >= 0:
            self._cuda.users[self.pool] -= 1


class _Cuda:
    """What a capturer uses of torch.cuda, on two GPUs."""

    def __init__(self) -> None:
        self.current_device = 0
        self.default = {index: _Stream(index) for index in (0, 1)}
        self.current = dict(self.default)
        self.users: dict[int, int] = {}
        self.recording: set[int] = set()
        self.captured: list[tuple[int, _Stream]] = []

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current_device = self.current_device, device.index
        yield
        self.current_device = before

    def Stream(self) -> _Stream:  # noqa: N802
        return _Stream(self.current_device)

    def current_stream(self) -> _Stream:
        return self.current[self.current_device]

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.current[stream.device] = self.current[stream.device], stream
        try:
            yield
        finally:
            self.current[stream.device] = before

    def CUDAGraph(self) -> _Graph:  # noqa: N802
        return _Graph(self)

    @contextlib.contextmanager
    def graph(self, graph: _Graph, *, pool: int, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
        before, self.current[stream.device] = self.current[stream.device], stream
        graph.begin(pool)
        self.recording.add(pool)
        self.captured.append((pool, stream))
        yield  # what raises within ends neither the recording nor the stream, as in torch
        self.recording.remove(pool)
        self.current[stream.device] = before

    def graph_pool_handle(self) -> int:
        self.users_seen = getattr(self, "users_seen", 0) + 1
        return self.users_seen

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 60 << 30, 80 << 30

    def memory_allocated(self, device: torch.device) -> int:
        return 7 << 30

    def is_current_stream_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def memory_reserved(self, device: torch.device | None = None) -> int:
        return 0 if device is None else 10 << 30


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    found = _Cuda()
    monkeypatch.setattr(graphs.torch, "cuda", found)
    return found


def _double(x: Tensor) -> Tensor:
    return x * 2


def _fails(x: Tensor) -> Tensor:
    raise RuntimeError("operation not permitted when stream is capturing")


def _within_capture(cuda: _Cuda, stage: Any) -> Any:
    """The stage, which succeeds when it only warms up."""
    return lambda x: stage(x) if cuda.recording else x


def test_a_pool_is_shared_while_a_graph_of_it_lives_and_never_taken_up_again(cuda: _Cuda) -> None:
    cache = GraphCache(CudaCapturer(torch.device("cuda", 0)), budget=1000)
    x, y = torch.ones(2), torch.ones(3)
    cache.run("a", _double, (x,), weights=0)
    cache.run("a", _double, (y,), weights=0)
    cache.clear()
    gc.collect()
    cache.run("a", _double, (x,), weights=0)
    assert [pool for pool, _ in cuda.captured] == [1, 1, 2]


def test_a_capture_that_fails_leaves_streams_and_later_captures_alone(cuda: _Cuda) -> None:
    cache = GraphCache(CudaCapturer(torch.device("cuda", 0)), budget=1000)
    x = torch.ones(2)
    cache.run("a", _double, (x,), weights=0)
    assert cache.run("b", _within_capture(cuda, _fails), (x,), weights=0) is None
    assert cuda.current == cuda.default
    assert cache.run("c", _double, (x,), weights=0) is not None
    assert [pool for pool, _ in cuda.captured] == [1, 1, 2]
    assert len(cache) == 2


def test_each_captures_on_a_stream_of_its_own_on_its_own_gpu(cuda: _Cuda) -> None:
    x, y = torch.ones(2), torch.ones(3)
    for index in (0, 1):
        cache = GraphCache(CudaCapturer(torch.device("cuda", index)), budget=1000)
        for given in (x, y):
            assert cache.run("a", _double, (given,), weights=0) is not None
    first, again, second, _ = (stream for _, stream in cuda.captured)
    assert first is again and (first.device, second.device) == (0, 1)
    assert not {first, second} & set(cuda.default.values())


def test_graphs_may_hold_a_third_of_what_is_free(cuda: _Cuda) -> None:
    """Of 60 GB that nobody has taken and 3 GB that torch has taken but not handed out."""
    cache = cache_on(torch.device("cuda", 0))
    assert cache is not None and cache.budget == 21 << 30
    assert cache_on(torch.device("cpu")) is None
