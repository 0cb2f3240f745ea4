# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA sources over the emulation of ``csrc/cuda/emulation`` and stands them in for the native library."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sdxl_fast.testing.compare import Scale, assert_all, compare_all, error_scale

COMPILER = shutil.which("g++") or shutil.which("clang++")
# The sanitizer traps signed overflow, misaligned vectors and indices outside shared arrays.
FLAGS = (
    "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -DSDXL_FAST_CUDA_EMULATION "
    "-DSDXL_FAST_WITH_HOPPER -w "
    "-fsanitize=undefined -fsanitize-undefined-trap-on-error"
)
GUARD = 0x5A
_CTYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "double": ctypes.c_double, "float": ctypes.c_float}

Values = tuple[Any, ...]
Run = Callable[[Any, Values], dict[str, torch.Tensor]]


def build(csrc: Path, target: Path) -> ctypes.CDLL:
    """Compiles every .cu file of ``csrc`` for the CPU and returns the library, its functions typed after the header.

    Raises:
        RuntimeError: with the compiler's text.
    """
    # Of the matrix kernels, tensor cores through and through, emulation/product.cpp has all but the products.
    sources = [*sorted((csrc / "cuda").glob("*.cu")), *sorted((csrc / "cuda" / "emulation").glob("*.cpp"))]
    command = [str(COMPILER), "-x", "c++", *FLAGS.split(), *map(str, sources), "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(built.stderr)
    library = ctypes.CDLL(str(target))
    header = (csrc / "include" / "sdxl_fast.h").read_text()
    for returns, name, parameters in re.findall(r"SDXL_FAST_API (\w+) (sdxl_fast_\w+_cuda)\(([^)]*)\)", header):
        function = getattr(library, name)
        function.restype = _CTYPES[returns]
        function.argtypes = [
            ctypes.c_void_p if "*" in parameter else _CTYPES[parameter.split()[-2]]
            for parameter in parameters.split(",")
        ]
    return library


def binding(library: ctypes.CDLL, csrc: Path) -> Any:
    """Returns what stands for ``sdxl_fast._C``: the library's CUDA functions without the prefix."""
    header = (csrc / "include" / "sdxl_fast.h").read_text()
    names = re.findall(r"SDXL_FAST_API \w+ (sdxl_fast_\w+_cuda)\(", header)
    functions = {name.removeprefix("sdxl_fast_"): getattr(library, name) for name in names}
    return SimpleNamespace(status_text=str, **functions)


def _double(values: Values) -> Values:
    return tuple(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)


def check(op: str, kernel: Any, reference: Any, run: Run, draw: Callable[[int], Values], **rows: int) -> None:
    """Compares kernel and reference on draw(0) under the bound of `sdxl_fast.testing.compare`.

    Args:
        op: for the report.
        kernel, reference: (fwd, bwd).
        run: calls one of them on drawn values and names what comes out; gradients begin with d.
        draw: arguments by seed.
        **rows: over how many rows a tensor sums.
    """
    values = draw(0)
    oracle = run(reference, _double(values))
    baseline = run(reference, values)
    scales = {name: Scale() for name in oracle}
    for seed in range(1, 5):  # a lucky rounding in a small tensor must not decide how large PyTorch's error is
        other = draw(seed)
        exact, rounded = run(reference, _double(other)), run(reference, other)
        scales = {name: scales[name] | error_scale(rounded[name], exact[name]) for name in scales}
    got = run(kernel, values)
    gradients = [name for name in oracle if name.startswith("d")]
    assert_all(compare_all(got, oracle, baseline, op=op, gradients=gradients, rows=rows, scales=scales))


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """Returns t in channels_last, also where sizes of one make the layout ambiguous."""
    return torch.empty(t.shape, dtype=t.dtype, memory_format=torch.channels_last).copy_(t)


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """Returns t at an address that is a multiple of its element size only; strides kept."""
    copy = t.new_empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1)
    return copy.copy_(t)
