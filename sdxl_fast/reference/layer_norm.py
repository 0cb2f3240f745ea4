# SPDX-License-Identifier: Apache-2.0
"""LayerNorm(x [+ residual]) over the last dimension, and the sum, in plain PyTorch.

With the statistics over the C elements of each row::

    s = x + residual             (rounded to x's dtype, and normalised as rounded: it is what goes on in the network)
    xhat = (s - mean) * rstd,    rstd = 1 / sqrt(var + eps), var biased
    y = xhat * weight + bias

Backward, with g = dy * weight and the means over a row::

    ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,    dx = dresidual = ds
    dweight = sum over rows of dy * xhat,    dbias = sum over rows of dy

Source: Ba, Kiros & Hinton 2016 (arXiv:1607.06450); a transformer block of SDXL applies it three times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from sdxl_fast.reference._common import accumulation_dtype, itemsize, rounded, wrong_variants

Tensors = tuple[torch.Tensor, ...]


def _normalise(s: torch.Tensor, eps: float, correction: int = 0) -> Tensors:
    """Returns xhat and mean, rstd [...] of s, which is in the dtype to compute in.

    The mean is taken twice: what is left after the first one is small, and so is its error.
    """
    count = s.shape[-1]
    mean = s.sum(-1, keepdim=True) / max(count, 1)
    mean = mean + (s - mean).sum(-1, keepdim=True) / max(count, 1)
    centred = s - mean
    var = (centred * centred).sum(-1, keepdim=True) / max(count - correction, 1)
    rstd = torch.rsqrt(var + eps)
    return centred * rstd, mean[..., 0], rstd[..., 0]


def _over_rows(t: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [C]; a single row is itself (an empty list of dimensions would mean all of them)."""
    return t.unsqueeze(0).flatten(0, -2).sum(0)


def fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    scale_y: torch.Tensor | None = None,
    *,
    correction: int = 0,
    statistics_dtype: torch.dtype | None = None,
) -> Tensors:
    """Differentiable forward.

    Args:
        x: [..., C], any float dtype.
        weight, bias: [C] or both None.
        residual: like x, or None.
        eps: added to the variance.
        scale_y: float32, one element: y is then rounded once more, to float8_e4m3fn after division by it.
        correction: of the variance; 0 is LayerNorm, another one a wrong variant.
        statistics_dtype: to compute the statistics in, for a wrong variant; None is the right one.

    Returns:
        y like x, with a residual the sum like x, and mean, rstd of the rows in float32 (float64 for float64).
    """
    acc = accumulation_dtype(x.dtype)
    s = x if residual is None else (x.to(acc) + residual.to(acc)).to(x.dtype)
    xhat, mean, rstd = (t.to(acc) for t in _normalise(s.to(statistics_dtype or acc), eps, correction))
    y = xhat if weight is None or bias is None else xhat * weight.to(acc) + bias.to(acc)
    y = rounded(y.to(x.dtype), scale_y)
    return (y, mean, rstd) if residual is None else (y, s, mean, rstd)


def bwd(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: Sequence[bool],
    *,
    without: Sequence[str] = (),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Backward.

    Args:
        dy: [..., C].
        dsum: gradient that reaches the sum from elsewhere, or None.
        s: x, or the sum.
        weight: [C] or None.
        mean, rstd: [...], the forward's.
        needs: which of (ds, dweight, dbias) to compute.
        without: terms of ds to leave out, for wrong variants.

    Returns:
        (ds, dweight, dbias), None where not needed or without a weight; ds like s, the others like the weight.
    """
    acc = accumulation_dtype(s.dtype)
    xhat = (s.to(acc) - mean[..., None]) * rstd[..., None]
    dz = dy.to(acc)
    ds = dweight = dbias = None
    if needs[0]:
        g = dz if weight is None else dz * weight.to(acc)
        c1 = 0 if "mean" in without else g.mean(-1, keepdim=True)
        c2 = 0 if "projection" in without else xhat * (g * xhat).mean(-1, keepdim=True)
        ds = rstd[..., None] * (g - c1 - c2)
        if dsum is not None and "sum" not in without:
            ds = ds + dsum.to(acc)
        ds = ds.to(s.dtype)
    if weight is not None:
        dweight = _over_rows(dz * xhat).to(weight.dtype) if needs[1] else None
        dbias = _over_rows(dz).to(weight.dtype) if needs[2] else None
    return ds, dweight, dbias


def flops(shape: Sequence[int], *, backward: bool = False, residual: bool = False) -> int:
    """Operations: a sum, deviations with their squares, scale and bias; backward twice that."""
    return math.prod(shape) * ((16 if backward else 8) + residual)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False, residual: bool = False) -> int:
    """Least memory traffic: a read and a write, two and two with a residual; backward two reads (three) and a write.

    The parameters and the statistics of the rows are left out.
    """
    return math.prod(shape) * itemsize(dtype) * (3 + residual if backward else 2 + 2 * residual)


def _normalises_x(x: torch.Tensor, weight: Any, bias: Any, residual: Any, eps: float, scale_y: None) -> Tensors:
    """Returns the sum but normalises x alone."""
    found = fwd(x, weight, bias, residual, eps)
    return found if residual is None else (fwd(x, weight, bias, None, eps)[0], *found[1:])


def _eps_outside(x: torch.Tensor, weight: Any, bias: Any, residual: Any, eps: float, scale_y: None) -> Tensors:
    """Adds eps to the standard deviation."""
    acc = accumulation_dtype(x.dtype)
    found = fwd(x, None, None, residual, 0.0)
    source = x if residual is None else found[1]
    mean, rstd = found[-2:]
    xhat = (source.to(acc) - mean[..., None]) / (1 / rstd[..., None] + eps)
    y = xhat if weight is None else xhat * weight.to(acc) + bias.to(acc)
    return (y.to(x.dtype), *fwd(x, weight, bias, residual, eps)[1:])


WRONG = wrong_variants(
    fwd={
        "unbiased_variance": functools.partial(fwd, correction=1),
        "eps_outside_the_root": _eps_outside,
        "statistics_in_bfloat16": functools.partial(fwd, statistics_dtype=torch.bfloat16),
        "normalises_x_without_residual": _normalises_x,
    },
    bwd={
        "mean_term_missing": functools.partial(bwd, without=("mean",)),
        "projection_term_missing": functools.partial(bwd, without=("projection",)),
        "dsum_dropped": functools.partial(bwd, without=("sum",)),
        "dweight_from_s": lambda dy, dsum, s, weight, mean, rstd, needs: (
            *bwd(dy, dsum, s, weight, mean, rstd, needs)[:1],
            *bwd(dy, dsum, s, weight, 0 * mean, rstd, needs)[1:],
        ),
    },
)
