# SPDX-License-Identifier: Apache-2.0
"""The ``library`` backend of the convolutions: what oneDNN and cuDNN do behind PyTorch's own functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sdxl_fast.constraints import Condition, Rule
from sdxl_fast.dispatch import Backend
from sdxl_fast.ops._float8 import is_float8
from sdxl_fast.reference._common import without_autocast
from sdxl_fast.reference.conv2d import MaybeTensor
from sdxl_fast.reference.upsample_conv2d import Gradients, fold_phases, memory_format, phase_weights

# From how many input positions N*H*W on the phases, with the kernel made on the spot, beat upsampling and convolving,
# on a CPU; more for a weight from LARGE elements on, whose kernel costs more to make and to reorder than it saves on
# a small map. Milliseconds on one core of a Zen 4 EPYC, torch 2.13, oneDNN, definition / phases / kernel:
#   forward   float32: 144ch 4x4 .41/.48/.20, 128ch 8x8 .88/.56/.15, 64ch 16x16 .81/.44/.05, 640ch 32x32 290/134/20,
#             1280ch 16x16 323/210/120, 1280ch 32x32 1156/579/120; bfloat16: 128ch 8x8 .56/.32/.17,
#             640ch 32x32 140/66/20, 1280ch 16x16 139/112/180, 1280ch 32x32 572/307/180
#   backward  (both in all) float32: 128ch 8x8 1.9/2.2, 64ch 16x16 1.8/1.2, 32 of 128ch 8x8 51/26, 640ch 32x32 786/448;
#             bfloat16: 128ch 8x8 1.1/1.9, 64ch 16x16 1.13/1.10, 32 of 128ch 8x8 24/18, 1280ch 16x16 373/556
POSITIONS = {"forward": 64, "backward": 256}
POSITIONS_OF_LARGE = 1024
LARGE = 9 << 20
# Without oneDNN, PyTorch's transposed convolution is slow: 10 times the definition's time in float16, whose sums it
# keeps in float16 too.
BY_PHASES = (torch.float32, torch.bfloat16)


def by_phases(x: torch.Tensor, weight: torch.Tensor, *, made: bool, backward: bool) -> bool:
    """Whether the phases are the faster way; ``made`` says that their kernel is there already.

    On a GPU nothing has been measured: the phases are taken where the caller has prepared them.
    """
    if x.device.type == "cpu" and x.dtype not in BY_PHASES:
        return False
    if x.device.type != "cpu" or (made and not backward):
        return made
    positions = x.shape[0] * x.shape[2] * x.shape[3]
    return positions >= (
        POSITIONS_OF_LARGE if weight.numel() >= LARGE else POSITIONS["backward" if backward else "forward"]
    )


def upsample_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, phases: torch.Tensor | None
) -> torch.Tensor:
    n, _, h, w = x.shape
    if n * h * w == 0:
        return x.new_empty(n, weight.shape[0], 2 * h, 2 * w)
    with without_autocast(x):
        if by_phases(x, weight, made=phases is not None, backward=False):
            kernel = phase_weights(weight) if phases is None else phases
            y = F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
        else:
            y = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    return y.contiguous(memory_format=memory_format(x))


def upsample_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    phases: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    if x.numel() == 0:
        zeros = [
            torch.zeros_like(t) if need and t is not None else None
            for t, need in zip((x, weight, bias), needs, strict=True)
        ]
        return zeros[0], zeros[1], zeros[2]
    mask = [needs[0], needs[1], needs[2] and bias is not None]
    out, ones = [weight.shape[0]], [1, 1]
    backward = torch.ops.aten.convolution_backward
    with without_autocast(x):
        if by_phases(x, weight, made=phases is not None, backward=True):
            kernel = phase_weights(weight) if phases is None else phases
            dx, dkernel, dbias = backward(dy, x, kernel, out, [2, 2], ones, ones, True, [0, 0], 1, mask)
            dweight = fold_phases(dkernel) if mask[1] else None
        else:
            u = F.interpolate(x, scale_factor=2.0)
            du, dweight, dbias = backward(dy, u, weight, out, ones, ones, ones, False, [0, 0], 1, mask)
            dx = F.avg_pool2d(du, 2, divisor_override=1) if mask[0] else None
    return (
        dx.contiguous(memory_format=memory_format(x)) if mask[0] else None,
        torch.empty_like(weight).copy_(dweight) if dweight is not None and mask[1] else None,
        dbias if mask[2] else None,
    )


def upsample_conv2d() -> Backend:
    """The phases as one transposed convolution, or the two operations of the definition."""
    return Backend("library", lambda: (upsample_fwd, upsample_bwd))


_NO_FLOAT8: Rule = Condition(
    "x must not be float8_e4m3fn, of which PyTorch's library has no convolution", lambda values: not is_float8(values)
)


def conv2d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    stride: int,
    padding: int,
    scale_x: MaybeTensor = None,
    scale_w: MaybeTensor = None,
) -> torch.Tensor:
    # No scales come: float8 is refused.
    with without_autocast(x):
        y = F.conv2d(x, weight, bias, stride, padding)
    y = y.contiguous(memory_format=memory_format(x))
    return y if residual is None else y.add_(residual)


def conv2d_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int, needs: Sequence[bool]
) -> Gradients:
    mask = list(needs)
    with without_autocast(x):
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy, x, weight, [weight.shape[0]], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, mask
        )
    return (
        dx.contiguous(memory_format=memory_format(x)) if mask[0] else None,
        torch.empty_like(weight).copy_(dweight) if mask[1] else None,
        dbias if mask[2] else None,
    )


def conv2d() -> Backend:
    """The library's convolution, and an addition."""
    return Backend("library", lambda: (conv2d_fwd, conv2d_bwd), (_NO_FLOAT8,))
