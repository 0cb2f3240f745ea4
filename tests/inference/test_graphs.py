"""The policy of CUDA graphs, with graphs that behave as on a GPU but run on the CPU; on a GPU the real ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_fast import dispatch, ops
from sdxl_fast.inference.graphs import WARM_RUNS, CudaCapturer, GraphCache, StaleGraphError


class FakeGraph:
    """Runs the stage anew on fixed inputs into a fixed output, as a replay does; the caller's tensors are not seen."""

    def __init__(self, stage: Callable[..., Tensor], inputs: tuple[Tensor, ...], nbytes: int) -> None:
        self.inputs = tuple(t.clone() for t in inputs)
        self.nbytes = nbytes
        self._stage = stage
        for _ in range(WARM_RUNS):
            stage(*self.inputs)
        self.output = stage(*self.inputs)

    def replay(self) -> None:
        with dispatch.record():  # a replay calls no operation
            self.output.copy_(self._stage(*self.inputs))


class FakeCapturer:
    """Notes what the cache held when it was asked to capture: the peak of memory is that and the new graph."""

    def __init__(self, nbytes: Callable[[tuple[Tensor, ...]], int]) -> None:
        self.nbytes = nbytes
        self.cache: GraphCache | None = None
        self.held_before: list[int] = []

    def capture(self, stage: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> FakeGraph:
        assert self.cache is not None
        self.held_before.append(self.cache.nbytes)
        return FakeGraph(stage, inputs, self.nbytes(inputs))


def _cache(budget: int, nbytes: Callable[[tuple[Tensor, ...]], int] = lambda inputs: 100) -> tuple[GraphCache, Any]:
    capturer = FakeCapturer(nbytes)
    cache = capturer.cache = GraphCache(capturer, budget=budget)
    return cache, capturer


def _double(x: Tensor) -> Tensor:
    return x * 2


def test_a_graph_is_captured_once_per_stage_and_shape() -> None:
    cache, _ = _cache(1000)
    for shape in ((2, 3), (2, 3), (3, 2), (2, 3)):
        x = torch.randn(shape)
        assert torch.equal(cache.run("double", _double, (x,), weights=0), x * 2)
    assert torch.equal(cache.run("other", lambda t: t + 1, (x,), weights=0), x + 1)
    assert (cache.stats.captures, cache.stats.replays, len(cache)) == (3, 5, 3)


def test_results_belong_to_the_caller() -> None:
    cache, _ = _cache(1000)
    first = cache.run("double", _double, (torch.ones(2),), weights=0)
    second = cache.run("double", _double, (torch.ones(2) * 5,), weights=0)
    assert first.tolist() == [2.0, 2.0]
    assert second.tolist() == [10.0, 10.0]


def test_an_input_that_was_written_to_is_copied_again() -> None:
    cache, _ = _cache(1000)
    x = torch.ones(2)
    cache.run("double", _double, (x,), weights=0)
    x.add_(1)
    assert cache.run("double", _double, (x,), weights=0).tolist() == [4.0, 4.0]
    y = torch.zeros(2)
    assert cache.run("double", _double, (y,), weights=0).tolist() == [0.0, 0.0]
    assert cache.run("double", _double, (x,), weights=0).tolist() == [4.0, 4.0]


def test_room_is_made_before_a_capture() -> None:
    """The peak is never the old graphs and the new one: what the new one will take is expected from its inputs."""
    cache, capturer = _cache(250, lambda inputs: 100 * len(inputs[0]))
    for rows in (1, 1, 2, 1, 2):
        cache.run("double", _double, (torch.ones(rows),), weights=0)
        assert cache.nbytes <= 250
    # 1 row held (100); 2 rows are expected to take 200 and take 200: the first had to go before
    assert capturer.held_before == [0, 0, 0, 0]
    assert cache.evictions == 3


def test_the_least_recently_used_graph_goes() -> None:
    cache, _ = _cache(250)
    first, second, third = (torch.ones(shape) for shape in ((6,), (2, 3), (3, 2)))
    for x in (first, second, first, third, first):
        cache.run("double", _double, (x,), weights=0)
    assert cache.stats.captures == 3  # the second went for the third, and the first is still held
    cache.run("double", _double, (second,), weights=0)
    assert cache.stats.captures == 4


def test_a_graph_larger_than_the_budget_is_not_tried_twice() -> None:
    cache, capturer = _cache(50)
    x = torch.ones(2)
    for _ in range(3):
        assert cache.run("double", _double, (x,), weights=0).tolist() == [2.0, 2.0]
    assert len(capturer.held_before) == 1
    assert cache.stats.uncaptured == 3
    assert "more than" in cache.stats.reasons["double"]


def test_what_cannot_be_captured_runs_and_says_why() -> None:
    cache, capturer = _cache(1000)

    def refuse(stage: Any, inputs: Any) -> Any:
        raise RuntimeError("operation not permitted\n when stream is capturing")

    capturer.capture = refuse
    for _ in range(2):
        assert cache.run("double", _double, (torch.ones(2),), weights=0).tolist() == [2.0, 2.0]
    assert cache.stats.reasons == {"double": "operation not permitted when stream is capturing"}
    assert (cache.stats.captures, cache.stats.uncaptured) == (0, 2)


def test_an_error_of_the_stage_itself_is_the_callers() -> None:
    cache, _ = _cache(1000)
    with pytest.raises(ValueError, match="mine"):
        cache.run("bad", lambda x: (_ for _ in ()).throw(ValueError("mine")), (torch.ones(1),), weights=0)
    assert len(cache) == 0


def test_moved_weights_are_refused_until_the_graphs_are_dropped() -> None:
    cache, _ = _cache(1000)
    cache.run("double", _double, (torch.ones(2),), weights="here")
    with pytest.raises(StaleGraphError, match="double"):
        cache.run("double", _double, (torch.ones(2),), weights="there")
    assert cache.stats.refused == 1
    cache.clear()
    assert cache.nbytes == 0
    assert cache.run("double", _double, (torch.ones(2),), weights="there").tolist() == [2.0, 2.0]


def test_replays_count_the_operations_of_their_capture() -> None:
    cache, _ = _cache(1000)

    def stage(x: Tensor) -> Tensor:
        return ops.geglu(ops.geglu(x))

    for _ in range(2):
        with dispatch.record() as counts:
            cache.run("stage", stage, (torch.ones(1, 8),), weights=0)
        assert sum(counts.values()) == 2


def test_a_random_walk_over_shapes_stays_within_its_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    cache, _ = _cache(1000, lambda inputs: 40 + 30 * len(inputs[0]))
    for _ in range(300):
        rows = int(torch.randint(1, 40, (1,), generator=generator))
        x = torch.randn(rows, generator=generator)
        assert torch.equal(cache.run("double", _double, (x,), weights=0), x * 2)
        assert cache.nbytes <= 1000


@pytest.mark.gpu
def test_real_graphs_replay_what_was_captured() -> None:
    weight = torch.randn(64, 64, device="cuda")
    cache = GraphCache(CudaCapturer(weight.device))

    def stage(x: Tensor) -> Tensor:
        return ops.geglu(x @ weight)

    for rows in (4, 8, 4):
        x = torch.randn(rows, 64, device="cuda")
        torch.testing.assert_close(cache.run("stage", stage, (x,), weights=0), stage(x))
    weight.mul_(2)  # in place: the graph sees it
    torch.testing.assert_close(cache.run("stage", stage, (x,), weights=0), stage(x))
    assert cache.stats.captures == 2
    assert cache.nbytes > 0
