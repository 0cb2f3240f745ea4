# SPDX-License-Identifier: Apache-2.0
"""Finds and opens the native library through its binding ``sdxl_fast._C``, and says why when it cannot.

The binding has one function per function of ``csrc/include/sdxl_fast.h``, without the ``sdxl_fast_`` prefix: pointers
and streams are integers (0 is null), the result is a status. Nothing here imports torch or is run by importing
``sdxl_fast``.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from sdxl_fast.errors import BuildMismatchError, UnavailableError

# The SDXL_FAST_ABI that the callers in sdxl_fast/ops are written for.
ABI = 12

_REBUILD = "rebuild it with `pip install .` (or `pip install -e . --no-build-isolation`) in the checkout"


@functools.cache
def load() -> ModuleType:
    """Returns the binding module.

    Raises:
        ImportError: when it is not installed or does not open.
        BuildMismatchError: when it was built from another version of the C header.
    """
    module = importlib.import_module("sdxl_fast._C")
    found = {"library": module.abi(), "binding": module.HEADER_ABI}
    wrong = {part: number for part, number in found.items() if number != ABI}
    if wrong:
        numbers = ", ".join(f"the {part} has ABI {number}" for part, number in wrong.items())
        raise BuildMismatchError(f"this version of sdxl_fast needs native ABI {ABI}, but {numbers}; {_REBUILD}")
    return module


@functools.cache
def build_info() -> dict[str, Any]:
    """Returns what the library says of its build: version, abi, compiler, cuda, cuda_archs, cutlass, isas."""
    info: dict[str, Any] = json.loads(load().build_info())
    return info


@functools.cache
def unavailable_reason(device: str) -> str | None:
    """Returns why the library cannot serve ``device`` ("cpu" or "cuda") here, or None when it can."""
    try:
        load()
    except ModuleNotFoundError as error:
        return f"the native library is not installed ({error}); {_REBUILD}"
    except (ImportError, BuildMismatchError) as error:
        return f"the native library does not open: {error}"
    if device == "cpu":
        return None
    if build_info()["cuda"] is None:
        return "the native library was built without CUDA; rebuild with SDXL_FAST_CUDA=on where nvcc is installed"
    return _gpu_reason()


def _gpu_reason() -> str | None:
    """Why none of this machine's GPUs can run the CUDA code of the library, or None when one can."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    found = sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    if not any(runs_on(*capability) for capability in found):
        here = ", ".join(f"sm_{major}{minor}" for major, minor in found)
        return (
            f"the library was built for {', '.join(build_info()['cuda_archs'])}, the GPUs here are {here}; rebuild here"
        )
    return None


def runs_on(major: int, minor: int) -> bool:
    """Whether the library's CUDA code runs on GPUs of compute capability major.minor."""
    return any(_runs_on(arch, major, minor) for arch in build_info()["cuda_archs"])


@functools.cache  # asked at every call of an op on a GPU
def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code built for ``arch`` ("89", "90a", "80-real", ...) runs on compute capability major.minor."""
    number, _, kind = arch.partition("-")
    digits = int(number.rstrip("af"))
    if number.endswith("a"):  # architecture-specific: that very GPU
        return digits == 10 * major + minor
    if kind != "virtual" and digits // 10 == major and digits % 10 <= minor:
        return True
    # PTX, which CMake embeds unless told "-real", is compiled by the driver for anything newer.
    return kind != "real" and digits <= 10 * major + minor


def library_path() -> Path:
    """Returns the path of the shared library, which opens without Python (through ctypes, say).

    Raises:
        UnavailableError: when it is not where the binding would look for it.
    """
    folder = Path(str(load().__file__)).parent / "lib"
    for name in ("libsdxl_fast.so", "libsdxl_fast.dylib"):
        if (folder / name).is_file():
            return folder / name
    raise UnavailableError(f"no libsdxl_fast in {folder}; {_REBUILD}")
