# SPDX-License-Identifier: Apache-2.0
"""``cross_attention``: softmax(scale q k^T) v of a map's tokens over a prompt's."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import torch

from sdxl_fast.constraints import DimBetween, LastAtMost, LastMultiple
from sdxl_fast.ops import _attention, _attention_cpu, _backends, _sdpa
from sdxl_fast.reference import cross_attention as reference


def cross_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Returns ``softmax(scale * q @ k.T) @ v`` per sample and head, differentiable twice; made for few keys.

    There is no mask: SDXL's maps attend to all 77 tokens, padding included.

    Args:
        q: [N,S,H,D], float32, bfloat16, float16 or float64, of any strides with the D channels side by side, as a view
            of a projection has them. Anything else is copied.
        k, v: [N,T,H,D] in q's dtype, of such strides; T >= 1. The Triton kernel takes up to 256.
        scale: factor of the scores, >= 0; None is 1/sqrt(D).

    Returns:
        [N,S,H,D] in q's dtype, contiguous: ``.flatten(2)`` is the [N,S,H*D] that the output projection reads. Scores,
        softmax and sums are float32 (float64 for float64). Autocast does not change the dtype.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Vaswani et al. 2017 (arXiv:1706.03762).
    """
    out: torch.Tensor = _OP(q, k, v, scale)[0]
    return out


class _CrossAttention(_attention.Attention):
    name = "cross_attention"
    reference: ClassVar[ModuleType] = reference
    rules = _attention.rules("[N,S,H,D]")
    backends = (
        _backends.triton(
            "cross_attention", "q", LastMultiple("q", 8), LastAtMost("q", 128), DimBetween("k", 1, "keys", most=256)
        ),
        _attention_cpu.backend(),
        _sdpa.backend(),
        _backends.eager(reference),
    )


_OP = _CrossAttention(cross_attention)
