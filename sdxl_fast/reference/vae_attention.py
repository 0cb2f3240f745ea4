# SPDX-License-Identifier: Apache-2.0
"""Attention with one wide head: q [N,S,D], k and v [N,T,D]; formulas and costs in ``_attention.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sdxl_fast.reference import _attention
from sdxl_fast.reference._common import Wrong


def _with_head(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """[N,S,D] -> [N,S,1,D]."""
    return (t.unsqueeze(2) for t in tensors)


def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> _attention.Pair:
    """Differentiable forward.

    Args:
        q: [N,S,D], any float dtype.
        k, v: [N,T,D], T >= 1.
        scale: factor of the scores, None for 1/sqrt(D).

    Returns:
        out [N,S,D] contiguous in q's dtype, and lse [N,S] in float32 (float64 for float64), without gradient.
    """
    q, k, v = _with_head(q, k, v)
    out, lse = _attention.fwd(q, k, v, scale)
    return out.squeeze(2), lse.squeeze(1)


def bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    needs: Sequence[bool],
) -> _attention.Gradients:
    """Closed-form gradient of :func:`fwd`: (dq, dk, dv) like q, k, v, None where ``needs`` is False."""
    dout, q, k, v, out = _with_head(dout, q, k, v, out)
    found = _attention.bwd(dout, q, k, v, out, lse.unsqueeze(1), scale, needs)
    dq, dk, dv = (None if t is None else t.squeeze(2) for t in found)
    return dq, dk, dv


def flops(shape: Sequence[int], *, keys: int | None = None, backward: bool = False) -> int:
    """Operations of the matrix products for q of ``shape`` [N,S,D]: two, and five in the backward."""
    n, s, d = shape
    return _attention.flops((n, s, 1, d), keys=keys, backward=backward)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, keys: int | None = None, backward: bool = False) -> int:
    """Least memory traffic: q, k, v read and out written; backward q, k, v, out, dout read and dq, dk, dv written."""
    n, s, d = shape
    return _attention.bytes((n, s, 1, d), dtype, keys=keys, backward=backward)


def _one_head(wrong: Wrong) -> Wrong:
    """Returns a wrong variant of the shared functions for tensors without the dimension of heads."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> _attention.Pair:
        out, lse = wrong.function(*_with_head(q, k, v), scale)
        return out.squeeze(2), lse.squeeze(1)

    def backward(*args: torch.Tensor) -> _attention.Gradients:
        *tensors, lse, scale, needs = args
        dq, dk, dv = wrong.function(*_with_head(*tensors), lse.unsqueeze(1), scale, needs)
        return dq.squeeze(2), dk.squeeze(2), dv.squeeze(2)

    return Wrong(wrong.of, forward if wrong.of == "fwd" else backward)


WRONG = {name: _one_head(wrong) for name, wrong in _attention.WRONG.items()}
