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
from sdxl_fast.inference.graphs import WARM_RUNS, GraphCache, StaleGraphError, cache_on, through
from sdxl_fast.inference.whole import WholeCall


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
        self.within = False

    def busy(self) -> bool:
        return self.within

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
        assert cache.run("double", _double, (x,), weights=0) is None
        assert through(cache, "double", _double, (x,), 0).tolist() == [2.0, 2.0]
    assert len(capturer.held_before) == 1
    assert cache.stats.uncaptured == 6
    assert "more than" in cache.stats.reasons["double"]


def test_what_cannot_be_captured_runs_and_says_why() -> None:
    cache, capturer = _cache(1000)

    def refuse(stage: Any, inputs: Any) -> Any:
        raise RuntimeError("operation not permitted\n when stream is capturing")

    capturer.capture = refuse
    for _ in range(2):
        assert cache.run("double", _double, (torch.ones(2),), weights=0) is None
    assert cache.stats.reasons == {"double": "operation not permitted when stream is capturing"}
    assert (cache.stats.captures, cache.stats.uncaptured) == (0, 2)


def test_within_a_capture_of_the_callers_there_is_no_graph() -> None:
    """The stage runs as it is, and so becomes part of that; neither a new graph nor a replay could."""
    cache, capturer = _cache(1000)
    x, y = torch.ones(2), torch.ones(3)
    cache.run("double", _double, (x,), weights=0)
    capturer.within = True
    assert cache.run("double", _double, (x,), weights=0) is None
    assert through(cache, "double", _double, (y,), 0).tolist() == [2.0] * 3
    assert cache.stats.reasons["double"].startswith("it is being captured already")
    capturer.within = False
    assert cache.run("double", _double, (y,), weights=0).tolist() == [2.0] * 3
    assert (cache.stats.captures, cache.stats.replays, cache.stats.uncaptured) == (2, 2, 2)


def test_a_kernel_that_triton_cannot_compile_is_run_without_a_graph() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    cache, capturer = _cache(1000)

    def refuse(stage: Any, inputs: Any) -> Any:
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    capturer.capture = refuse
    assert cache.run("double", _double, (torch.ones(2),), weights=0) is None
    assert cache.stats.reasons["double"].startswith("out of resource: shared memory")


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
        assert torch.equal(through(cache, "double", _double, (x,), 0), x * 2)
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


def _whole(pipe: OneStepPipeline) -> GraphCache:
    """Has the pipeline draw calls through graphs as on a GPU."""
    cache = _cache(1 << 20)[0]
    pipe._whole = WholeCall(cache)
    return cache


def _bytes(pipe: OneStepPipeline, prompt: str, seed: int, steps: int = 1, **more: Any) -> np.ndarray:
    images = pipe(prompt, seed=seed, num_inference_steps=steps, output_type="uint8", **more).images
    return images.cpu().numpy().astype(int)


def test_a_call_from_noise_to_bytes_is_one_graph(toy_folder: Path) -> None:
    plain, pipe = (OneStepPipeline.from_pretrained(toy_folder, device="cpu") for _ in range(2))
    cache = _whole(pipe)
    calls = [("cat", 0, 1, {}), ("sun", 1, 1, {}), ("cat", 2, 4, {}), ("cat", 3, 1, {"height": 24})]
    for _ in range(2):
        for prompt, seed, steps, more in calls:
            difference = _bytes(pipe, prompt, seed, steps, **more) - _bytes(plain, prompt, seed, steps, **more)
            assert np.abs(difference).max() <= 1
    assert (cache.stats.captures, cache.stats.replays) == (3, 8)  # a step count and a size each have their own
    assert list(pipe.timings) == ["text_encoders", "image", "post_processing", "total"]
    assert pipe.report["image"].use.packed == 8
    assert pipe.memory_report()["graphs"] == cache.nbytes
    picture = pipe("sun", seed=1, num_inference_steps=1).images[0]
    np.testing.assert_array_equal(np.asarray(picture), _bytes(pipe, "sun", 1)[0])
    # a graph reads weights where they are, the time embedding's too
    with torch.no_grad():
        for network in (pipe.unet, plain.unet):
            network.time_embedding.linear_1.weight.mul_(1.5)
            network.conv_in.weight.mul_(1.5)
    before = cache.stats.captures
    assert np.abs(_bytes(pipe, "cat", 0) - _bytes(plain, "cat", 0)).max() <= 1
    assert cache.stats.captures == before
    for network in (pipe.vae, plain.vae):
        weight = network.decoder.conv_in.weight
        weight.data = weight.data * 1.5
    with pytest.warns(RuntimeWarning, match="captured again"):
        again = _bytes(pipe, "cat", 0)
    assert np.abs(again - _bytes(plain, "cat", 0)).max() <= 1


def test_what_one_graph_cannot_hold_goes_network_by_network(toy_folder: Path) -> None:
    plain, pipe = (OneStepPipeline.from_pretrained(toy_folder, device="cpu") for _ in range(2))
    cache = _whole(pipe)
    calls: list[dict[str, Any]] = [
        {"output_type": "np"},
        {"output_type": "latent"},
        {"output_type": "uint8", "callback_on_step_end": lambda *_: {}},
        {"output_type": "uint8", "image": torch.zeros(3, 32, 32), "strength": 0.5},
    ]
    for call in calls:
        ours, stock = (np.asarray(p("cat", seed=0, num_inference_steps=1, **call).images) for p in (pipe, plain))
        np.testing.assert_allclose(ours, stock, atol=1e-5)
    pipe.one_graph = False
    _bytes(pipe, "cat", 0)
    assert cache.stats.captures == 0
    assert pipe.report["image"].use.packed == 0


def test_a_call_that_cannot_be_captured_draws_from_the_same_noise(toy_folder: Path) -> None:
    plain, pipe = (OneStepPipeline.from_pretrained(toy_folder, device="cpu") for _ in range(2))
    pipe._whole = WholeCall(_cache(1)[0])  # no room for any graph
    pictures = [
        p("cat", generator=torch.Generator().manual_seed(3), num_inference_steps=1, output_type="uint8").images
        for p in (pipe, plain)
    ]
    assert torch.equal(*pictures)
    assert list(pipe.report["image"].use.modules) == ["no graph can hold it"]
    assert "unet" in pipe.timings


@pytest.mark.gpu
def test_real_graphs_replay_what_was_captured() -> None:
    weight = torch.randn(64, 64, device="cuda")
    cache = cache_on(weight.device)
    assert cache is not None

    def stage(x: Tensor) -> Tensor:
        return ops.geglu(x @ weight)

    for rows in (4, 8, 4):
        x = torch.randn(rows, 64, device="cuda")
        torch.testing.assert_close(cache.run("stage", stage, (x,), weights=0), stage(x))
    weight.mul_(2)  # in place: the graph sees it
    torch.testing.assert_close(cache.run("stage", stage, (x,), weights=0), stage(x))
    assert cache.stats.captures == 2
    assert cache.nbytes > 0


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 4])
def test_a_whole_call_is_one_real_graph(toy_folder: Path, steps: int) -> None:
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cuda", dtype=torch.float32)
    for seed in (0, 1, 0):
        whole = _bytes(pipe, "cat", seed, steps)
        assert "image" in pipe.timings, pipe.report["image"]
        pipe.one_graph = False
        assert np.abs(whole - _bytes(pipe, "cat", seed, steps)).max() <= 1
        pipe.one_graph = True
    assert pipe.report["image"].use.packed == 3
