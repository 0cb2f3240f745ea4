# SPDX-License-Identifier: Apache-2.0
"""Machines of several GPUs: what is launched runs on the GPU of its arguments, and only where its code can."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_fast import OneStepPipeline, native
from sdxl_fast.inference.timing import on_its_gpu
from sdxl_fast.ops import _backends


def _on(index: int) -> Any:
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stack of current GPUs, for a machine that has two."""
    found = [0]

    @contextlib.contextmanager
    def device(given: torch.device) -> Iterator[None]:
        found.append(given.index)
        yield
        found.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found[-1])
    return found


def test_triton_launches_on_the_gpu_of_its_arguments(current: list[int]) -> None:
    launch = _backends._on_its_gpu(lambda lead, *rest: (current[-1], rest))
    assert launch(_on(1), 2) == (1, (2,))
    assert launch(_on(0)) == (0, ())
    assert launch([_on(1), _on(1)]) == (1, ())  # lora_merge takes lists
    assert launch(torch.ones(1)) == (0, ())  # interpreted
    assert current == [0]


def test_a_pipeline_draws_with_its_gpu_current(current: list[int]) -> None:
    class Pipeline:
        device = torch.device("cuda", 1)

        @on_its_gpu
        def __call__(self, prompt: str) -> tuple[int, str]:
            return current[-1], prompt

    assert Pipeline()("cat") == (1, "cat") and current == [0]
    Pipeline.device = torch.device("cpu")
    assert Pipeline()("cat") == (0, "cat")
    assert "prompt" in inspect.signature(OneStepPipeline.__call__).parameters


def test_the_library_serves_the_gpus_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(8, 6), (9, 0)]
    monkeypatch.setattr(native, "build_info", lambda: {"cuda": "13.0", "cuda_archs": ["90a"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    at = lambda device=0: capabilities[device if isinstance(device, int) else device.index]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", at)
    assert native._gpu_reason() is None
    rules = _backends.native("cuda", "x", lambda device: ()).rules
    said = [next(filter(None, (rule.check({"x": _on(index)}) for rule in rules[:2])), None) for index in (0, 1)]
    assert said == ["x must be on a GPU that the native library was built for", None]
    del capabilities[1]
    reason = native._gpu_reason()
    assert reason is not None and "built for 90a, the GPUs here are sm_86" in reason
