# SPDX-License-Identifier: Apache-2.0
"""What the adapters of the native library share: codes of its C ABI, pointers, scratch memory, errors from a status."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from sdxl_fast.errors import BuildMismatchError, KernelLaunchError, UnavailableError
from sdxl_fast.reference._common import accumulation_dtype

# Codes of csrc/include/sdxl_fast.h.
DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.float8_e4m3fn: 4}
NHWC, NCHW = 0, 1
ACTIVATION = {"none": 0, "silu": 1}
APPROXIMATE = {"none": 0, "tanh": 1}
PREDICTION = {"epsilon": 0, "sample": 1, "v_prediction": 2}


def binding(device: str) -> ModuleType:
    """Returns the binding, whose functions are those of the C header without the prefix.

    Raises:
        UnavailableError: with the reason, when the library cannot serve ``device`` ("cpu" or "cuda") here.
    """
    try:
        native = importlib.import_module("sdxl_fast.native")
        reason = native.unavailable_reason(device)
        if reason is None:
            module: ModuleType = native.load()
            return module
    except (ImportError, BuildMismatchError) as error:
        reason = f"the native library does not load: {error}"
    raise UnavailableError(reason)


def layout(x: torch.Tensor) -> int:
    """Returns the layout code of a dense [N,C,H,W] tensor."""
    # A map of one position is both, and as NHWC its channels are a vector: 7 times the speed of disc_head on the CPU.
    return NCHW if x.is_contiguous() and x.shape[2] * x.shape[3] != 1 else NHWC


def pointer(t: torch.Tensor | None) -> int:
    """Returns the address of the first element, 0 for None."""
    return 0 if t is None else t.data_ptr()


def alike(*parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the parameters in one dtype, which is float32 where theirs differ."""
    return parameters if len({t.dtype for t in parameters}) == 1 else tuple(t.float() for t in parameters)


def scratch(size: int, like: torch.Tensor) -> torch.Tensor | None:
    """Returns ``size`` uninitialised bytes on the device of ``like``, or None for none."""
    # torch aligns CPU storage to 64 bytes and CUDA storage to 512; the kernels ask for 64.
    return torch.empty(size, dtype=torch.uint8, device=like.device) if size else None


def statistics(
    x: torch.Tensor, shape: Sequence[int], workspace: int, *, kept: bool
) -> tuple[tuple[torch.Tensor, ...], tuple[int, int, int], torch.Tensor | None]:
    """Returns what the forward of a norm writes beside y.

    Args:
        x: the map, whose device and accumulation dtype they have.
        shape: of the mean and of rstd.
        workspace: bytes of scratch memory.
        kept: whether a backward follows. Without one the statistics are scratch memory too: one allocation, not three.

    Returns:
        (mean, rstd), or nothing if they are not kept; the addresses of mean, rstd and workspace; the memory behind
        these, to be held until the call has been made.
    """
    dtype = accumulation_dtype(x.dtype)
    if kept:
        mean = torch.empty(shape, dtype=dtype, device=x.device)
        rstd = torch.empty_like(mean)
        memory = scratch(workspace, x)
        return (mean, rstd), (mean.data_ptr(), rstd.data_ptr(), pointer(memory)), memory
    whole, each = (workspace + 63) // 64 * 64, math.prod(shape) * dtype.itemsize
    memory = scratch(whole + 2 * each, x)
    start = pointer(memory)
    return (), (start + whole, start + whole + each, start), memory


def cpu_tail(x: torch.Tensor) -> int:
    """Returns the last argument of a CPU function: how many threads may work on it."""
    return torch.get_num_threads()


def cuda_tail(x: torch.Tensor) -> int:
    """Returns the last argument of a CUDA function: the current stream of x's device."""
    stream: int = torch.cuda.current_stream(x.device).cuda_stream
    return stream


TAIL: dict[str, Callable[[torch.Tensor], int]] = {"cpu": cpu_tail, "cuda": cuda_tail}


def guard(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function`` made to run with the device of its first argument current; as it is for the CPU."""
    if device == "cpu":
        return function

    @functools.wraps(function)
    def guarded(lead: torch.Tensor, *args: Any) -> Any:
        if torch.cuda.current_device() == lead.device.index:
            return function(lead, *args)
        with torch.cuda.device(lead.device):
            return function(lead, *args)

    return guarded


def fail(module: ModuleType, status: int, function: str, *tensors: torch.Tensor | None) -> None:
    """Raises KernelLaunchError for a status that is not 0."""
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors if t is not None)
    raise KernelLaunchError(f"{function}({shapes}) failed with status {status}: {module.status_text(status)}")
