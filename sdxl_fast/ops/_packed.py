# SPDX-License-Identifier: Apache-2.0
"""Convolutions and small linear layers on a CPU whose weight has been put in order, for inference in float32.

The order, of csrc/cpu/packed_conv2d.cpp or of csrc/cpu/winograd_conv2d.cpp, is made once and kept by whoever calls.
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
# Input channels that the Winograd kernel takes, of csrc/cpu/winograd_conv2d_plan.h.
WINOGRAD_CHANNELS = 512


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


def winograd(weight: torch.Tensor, *, upsample: bool = False) -> torch.Tensor:
    """Returns the weight [C_out, C_in, 3, 3] as ``winograd_conv2d`` takes it: G g Gᵀ, in the kernel's order, flat."""
    g = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    if upsample:
        g = g[[0, 1, 3]]
    return packed((g @ weight.double() @ g.T).to(weight.dtype))


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c_out: int, kernel: int, stride: int, padding: int
) -> torch.Tensor:
    """Returns the convolution of x [N,C,H,W], channels_last float32 on a CPU, with a ``packed`` weight."""
    n, c_in, h, w = x.shape
    p, q = ((size + 2 * padding - kernel) // stride + 1 for size in (h, w))
    y = torch.empty((n, c_out, p, q), dtype=x.dtype, memory_format=torch.channels_last)
    _call("packed_conv2d_fwd_cpu", x, weight, bias, y, (n, h, w, c_in, c_out, kernel, stride, padding))
    return y


def winograd_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c_out: int, *, upsample: bool = False
) -> torch.Tensor:
    """Returns the 3x3 convolution of x [N,C,H,W], channels_last float32 on a CPU, stride 1, padding 1; or of x doubled.

    With 16 multiplications where there are 36, 9 of a doubled map (Winograd's F(2x2, 3x3)). C is at most
    ``WINOGRAD_CHANNELS``; the weight is one of ``winograd``.
    """
    n, c_in, h, w = x.shape
    size = (2 * h, 2 * w) if upsample else (h, w)
    y = torch.empty((n, c_out, *size), dtype=x.dtype, memory_format=torch.channels_last)
    _call("winograd_conv2d_fwd_cpu", x, weight, bias, y, (n, h, w, c_in, c_out, int(upsample)))
    return y


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c_out: int) -> torch.Tensor:
    """Returns the linear layer of x [..., C], contiguous float32 on a CPU, with a ``packed`` weight."""
    y = x.new_empty((*x.shape[:-1], c_out))
    rows, c_in = x.numel() // x.shape[-1], x.shape[-1]
    _call("packed_conv2d_fwd_cpu", x, weight, bias, y, (1, 1, rows, c_in, c_out, 1, 1, 0))
    return y


def _call(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    sizes: tuple[int, ...],
) -> None:
    library = _library()
    if library is None:
        raise UnavailableError("there is no native library; ask available() first")
    addresses = (x.data_ptr(), weight.data_ptr(), _native.pointer(bias), y.data_ptr())
    status = getattr(library, name)(*addresses, *sizes, torch.get_num_threads())
    if status:
        _native.fail(library, status, name, x, bias)
