"""Several engines behind one queue: results in order, errors to their own callers, nothing left running."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_fast import OneStepPipeline
from sdxl_fast.inference import Each, EnginePool


class _Engine:
    """Answers with the text; waits where it is told to, and fails for "bad"."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.calls: list[str] = []
        self.busy = 0

    def __call__(self, text: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
        self.busy += 1
        assert self.busy == 1, "two calls at once"
        self.calls.append(text)
        if text in self.gates:
            assert self.gates[text].wait(30)
        self.busy -= 1
        if text == "bad":
            raise ValueError("no such picture")
        return text, arguments


def _alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sdxl-fast-engine")]


def test_results_come_in_the_order_of_the_prompts() -> None:
    slow, fast = _Engine(), _Engine()
    slow.gates = fast.gates = {"first": threading.Event()}
    with EnginePool([slow, fast]) as pool:
        found = pool.map(["first", "second", "third"], seed=Each([1, 2, 3]), height=64)
        last = pool.submit("fourth")
        assert last.result(30) == ("fourth", {})  # overtakes the first, which waits
        slow.gates["first"].set()
        assert list(found) == [
            (text, {"seed": k, "height": 64}) for k, text in enumerate(["first", "second", "third"], 1)
        ]
    assert sorted(slow.calls + fast.calls) == ["first", "fourth", "second", "third"]


def test_an_error_reaches_its_caller_only() -> None:
    with EnginePool([_Engine(), _Engine()]) as pool:
        futures = [pool.submit(text) for text in ("good", "bad", "fine", "well")]
        with pytest.raises(ValueError, match="no such picture"):
            futures[1].result(30)
        assert [f.result(30)[0] for k, f in enumerate(futures) if k != 1] == ["good", "fine", "well"]
        assert [pool.submit("again").result(30)[0] for _ in range(4)] == ["again"] * 4  # both still take calls


def test_mapping_stops_at_the_first_error() -> None:
    engine = _Engine()
    engine.busy, engine.gates = 0, {"held": threading.Event()}
    with EnginePool([engine]) as pool:
        found = pool.map(["good", "bad", "held", *["later"] * 50])
        assert next(found)[0] == "good"
        with pytest.raises(ValueError, match="no such picture"):
            next(found)
        engine.gates["held"].set()
    assert engine.calls.count("later") < 50


def test_closing_finishes_what_is_queued_and_ends_the_threads() -> None:
    pool = EnginePool([_Engine(), _Engine()])
    futures = [pool.submit(str(k)) for k in range(20)]
    pool.close()
    assert [f.result(0)[0] for f in futures] == [str(k) for k in range(20)]
    assert not _alive()
    with pytest.raises(RuntimeError):
        pool.submit("late")
    pool.close()  # twice is once


def test_closing_can_cancel_what_is_queued() -> None:
    engine = _Engine()
    engine.gates = {"running": threading.Event()}
    pool = EnginePool([engine])
    running, queued = pool.submit("running"), pool.submit("queued")
    while not engine.calls:
        pass
    threading.Timer(0.05, engine.gates["running"].set).start()
    pool.close(cancel=True)
    assert running.result(0)[0] == "running"
    with pytest.raises(CancelledError):
        queued.result(0)
    assert not _alive()


def test_mistakes_are_named() -> None:
    engine = _Engine()
    for engines in ([], [engine, engine]):
        with pytest.raises(ValueError, match="engines"):
            EnginePool(engines)
    with EnginePool([engine]) as pool, pytest.raises(ValueError, match=r"seed.*prompts, 2"):
        pool.map(["a", "b"], seed=Each([1]))


def test_two_engines_draw_what_one_draws(toy_folder: Path) -> None:
    prompts = [f"a red apple {k}" for k in range(6)]
    alone = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    wanted = [alone(text, seed=k, output_type="uint8").images for k, text in enumerate(prompts)]
    with EnginePool.from_pretrained(toy_folder, devices=["cpu", "cpu"]) as pool:
        pool.warmup()
        found = list(pool.map(prompts, seed=Each(range(6)), output_type="uint8"))
    assert all(torch.equal(ours.images, theirs) for ours, theirs in zip(found, wanted, strict=True))
