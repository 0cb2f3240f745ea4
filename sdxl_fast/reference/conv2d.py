# SPDX-License-Identifier: Apache-2.0
"""A 3x3 or 1x1 convolution with what is added to it, in plain PyTorch.

    y[n, o, P, Q] = bias[o] + residual[n, o, P, Q]
                    + sum over c, r, s of weight[o, c, r, s] x[n, c, P stride + r - padding, Q stride + s - padding]

with zeros beyond the map; in float32, rounded once; the sum times scale_x scale_w for operands in float8_e4m3, as in
``linear``. It is a product of matrices, M = N P Q positions by K = C_in k k
inputs by C_out, whose left operand is read out of the map as it is needed ("implicit GEMM").

Source: Chetlur et al. 2014 (arXiv:1410.0759).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sdxl_fast.reference._common import accumulation_dtype, itemsize, without_autocast, wrong_variants
from sdxl_fast.reference.linear import output_dtype
from sdxl_fast.reference.upsample_conv2d import Gradients, memory_format

MaybeTensor = torch.Tensor | None


def output_size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """Returns the height or width of y for one of x."""
    return (size + 2 * padding - kernel_size) // stride + 1


def output_shape(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """Returns the shape of y."""
    n, _, h, w = x.shape
    p, q = (output_size(size, weight.shape[-1], stride, padding) for size in (h, w))
    return n, weight.shape[0], p, q


def fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    stride: int,
    padding: int,
    scale_x: MaybeTensor = None,
    scale_w: MaybeTensor = None,
) -> torch.Tensor:
    """Differentiable forward.

    Args:
        x: [N, C_in, H, W], any float dtype or float8_e4m3.
        weight: [C_out, C_in, k, k].
        bias: [C_out] or None.
        residual: like the result, or None.
        stride, padding: the same in both directions.
        scale_x, scale_w: float32 of one element, for float8, else None.

    Returns:
        [N, C_out, P, Q] in x's dtype, bfloat16 for float8; channels_last if x is, else contiguous.
    """
    acc = accumulation_dtype(x.dtype)
    widened = None if bias is None else bias.to(acc)
    with without_autocast(x):
        if scale_x is None or scale_w is None:
            y = F.conv2d(x.to(acc), weight.to(acc), widened, stride, padding)
        else:
            y = F.conv2d(x.to(acc), weight.to(acc), None, stride, padding)
            y = y * (scale_x.reshape(()) * scale_w.reshape(()))
            y = y if widened is None else y + widened[:, None, None]
    y = y if residual is None else y + residual.to(acc)
    return y.to(output_dtype(x.dtype)).contiguous(memory_format=memory_format(x))


def bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    padding: int,
    needs: Sequence[bool],
    *,
    shift: int = 0,
) -> Gradients:
    """Backward.

    Args:
        dy: [N, C_out, P, Q].
        x: [N, C_in, H, W].
        weight: [C_out, C_in, k, k].
        stride, padding: as given to :func:`fwd`.
        needs: which of (dx, dweight, dbias) to compute.
        shift: columns dy is off by, for a wrong variant.

    Returns:
        (dx, dweight, dbias) in the dtype of x, like x, weight and bias; None where not needed.
    """
    acc = accumulation_dtype(x.dtype)
    mask, twice = list(needs), [stride, stride]
    with without_autocast(x):
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy.to(acc).roll(shift, -1), x.to(acc), weight.to(acc), [weight.shape[0]],
            twice, [padding, padding], [1, 1], False, [0, 0], 1, mask,
        )  # fmt: skip
    return (
        torch.empty_like(x).copy_(dx) if mask[0] else None,
        torch.empty_like(weight).copy_(dweight) if mask[1] else None,
        dbias.to(x.dtype) if mask[2] else None,
    )


def flops(
    shape: Sequence[int],
    *,
    out_channels: int,
    kernel_size: int,
    stride: int,
    padding: int,
    residual: bool = False,
    backward: bool = False,
) -> int:
    """Operations for x of ``shape`` [N, C_in, H, W]: a multiplication and an addition a tap; backward twice that."""
    n, c, h, w = shape
    p, q = (output_size(size, kernel_size, stride, padding) for size in (h, w))
    return 2 * n * p * q * out_channels * c * kernel_size**2 * (2 if backward else 1)


def bytes(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    out_channels: int,
    kernel_size: int,
    stride: int,
    padding: int,
    residual: bool = False,
    backward: bool = False,
) -> int:
    """Least memory traffic: x, weight [and residual] and y; backward dy, x, weight, dx and dweight."""
    n, c, h, w = shape
    p, q = (output_size(size, kernel_size, stride, padding) for size in (h, w))
    x, weight, y = n * c * h * w, c * out_channels * kernel_size**2, n * out_channels * p * q
    if backward:
        return (2 * (x + weight) + y) * itemsize(dtype)
    return (x + weight) * itemsize(dtype) + y * (1 + residual) * itemsize(output_dtype(dtype))


def _weight_transposed(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return fwd(x, weight.transpose(-1, -2), *rest)


def _border_replicated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    stride: int,
    padding: int,
    *scales: MaybeTensor,
) -> torch.Tensor:
    padded = F.pad(x, (padding,) * 4, mode="replicate").contiguous(memory_format=memory_format(x))
    return fwd(padded, weight, bias, residual, stride, 0, *scales)


def _residual_dropped(
    x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, residual: MaybeTensor, *rest: Any
) -> torch.Tensor:
    return fwd(x, weight, bias, None, *rest)


WRONG = wrong_variants(
    fwd={
        "weight_transposed": _weight_transposed,
        "border_replicated": _border_replicated,
        "residual_dropped": _residual_dropped,
    },
    bwd={"dy_a_column_off": functools.partial(bwd, shift=1)},
)
