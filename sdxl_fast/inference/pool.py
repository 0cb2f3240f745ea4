"""Throughput: one engine per device, behind one queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch

from .pipeline import OneStepPipeline


class EnginePool:
    """Pipelines that take calls from one queue, each one call at a time; whichever is free takes the next.

    A call fails for its own caller alone. Leaving a `with` block closes the pool.

    Args:
        engines: pipelines with nothing in common, as a rule one for each device.

    Raises:
        ValueError: no engines, or the same one twice.
    """

    def __init__(self, engines: Sequence[Callable[..., Any]]) -> None:
        if not engines or len({id(engine) for engine in engines}) != len(engines):
            raise ValueError("engines must be one pipeline or more, and none of them twice")
        self.engines = tuple(engines)
        self._free: SimpleQueue[Callable[..., Any]] = SimpleQueue()
        for engine in engines:
            self._free.put(engine)
        # never more threads than engines, so a thread that runs finds one free
        self._threads = ThreadPoolExecutor(len(engines), thread_name_prefix="sdxl-fast-engine")

    @classmethod
    def from_pretrained(
        cls, model: Any = None, *, devices: Sequence[str | torch.device] | None = None, **arguments: Any
    ) -> EnginePool:
        """Load the same pipeline onto every device.

        Args:
            model: as for `OneStepPipeline.from_pretrained`, and so the other arguments.
            devices: None is all GPUs, or the CPU where there are none.
        """
        if devices is None:
            devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
        return cls([OneStepPipeline.from_pretrained(model, device=device, **arguments) for device in devices])

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call of a pipeline; returns what will hold its result, or its error.

        Pictures as tensors lie on the device that drew them. Raises RuntimeError for a closed pool.
        """
        return self._threads.submit(self._run, args, kwargs)

    def map(self, prompts: Iterable[str | Sequence[str]], **arguments: Any) -> Iterator[Any]:
        """Draw every prompt, or list of them, in a call of its own; the results come in the prompts' order.

        All calls are queued at once. The first one that failed raises where its result would come; those that are not
        yet running by then, or when the iterator is closed, are cancelled.

        Args:
            prompts: of one call each.
            arguments: of the pipeline's call; one whose value is an `Each` gives every call its own.
        """
        texts, calls = list(prompts), []
        short = [k for k, v in arguments.items() if isinstance(v, Each) and len(v.values) != len(texts)]
        if short:
            raise ValueError(f"{short[0]} has another number of values than there are prompts, {len(texts)}")
        for index, text in enumerate(texts):
            given = {name: v.values[index] if isinstance(v, Each) else v for name, v in arguments.items()}
            calls.append((text, given))
        return self._in_order([self.submit(text, **given) for text, given in calls])

    def warmup(self, shapes: Sequence[tuple[int, int, int]] | None = None) -> None:
        """`OneStepPipeline.warmup` of every engine, side by side; call it while nothing is queued."""
        with ThreadPoolExecutor(len(self.engines)) as threads:
            for done in [threads.submit(_on_device, engine, engine.warmup, shapes) for engine in self.engines]:  # type: ignore[attr-defined]
                done.result()

    def close(self, *, cancel: bool = False) -> None:
        """Wait until every queued call is done, or with `cancel` only the running ones, and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=cancel)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(cancel=error[0] is not None)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        engine = self._free.get()
        try:
            return _on_device(engine, engine, *args, **kwargs)
        finally:
            self._free.put(engine)

    @staticmethod
    def _in_order(futures: list[Future[Any]]) -> Iterator[Any]:
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


class Each:
    """A value for every call of `EnginePool.map`, in the prompts' order."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = list(values)


def _on_device(engine: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call with the engine's GPU as the thread's current one."""
    device = getattr(engine, "device", None)
    if device is None or torch.device(device).type != "cuda":
        return call(*args, **kwargs)
    with torch.cuda.device(device):
        return call(*args, **kwargs)
