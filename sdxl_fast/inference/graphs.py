"""CUDA graphs of the stages of a call: captured on first use, held in an LRU of bytes, refused when weights moved.

A graph replays fixed kernels on fixed addresses. So one is kept per stage and shapes; its inputs are copied into
tensors of its own and its outputs out of them; a graph captured with other weight addresses than the present ones is
never replayed. Room is made before a capture, not after, so that the peak never holds the old graph and the new one,
and all captures share one memory pool: what one needs only while it runs, the next uses again.

`GraphCache` is that policy and knows no CUDA; `CudaCapturer` is how a capture is made on a GPU.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import dispatch
from ..text import one_line
from .lru import ByteLru

Stage = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]

FREE_SHARE = 1 / 3
"""Of a GPU's memory that is free when a cache is made, what its graphs may hold. At 1024 px in bf16 the VAE's
activations alone take about 2.5 GB a picture, so that beside SDXL's weights 80 GB have room for eight. A pipeline has
three caches of that size, of which a call as one graph uses one, and others the other two."""


class StaleGraphError(RuntimeError):
    """A graph was captured with weights that lie elsewhere now; replaying it would read what is no longer theirs."""


class Graph(Protocol):
    """A captured stage: `inputs` and `output` are its own tensors, `nbytes` what it holds of the GPU's memory."""

    inputs: Inputs
    output: Tensor
    nbytes: int

    def replay(self) -> None:
        """Run the stage on `inputs` into `output`."""


class Capturer(Protocol):
    """Makes graphs."""

    def busy(self) -> bool:
        """Whether somebody captures what runs now; no graph can be made or replayed within that."""

    def capture(self, stage: Stage, inputs: Inputs) -> Graph:
        """Run `stage` on copies of `inputs` until it is warm, then record it.

        Raises RuntimeError, or a TritonError, if it cannot be.
        """


@dataclass(slots=True)
class _Held:
    graph: Graph
    weights: Hashable
    calls: Counter[tuple[str, str]]
    # what the static inputs hold: an identity that stays valid (the tensor is kept) and its version
    sources: list[tuple[Tensor, int] | None] = field(default_factory=list)


@dataclass(slots=True)
class GraphStats:
    """What the cache did: captures, replays, calls run without a graph, and the reasons by stage."""

    captures: int = 0
    replays: int = 0
    uncaptured: int = 0
    refused: int = 0
    reasons: dict[str, str] = field(default_factory=dict)


class GraphCache:
    """Runs stages through graphs.

    Args:
        capturer: how a graph is made.
        budget: bytes that all graphs together may hold.
    """

    def __init__(self, capturer: Capturer, *, budget: int) -> None:
        self._capturer = capturer
        self._held: ByteLru[_Held] = ByteLru(budget)
        self._impossible: dict[Hashable, str] = {}
        self._rates: dict[str, float] = {}
        self.stats = GraphStats()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._held.used

    @property
    def budget(self) -> int:
        """Bytes that may be held."""
        return self._held.budget

    @property
    def evictions(self) -> int:
        """How many graphs had to go for others."""
        return self._held.evictions

    def __len__(self) -> int:
        return len(self._held)

    def run(
        self, name: str, stage: Stage, inputs: Inputs, *, weights: Hashable, size: int | None = None
    ) -> Tensor | None:
        """What `stage(*inputs)` gives, by replaying it; None where there can be no graph.

        Args:
            name: of the stage; with the inputs' shapes and dtypes it identifies the graph.
            stage: reads only its inputs and weights, and does nothing that a graph cannot hold.
            inputs: tensors on the GPU. A tensor that is the same and unchanged since the last call is not copied again.
            weights: identity of all weights the stage reads, as `Runner.identity`.
            size: of what its memory grows with; None is the bytes of all inputs.

        Returns:
            the result, which belongs to the caller, or None.

        Raises:
            StaleGraphError: the graph was captured with other weights; `clear` it.
        """
        if self._capturer.busy():
            self.stats.uncaptured += 1
            self.stats.reasons[name] = "it is being captured already, in a graph of the caller's"
            return None
        key = (name, *((tuple(t.shape), t.dtype, t.stride()) for t in inputs))
        held = self._held.get(key)
        if held is None:
            if key in self._impossible:
                self.stats.uncaptured += 1
                return None
            held = self._capture(name, key, stage, inputs, weights, size or sum(t.nbytes for t in inputs))
            if held is None:
                return None
        if held.weights != weights:
            self.stats.refused += 1
            raise StaleGraphError(f"the graph of {name} was captured with weights that have moved since")
        self._replay(held, inputs)
        return held.graph.output.clone()

    def through(
        self, name: str, stage: Stage, inputs: Inputs, weights: Hashable, *, size: int | None = None
    ) -> Tensor | None:
        """`run`, after dropping all graphs if those of this stage were captured with weights that have moved."""
        try:
            return self.run(name, stage, inputs, weights=weights, size=size)
        except StaleGraphError as error:
            warnings.warn(f"{error}; it is captured again", RuntimeWarning, stacklevel=4)
            self.clear()
            return self.run(name, stage, inputs, weights=weights, size=size)

    def clear(self) -> None:
        """Drop all graphs, and what is known about what cannot be captured."""
        self._held.clear()
        self._impossible.clear()

    def _replay(self, held: _Held, inputs: Inputs) -> None:
        for index, (static, given) in enumerate(zip(held.graph.inputs, inputs, strict=True)):
            source = held.sources[index]
            if source is None or source[0] is not given or source[1] != given._version:
                static.copy_(given)
                held.sources[index] = (given, given._version)
        held.graph.replay()
        self.stats.replays += 1
        counts = dispatch.recorder()
        if counts is not None:
            counts.update(held.calls)

    def _capture(
        self, name: str, key: Hashable, stage: Stage, inputs: Inputs, weights: Hashable, size: int
    ) -> _Held | None:
        """A new graph with room made for it beforehand; None when there cannot be one, which is remembered."""
        # the first capture of a stage has nothing to go by but the size itself
        expected = int(max(self._rates.get(name, 1.0) * size, size))
        if not self._held.make_room(min(expected, self._held.budget)):
            self._give_up(name, key, "exceeds the memory for graphs")
            return None
        try:
            with dispatch.record() as calls:
                graph = self._capturer.capture(stage, inputs)
        except _refusals() as error:
            self._give_up(name, key, one_line(error))
            return None
        self._rates[name] = max(self._rates.get(name, 0.0), graph.nbytes / max(size, 1))
        held = _Held(graph, weights, _of_one_run(calls), [None] * len(inputs))
        if not self._held.put(key, held, graph.nbytes):
            reason = f"needs {graph.nbytes >> 20} MB, more than the {self.budget >> 20} MB for graphs"
            self._give_up(name, key, reason)
            return None
        self.stats.captures += 1
        return held

    def _give_up(self, name: str, key: Hashable, reason: str) -> None:
        self._impossible[key] = reason
        self.stats.reasons[name] = reason
        self.stats.uncaptured += 1


def through(
    graphs: GraphCache | None,
    name: str,
    stage: Stage,
    inputs: Inputs,
    weights: Hashable,
    *,
    size: int | None = None,
) -> Tensor:
    """`stage(*inputs)`, replayed where there are graphs and can be one."""
    found = None if graphs is None else graphs.through(name, stage, inputs, weights, size=size)
    return stage(*inputs) if found is None else found


def _refusals() -> tuple[type[Exception], ...]:
    """What a capture that cannot be raises: torch's errors, and Triton's, which have no class in common with them."""
    triton = sys.modules.get("triton.errors")
    return (RuntimeError,) if triton is None else (RuntimeError, triton.TritonError)


WARM_RUNS = 2
"""Runs before a capture: libraries choose algorithms and allocate workspaces on their first ones."""


def _of_one_run(calls: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Calls of operations in one replay, out of those counted over the warm runs and the capture."""
    return Counter({key: count // (WARM_RUNS + 1) for key, count in calls.items()})


class CudaGraph:
    """A captured `torch.cuda.CUDAGraph` with its tensors."""

    def __init__(self, graph: Any, inputs: Inputs, output: Tensor, nbytes: int) -> None:
        self._graph, self.inputs, self.output, self.nbytes = graph, inputs, output, nbytes

    def replay(self) -> None:
        """Launch on the current stream."""
        self._graph.replay()


class CudaCapturer:
    """Captures on one GPU, all graphs in one memory pool.

    Graphs of a pool may be replayed one after the other only, which one engine does: its calls follow one another on
    one stream. Outputs stay allocated while their graph lives, so no other graph of the pool writes to them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        self._alive: weakref.WeakSet[CudaGraph] = weakref.WeakSet()

    def busy(self) -> bool:
        """See `Capturer`."""
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def capture(self, stage: Stage, inputs: Inputs) -> CudaGraph:
        """See `Capturer`."""
        with torch.cuda.device(self._device):
            if self._stream is None:  # torch's own is one for all, on the GPU of whoever captured first
                self._stream = torch.cuda.Stream()
            if self._pool is None or not self._alive:  # torch gives up a pool with the last graph in it
                self._pool = torch.cuda.graph_pool_handle()
            statics = tuple(t.detach().clone() for t in inputs)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_RUNS):
                    stage(*statics)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()  # so that the difference below is the graph's alone
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other engines' threads do meanwhile is none of this capture's business
            how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            try:
                # the outer one: a capture that fails to end leaves its own stream current
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **how):
                    output = stage(*statics)
            except BaseException:
                self._pool = None  # torch may still be recording to it: no other capture could begin there
                raise
            taken = max(torch.cuda.memory_reserved() - before, 0)
        held = sum(t.numel() * t.element_size() for t in (*statics, output))
        captured = CudaGraph(graph, statics, output, max(taken, held))
        self._alive.add(captured)
        return captured


def cache_on(device: torch.device) -> GraphCache | None:
    """A cache of graphs for a GPU, with `FREE_SHARE` of what is free there now to hold; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # what torch keeps for its next allocations is free as well
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return GraphCache(CudaCapturer(device), budget=int(FREE_SHARE * (free + unused)))
