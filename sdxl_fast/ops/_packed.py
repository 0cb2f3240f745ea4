# SPDX-License-Identifier: Apache-2.0
"""Small convolutions and linear layers on a CPU, the weight in the order of csrc/cpu/packed_conv2d.cpp.

For inference in float32: the order is made once and kept by whoever calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F

from sdxl_fast.errors import UnavailableError
from sdxl_fast.ops import _native

# Output channels of a panel, of csrc/cpu/packed_conv2d_plan.h.
_PANEL = 32


@functools.cache
def _library() -> ModuleType | None:
    """The binding, or None where there is none."""
    try:
        return _native.binding("cpu")
    except UnavailableError:
        return None


def available() -> bool:
    """Whether the native library is here."""
    return _library() is not None


def _panels(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The panels of [C_out, C_in, k, k], flat."""
    c_out = weight.shape[0]
    rows = weight.permute(2, 3, 1, 0).reshape(-1, c_out)
    rows = F.pad(rows, (0, -c_out % (_PANEL // 2)))
    for panel in rows.split(_PANEL, 1):
        yield panel.flatten()


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Returns the weight [C_out, C_in, k, k] (of a linear layer: [C_out, C_in]) in the kernel's order, flat."""
    weight = weight if weight.ndim == 4 else weight[:, :, None, None]
    return torch.cat([*_panels(weight), weight.new_zeros(weight.shape[1])])


def packed_phases(phases: torch.Tensor) -> torch.Tensor:
    """Returns the phases [C_in, C_out, 4, 4] of an upsampling (``phase_weights``) in the kernel's order, flat."""
    # Of the transposed convolution of stride 2, an even output sees taps 3 and 1, an odd one 2 and 0.
    taps = ([3, 1], [2, 0])
    kernels = (phases[:, :, rows][:, :, :, columns].transpose(0, 1) for rows in taps for columns in taps)
    panels = [panel for kernel in kernels for panel in _panels(kernel)]
    return torch.cat([*panels, phases.new_zeros(phases.shape[0])])


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c_out: int, kernel: int, stride: int, padding: int
) -> torch.Tensor:
    """Returns the convolution of x [N,C,H,W], channels_last float32 on a CPU, with a ``packed`` weight."""
    n, _, h, w = x.shape
    p, q = ((size + 2 * padding - kernel) // stride + 1 for size in (h, w))
    return _run(x, weight, bias, (n, c_out, p, q), (kernel, stride, padding, 0))


def upsample_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c_out: int) -> torch.Tensor:
    """Returns the convolution of x [N,C,H,W], channels_last float32 on a CPU, doubled, with ``packed_phases``."""
    n, _, h, w = x.shape
    return _run(x, weight, bias, (n, c_out, 2 * h, 2 * w), (2, 1, 1, 1))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c_out: int) -> torch.Tensor:
    """Returns the linear layer of x [..., C], contiguous float32 on a CPU, with a ``packed`` weight."""
    y = x.new_empty((*x.shape[:-1], c_out))
    _call(x, weight, bias, y, (1, 1, x.numel() // x.shape[-1], x.shape[-1], c_out, 1, 1, 0, 0))
    return y


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: tuple[int, int, int, int],
    how: tuple[int, int, int, int],
) -> torch.Tensor:
    n, c_in, h, w = x.shape
    y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    _call(x, weight, bias, y, (n, h, w, c_in, shape[1], *how))
    return y


def _call(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, sizes: tuple[int, ...]
) -> None:
    library = _library()
    if library is None:
        raise UnavailableError("there is no native library; ask available() first")
    addresses = (x.data_ptr(), weight.data_ptr(), _native.pointer(bias), y.data_ptr())
    status = library.packed_conv2d_fwd_cpu(*addresses, *sizes, torch.get_num_threads())
    if status:
        _native.fail(library, status, "packed_conv2d_fwd_cpu", x, bias)
