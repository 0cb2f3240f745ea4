"""The policy of CUDA graphs, with graphs that behave as on a GPU but run on the CPU; on a GPU the real ones too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_fast import OneStepPipeline, dispatch, ops
from sdxl_fast.inference.accelerated import runner_of
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


def test_a_whole_pipeline_draws_the_same_through_graphs(toy_folder: Path) -> None:
    """Text encoders, UNet and decoder: captured for each shape, replayed after, dropped when weights move."""
    arguments = [
        {"prompt": prompt, "seed": seed, "height": side, "num_inference_steps": steps, "output_type": "np"}
        for seed, (prompt, side, steps) in enumerate([("cat", 32, 1), ("guitar", 24, 1), (["sun", "owl"], 32, 1),
                                                      ("cat", 32, 4), ("sun", 32, 1), ("guitar", 24, 1)])
    ]  # fmt: skip
    plain = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    wanted = [plain(**call).images for call in arguments]
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    caches = {name: _cache(1 << 20)[0] for name in ("text", "unet", "vae")}
    pipe._text_graphs = caches["text"]
    for name in ("unet", "vae"):
        runner = runner_of(getattr(pipe, name))
        assert runner is not None
        runner.graphs = caches[name]
    for _ in range(2):
        for call, picture in zip(arguments, wanted, strict=True):
            np.testing.assert_allclose(pipe(**call).images, picture, atol=1e-5)
    assert caches["text"].stats.captures == 2  # one text and two at a time; the rest was kept
    assert caches["unet"].stats.captures == caches["vae"].stats.captures == 3
    assert caches["vae"].stats.replays == 12
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)  # in place: no graph is lost
        plain.unet.conv_in.weight.mul_(1.5)
    np.testing.assert_allclose(pipe(**arguments[0]).images, plain(**arguments[0]).images, atol=1e-5)
    assert caches["unet"].stats.captures == 3
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data * 1.5  # elsewhere: captured again
    plain.unet.conv_in.weight.data = plain.unet.conv_in.weight.data * 1.5
    with pytest.warns(RuntimeWarning, match="have moved"):
        again = pipe(**arguments[0]).images
    np.testing.assert_allclose(again, plain(**arguments[0]).images, atol=1e-5)
    assert caches["unet"].stats.captures == 4


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
