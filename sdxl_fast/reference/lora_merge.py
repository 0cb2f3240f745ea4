# SPDX-License-Identifier: Apache-2.0
"""Merging LoRAs into weights in place, in plain PyTorch: ``weight = base + scale up down`` for each module.

The base is the weight itself unless another is given. Factors count as matrices, up [out, rank] and down [rank, in
times the kernel]. Products and sums are float32 (float64 for float64), whatever the dtypes and whether autocast is on,
and rounded once to the weight's dtype. Source: Hu et al. 2021, section 4.1 (arXiv:2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sdxl_fast.reference._common import accumulation_dtype, itemsize, without_autocast, wrong_variants

Tensors = Sequence[torch.Tensor]


def _delta(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """up down in the accumulation dtype, shaped like the weight."""
    acc = accumulation_dtype(weight.dtype)
    with without_autocast(weight):
        # Rows and ranks are named, since reshaping cannot guess them of a tensor without elements.
        rows, rank = up.shape[0], down.shape[0]
        columns = math.prod(down.shape[1:])
        return (up.to(acc).reshape(rows, rank) @ down.to(acc).reshape(rank, columns)).reshape(weight.shape)


def fwd(weights: Tensors, bases: Tensors, downs: Tensors, ups: Tensors, scales: Sequence[float]) -> None:
    """Writes to every weight.

    Args:
        weights: [out, in] or [out, in, ...], any float dtype and strides.
        bases: like the weights, or the weights themselves.
        downs: [rank, ...] with as many elements in a row as a weight's.
        ups: [out, rank], or with further dimensions of one.
        scales: a number each.
    """
    with torch.no_grad():
        for weight, base, down, up, scale in zip(weights, bases, downs, ups, scales, strict=True):
            delta = _delta(weight, down, up)
            weight.copy_(base.to(delta.dtype) + scale * delta)


def flops(shape: Sequence[int], *, backward: bool = False) -> int:
    """Operations for ``shape`` = (modules, out, in, rank): the product, the scaling and the sum. No backward."""
    modules, rows, cols, rank = shape
    return 0 if backward else modules * rows * cols * (2 * rank + 2)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False) -> int:
    """Least memory traffic, the factors in the weight's dtype: base and factors read, weight written. No backward."""
    modules, rows, cols, rank = shape
    return 0 if backward else modules * itemsize(dtype) * (2 * rows * cols + rank * (rows + cols))


def _rounded_sums(weights: Tensors, bases: Tensors, downs: Tensors, ups: Tensors, scales: Sequence[float]) -> None:
    """Sums over the rank in bfloat16."""
    for weight, base, down, up, scale in zip(weights, bases, downs, ups, scales, strict=True):
        delta = torch.zeros_like(weight, dtype=torch.bfloat16)
        for k in range(down.shape[0]):
            delta += _delta(weight, down[k : k + 1], up[:, k : k + 1]).bfloat16()
        weight.copy_(base + scale * delta.to(base.dtype))


def _swapped_kernel(weights: Tensors, bases: Tensors, downs: Tensors, ups: Tensors, scales: Sequence[float]) -> None:
    """Takes a convolution's columns in another order: kernel before channels."""
    turned = [d.flatten(2).transpose(1, 2).reshape(d.shape) if d.ndim == 4 else d.flip(1) for d in downs]
    fwd(weights, bases, turned, ups, scales)


WRONG = wrong_variants(
    fwd={
        "scale_ignored": lambda w, b, down, up, s: fwd(w, b, down, up, [1.0] * len(s)),
        "scale_squared": lambda w, b, down, up, s: fwd(w, b, down, up, [x * x for x in s]),
        "base_ignored": lambda w, b, down, up, s: fwd(w, w, down, up, s),
        "first_scale_for_all": lambda w, b, down, up, s: fwd(w, b, down, up, [s[0]] * len(s)),
        "last_module_left_out": lambda w, b, down, up, s: fwd(w[:-1], b[:-1], down[:-1], up[:-1], s[:-1]),
        "rank_cut": lambda w, b, down, up, s: fwd(w, b, [d[:-1] for d in down], [u[:, :-1] for u in up], s),
        "sums_in_16_bits": _rounded_sums,
        "columns_in_another_order": _swapped_kernel,
    },
)
