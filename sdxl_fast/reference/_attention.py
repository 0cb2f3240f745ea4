# SPDX-License-Identifier: Apache-2.0
"""Softmax attention in plain PyTorch, as the three attention ops share it; q [N,S,H,D], k and v [N,T,H,D].

For every sample n and head h, with the scores of query i over the T keys j::

    s_ij = scale * <q_i, k_j>,    lse_i = log sum_j exp(s_ij),    p_ij = exp(s_ij - lse_i)
    out_i = sum_j p_ij v_j

Backward, given dout::

    dp_ij = <dout_i, v_j>,    delta_i = sum_j p_ij dp_ij,    ds_ij = scale * p_ij (dp_ij - delta_i)
    dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i,   dv_j = sum_i p_ij dout_i

delta_i is <dout_i, out_i> too, which kernels that never hold a whole row of p use; the sum is free of out's rounding.
The queries are taken in blocks, so that the scores of a 1024 px VAE (268 M of them) never lie in memory at once.
Sources: Vaswani et al. 2017 (arXiv:1706.03762); the backward from lse alone: Dao et al. 2022 (arXiv:2205.14135).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from sdxl_fast.reference._common import Wrong, accumulation_dtype, itemsize, wrong_variants

# Scores computed at a time: 256 MB in float32.
BLOCK_SCORES = 1 << 26

Pair = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def scale_of(q: torch.Tensor, scale: float | None) -> float:
    """Returns the factor of the scores, 1/sqrt(D) when none is given."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def _heads_first(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N,S,H,D] -> [N,H,S,D] in the dtype to compute in."""
    return t.transpose(1, 2).to(dtype)


def _blocks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    """Yields the queries in blocks; q and k are [N,H,S,D]."""
    count, scores_per_query = q.shape[2], q.shape[0] * q.shape[1] * k.shape[2]
    step = max(1, BLOCK_SCORES // max(1, scores_per_query))
    if count <= step:  # also where sizes are symbols
        yield slice(None)
        return
    for start in range(0, count, step):
        yield slice(start, start + step)


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    *,
    softmax_dim: int = -1,
    scores_dtype: torch.dtype | None = None,
) -> Pair:
    """Differentiable forward.

    Args:
        q: [N,S,H,D], any float dtype.
        k, v: [N,T,H,D], T >= 1.
        scale: factor of the scores, None for 1/sqrt(D).
        softmax_dim: of the scores [N,H,S,T]; any but the last makes a wrong variant.
        scores_dtype: to round the scores to, for a wrong variant.

    Returns:
        out [N,S,H,D] contiguous in q's dtype, and lse [N,H,S] in float32 (float64 for float64), without gradient.
    """
    acc = accumulation_dtype(q.dtype)
    scale = scale_of(q, scale)
    q_NHSD, k_NHTD, v_NHTD = (_heads_first(t, acc) for t in (q, k, v))
    outs, sums = [], []
    for block in _blocks(q_NHSD, k_NHTD):
        scores = (q_NHSD[:, :, block] * scale) @ k_NHTD.transpose(-1, -2)
        if scores_dtype is not None:
            scores = scores.to(scores_dtype).to(acc)
        outs.append(torch.softmax(scores, softmax_dim) @ v_NHTD)
        sums.append(torch.logsumexp(scores.detach(), -1))
    out, lse = (t[0] if len(t) == 1 else torch.cat(t, 2) for t in (outs, sums))
    return out.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format).contiguous(), lse


def bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    needs: Sequence[bool],
    *,
    without: Sequence[str] = (),
) -> Gradients:
    """Closed-form gradient of :func:`fwd`.

    Args:
        dout: [N,S,H,D].
        q, k, v: as given to :func:`fwd`.
        out, lse: what it returned; out is for kernels that need it.
        scale: as given to it.
        needs: which of (dq, dk, dv) to compute.
        without: terms to leave out, for wrong variants.

    Returns:
        (dq, dk, dv) in the dtype of q, contiguous, None where not needed.
    """
    acc = accumulation_dtype(q.dtype)
    scale = scale_of(q, scale)
    q_NHSD, k_NHTD, v_NHTD, do_NHSD = (_heads_first(t, acc) for t in (q, k, v, dout))
    dqs: list[torch.Tensor] = []
    dk = torch.zeros_like(k_NHTD) if needs[1] else None
    dv = torch.zeros_like(v_NHTD) if needs[2] else None
    for block in _blocks(q_NHSD, k_NHTD):
        scaled, do = q_NHSD[:, :, block] * scale, do_NHSD[:, :, block]
        p = torch.exp(scaled @ k_NHTD.transpose(-1, -2) - lse[:, :, block, None].to(acc))
        if dv is not None:
            dv = dv + p.transpose(-1, -2) @ do
        if needs[0] or needs[1]:
            dp = do @ v_NHTD.transpose(-1, -2)
            ds = p * (dp if "delta" in without else dp - (p * dp).sum(-1, keepdim=True))
            if needs[0]:
                dqs.append(ds @ k_NHTD * (1.0 if "scale of dq" in without else scale))
            if dk is not None:
                dk = dk + ds.transpose(-1, -2) @ (q_NHSD[:, :, block] if "scale of dk" in without else scaled)
    dq = None if not dqs else dqs[0] if len(dqs) == 1 else torch.cat(dqs, 2)
    dq, dk, dv = (None if t is None else t.transpose(1, 2).to(q.dtype).contiguous() for t in (dq, dk, dv))
    return dq, dk, dv


def flops(shape: Sequence[int], *, keys: int | None = None, backward: bool = False) -> int:
    """Operations of the matrix products: two, and five in the backward; the softmax is left out, as is customary."""
    n, s, h, d = shape
    return (10 if backward else 4) * n * h * s * (s if keys is None else keys) * d


def bytes(shape: Sequence[int], dtype: torch.dtype, *, keys: int | None = None, backward: bool = False) -> int:
    """Least memory traffic: q, k, v read and out written; backward q, k, v, out, dout read and dq, dk, dv written."""
    n, s, h, d = shape
    of_queries, of_keys = n * s * h * d, n * (s if keys is None else keys) * h * d
    tensors = 4 * of_queries + 4 * of_keys if backward else 2 * of_queries + 2 * of_keys
    return tensors * itemsize(dtype) + 4 * n * h * s


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> Pair:
    """Lets one key of zeros, as a tile padded beyond the last key holds, take part."""
    k, v = (torch.cat((t, torch.zeros_like(t[:, :1])), 1) for t in (k, v))
    return fwd(q, k, v, scale)


def _unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> Pair:
    return fwd(q, k, v, 1.0 if scale is None else None)


def _unnormalised(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    needs: Sequence[bool],
) -> Gradients:
    """Takes the maximum for the log-sum-exp."""
    scores = _heads_first(q, lse.dtype) @ _heads_first(k, lse.dtype).transpose(-1, -2) * scale_of(q, scale)
    return bwd(dout, q, k, v, out, scores.amax(-1), scale, needs)


WRONG: dict[str, Wrong] = wrong_variants(
    fwd={
        "other_scale": _unscaled,
        "softmax_over_queries": functools.partial(fwd, softmax_dim=-2),
        "scores_in_bfloat16": functools.partial(fwd, scores_dtype=torch.bfloat16),
        "padding_takes_part": _padded,
    },
    bwd={
        "delta_missing": functools.partial(bwd, without=("delta",)),
        "dq_without_scale": functools.partial(bwd, without=("scale of dq",)),
        "dk_without_scale": functools.partial(bwd, without=("scale of dk",)),
        "maximum_for_lse": _unnormalised,
    },
)
