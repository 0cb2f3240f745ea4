# SPDX-License-Identifier: Apache-2.0
"""How ops find their backends: the reference, the Triton kernels, and the native library behind thin adapters."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from sdxl_fast import native as library
from sdxl_fast.constraints import Condition, DeviceType, Dtype, Rule, Values
from sdxl_fast.dispatch import Backend
from sdxl_fast.errors import UnavailableError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Functions = tuple[Callable[..., Any], ...]
"""A forward, a backward and, where there is one, the forward of a call that no backward follows."""


def interpreting() -> bool:
    """Whether Triton interprets its kernels in Python, which runs them on CPU tensors too (for tests, very slowly)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@dataclass(frozen=True)
class TritonDevice:
    """``arg`` is where Triton can run: a CUDA tensor, or a CPU tensor under TRITON_INTERPRET=1."""

    arg: str

    def check(self, values: Values) -> str | None:
        device = values[self.arg].device
        if device.type == "cuda" or (device.type == "cpu" and interpreting()):
            return None
        return f"{self.describe()}, got one on {device}"

    def describe(self) -> str:
        return f"{self.arg} must be a cuda tensor (or a cpu one in the interpreter, TRITON_INTERPRET=1)"


def no_backward(*args: Any) -> Any:
    """Stands where an op without a derivative has no backward."""
    raise NotImplementedError("this op has no derivative")


def eager(reference: ModuleType) -> Backend:
    """The reference as a backend: any device, any float dtype."""
    return Backend("eager", lambda: (reference.fwd, getattr(reference, "bwd", no_backward)))


def triton(op: str, lead: str, *rules: Rule) -> Backend:
    """The Triton kernels of ``op``; ``rules`` are those beyond device and dtype of the lead tensor."""

    def load() -> Functions:
        if not (torch.cuda.is_available() or interpreting()):
            raise UnavailableError("no CUDA GPU (set TRITON_INTERPRET=1 before the first use to interpret on the CPU)")
        try:
            module = importlib.import_module(f"sdxl_fast.triton_kernels.{op}")
        except ImportError as error:
            raise UnavailableError(f"the Triton kernels do not import: {error}") from None
        return _on_its_gpu(getattr(module, f"{op}_fwd")), _on_its_gpu(getattr(module, f"{op}_bwd", no_backward))

    return Backend("triton", load, (TritonDevice(lead), Dtype(lead, GPU_FLOATS), *rules))


def _on_its_gpu(launch: Callable[..., Any]) -> Callable[..., Any]:
    """``launch`` with the GPU of its first argument current, since Triton launches on the current one."""

    @functools.wraps(launch)
    def launched(lead: Any, *args: Any) -> Any:
        first = lead[0] if isinstance(lead, list | tuple) else lead
        if not first.is_cuda or torch.cuda.current_device() == first.device.index:
            return launch(lead, *args)
        with torch.cuda.device(first.device):
            return launch(lead, *args)

    return launched


def recorded(values: Iterable[Any]) -> bool:
    """Returns whether gradients of a call with these arguments are recorded."""
    return torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in values)


def _recorded(values: Values) -> bool:
    return recorded(values.values())


def composed(lead: str, fwd: Callable[..., Any]) -> Backend:
    """PyTorch's own operations, which on small CPU tensors cost less host time where a backward follows.

    One of our operations is then an ``autograd.Function`` of Python, some 40 us more than one of PyTorch's.
    """
    alone = Condition("no gradients are recorded, and for that alone it is there", _recorded)
    rules = (DeviceType(lead, "cpu"), Dtype(lead, (torch.float32,)), alone)
    return Backend("library", lambda: (fwd, no_backward), rules, composed=True)


def native(device: str, lead: str, load: Callable[[str], Functions], *rules: Rule) -> Backend:
    """The native library on ``device`` ("cpu" or "cuda"); ``load(device)`` returns the adapters of the op."""
    dtypes = FLOATS if device == "cpu" else GPU_FLOATS

    def built(values: Values) -> bool:
        return library.runs_on(*torch.cuda.get_device_capability(values[lead].device))

    here = (
        () if device == "cpu" else (Condition(f"{lead} must be on a GPU that the native library was built for", built),)
    )
    own = (DeviceType(lead, device), *here, Dtype(lead, dtypes))
    return Backend(device, functools.partial(load, device), (*own, *rules))
