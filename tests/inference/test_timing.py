"""The stage clock adds up what it should."""

from __future__ import annotations

import time

import torch

from sdxl_fast.inference.timing import StageClock


def test_stages_accumulate_and_lie_within_the_total() -> None:
    clock = StageClock(torch.device("cpu"))
    for name in ("a", "b", "a"):
        with clock.stage(name):
            time.sleep(0.01)
    clock.stop()
    time.sleep(0.01)
    seconds = clock.seconds()
    assert list(seconds) == ["a", "b", "total"]
    assert seconds["a"] >= 0.02
    assert seconds["a"] + seconds["b"] <= seconds["total"]
    assert clock.seconds() == seconds
