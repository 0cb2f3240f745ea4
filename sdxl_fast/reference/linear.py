# SPDX-License-Identifier: Apache-2.0
"""A linear layer with what is added to it, in plain PyTorch.

    y = x W^T [+ bias] [+ residual]

and for operands in float8_e4m3 with one scale a tensor, fixed beforehand::

    y = (scale_x x) (scale_w W)^T [+ bias] [+ residual]

All of it in float32, rounded once. Backward: dx = dy W, dW = dy^T x, dbias = sum over rows of dy, dresidual = dy; there
is none for float8, which is for inference.

Source: Micikevicius et al. 2022 (arXiv:2209.05433) for float8 with scales.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from sdxl_fast.reference._common import FLOAT8 as FLOAT8
from sdxl_fast.reference._common import accumulation_dtype, itemsize, without_autocast, wrong_variants
from sdxl_fast.reference._common import quantise as quantise

# What a product of float8 operands comes in.
FLOAT8_OUTPUT = torch.bfloat16

MaybeTensor = torch.Tensor | None
Gradients = tuple[MaybeTensor, MaybeTensor, MaybeTensor]


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of y for x of ``dtype``."""
    return FLOAT8_OUTPUT if dtype == FLOAT8 else dtype


def fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    scale_x: MaybeTensor,
    scale_w: MaybeTensor,
    *,
    partial_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Differentiable forward.

    Args:
        x: [..., K], any float dtype or float8_e4m3.
        weight: [N, K].
        bias: [N] or None.
        residual: [..., N] or None.
        scale_x, scale_w: float32 of one element, for float8, else None.
        partial_dtype: what the two halves of the sum over K are rounded to, for a wrong variant; None is the right one.

    Returns:
        [..., N] in x's dtype; bfloat16 for float8.
    """
    acc = accumulation_dtype(x.dtype)
    half = x.shape[-1] // 2 if partial_dtype is not None else x.shape[-1]
    with without_autocast(x):
        y = x[..., :half].to(acc) @ weight[:, :half].to(acc).t()
        if partial_dtype is not None:
            rest = x[..., half:].to(acc) @ weight[:, half:].to(acc).t()
            y = y.to(partial_dtype).to(acc) + rest.to(partial_dtype).to(acc)
    if scale_x is not None and scale_w is not None:
        y = y * (scale_x.reshape(()) * scale_w.reshape(()))
    for term in (bias, residual):
        y = y if term is None else y + term.to(acc)
    return y.to(output_dtype(x.dtype))


def bwd(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool]) -> Gradients:
    """Backward.

    Args:
        dy: [..., N].
        x: [..., K].
        weight: [N, K].
        needs: which of (dx, dweight, dbias) to compute.

    Returns:
        (dx, dweight, dbias) in the dtype of x, None where not needed.
    """
    acc = accumulation_dtype(x.dtype)
    rows = dy.reshape(-1, dy.shape[-1]).to(acc)
    with without_autocast(x):
        dx = (dy.to(acc) @ weight.to(acc)).to(x.dtype) if needs[0] else None
        dweight = (rows.t() @ x.reshape(rows.shape[0], x.shape[-1]).to(acc)).to(x.dtype) if needs[1] else None
    return dx, dweight, rows.sum(0).to(x.dtype) if needs[2] else None


def flops(shape: Sequence[int], *, out_features: int, residual: bool = False, backward: bool = False) -> int:
    """Operations for x of ``shape`` [..., K]: a multiplication and an addition per product; backward twice that."""
    return 2 * math.prod(shape) * out_features * (2 if backward else 1)


def bytes(
    shape: Sequence[int], dtype: torch.dtype, *, out_features: int, residual: bool = False, backward: bool = False
) -> int:
    """Least memory traffic: x, weight [and residual] and y; backward dy, x, weight, dx and dweight."""
    rows = math.prod(shape[:-1])
    x, weight, y = rows * shape[-1], shape[-1] * out_features, rows * out_features
    if backward:
        return (2 * (x + weight) + y) * itemsize(dtype)
    return (x + weight) * itemsize(dtype) + y * (1 + residual) * itemsize(output_dtype(dtype))


def _residual_subtracted(
    x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, residual: MaybeTensor, *scales: MaybeTensor
) -> torch.Tensor:
    return fwd(x, weight, bias, None if residual is None else -residual, *scales)


def _bias_twice(
    x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, residual: MaybeTensor, *scales: MaybeTensor
) -> torch.Tensor:
    return fwd(x, weight, None if bias is None else 2 * bias, residual, *scales)


def _half_of_the_rows(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool]) -> Gradients:
    dx, *_ = bwd(dy, x, weight, needs)
    shared = bwd(dy[..., : (dy.shape[-2] + 1) // 2, :], x[..., : (x.shape[-2] + 1) // 2, :], weight, needs)
    return dx, shared[1], shared[2]


WRONG = wrong_variants(
    fwd={
        "partial_sums_in_float16": functools.partial(fwd, partial_dtype=torch.float16),
        "residual_subtracted": _residual_subtracted,
        "bias_twice": _bias_twice,
    },
    bwd={
        "dx_of_the_next_row_of_weights": lambda dy, x, weight, needs: (
            bwd(dy, x, weight.roll(1, 0), needs)[0],
            *bwd(dy, x, weight, needs)[1:],
        ),
        "half_of_the_rows": _half_of_the_rows,
    },
)
