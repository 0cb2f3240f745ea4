# SPDX-License-Identifier: Apache-2.0
"""``vae_attention``: softmax(scale q k^T) v with one wide head, as in the middle of a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import ClassVar

import torch

from sdxl_fast.constraints import LastAtMost, LastMultiple
from sdxl_fast.dispatch import Backend
from sdxl_fast.ops import _attention, _attention_cpu, _backends, _sdpa
from sdxl_fast.reference import vae_attention as reference
from sdxl_fast.reference._attention import Gradients, Pair


def vae_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Returns ``softmax(scale * q @ k.T) @ v`` per sample, differentiable twice.

    One head of 512 channels over the 16,384 tokens of a 1024 px image is what SDXL's VAE has, and what most fused
    kernels refuse. The backward is PyTorch's, from the same log-sum-exp.

    Args:
        q: [N,S,D], float32, bfloat16, float16 or float64, of any strides with the D channels side by side: the output
            of a projection, or a slice of a packed one. Anything else is copied.
        k, v: [N,T,D] in q's dtype, of such strides; T >= 1, and usually S.
        scale: factor of the scores, >= 0; None is 1/sqrt(D).

    Returns:
        [N,S,D] in q's dtype, contiguous. Scores, softmax and sums are float32 (float64 for float64). Autocast does not
        change the dtype.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); in the VAE, Rombach et al. 2022 (arXiv:2112.10752).
    """
    out: torch.Tensor = _OP(q, k, v, scale)[0]
    return out


def _library_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Pair:
    out, lse = _sdpa.fwd(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), scale)
    return out.squeeze(2), lse.squeeze(1)


def _library_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    needs: Sequence[bool],
) -> Gradients:
    dout, q, k, v, out = (t.unsqueeze(2) for t in (dout, q, k, v, out))
    found = _sdpa.bwd(dout, q, k, v, out, lse.unsqueeze(1), scale, needs)
    dq, dk, dv = (None if t is None else t.squeeze(2) for t in found)
    return dq, dk, dv


def _triton() -> Backend:
    """The Triton forward with the library's backward."""
    found = _backends.triton("vae_attention", "q", LastMultiple("q", 8), LastAtMost("q", 512))
    return Backend("triton", lambda: (found.load()[0], _library_bwd), found.rules)


class _VaeAttention(_attention.Attention):
    name = "vae_attention"
    reference: ClassVar[ModuleType] = reference
    rules = _attention.rules("[N,S,D]")
    backends = (
        _triton(),
        _attention_cpu.backend(_library_bwd),
        _sdpa.backend((_library_fwd, _library_bwd)),
        _backends.eager(reference),
    )


_OP = _VaeAttention(vae_attention)
