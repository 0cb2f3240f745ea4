"""Between tokens and pictures the host neither waits for the device nor copies numbers to it, step by step."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sdxl_fast
from sdxl_fast import OneStepPipeline

PACKAGE = Path(sdxl_fast.__file__).parent
_READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal")


class _Reads(TorchDispatchMode):
    """Notes what has the host look at a tensor's numbers, but for the checks that operations make on a CPU alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _READS:
            frames = [f for f in traceback.extract_stack() if PACKAGE in Path(f.filename).parents]
            layers = [Path(f.filename).relative_to(PACKAGE).parts[0] for f in frames]
            if not {"ops", "reference", "op.py", "constraints.py", "dispatch.py"} & set(layers):
                self.found.append(f"{func._schema.name} by {frames[-1].filename}:{frames[-1].lineno}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_call_never_waits(toy_folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The tokens of a new prompt have to be copied up, so the prompt is one that is known."""
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    pipe("cat", seed=0, num_inference_steps=steps)
    made = torch.tensor

    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs.get("device") is None, "numbers of the host are copied to the device"
        return made(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    with _Reads() as reads:
        pipe("cat", seed=1, num_inference_steps=steps, output_type="uint8")
    assert not reads.found


def test_the_watch_sees_a_read(toy_folder: Path) -> None:
    """The test above would fail if there were one."""
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu")

    def look(pipe: Any, step: int, timestep: int, tensors: Any) -> Any:
        return tensors if float(tensors["latents"].sum()) else None

    with _Reads() as reads:
        pipe("cat", seed=1, callback_on_step_end=look)
    assert len(reads.found) == 1 and "_local_scalar_dense" in reads.found[0]
