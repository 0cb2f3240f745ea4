# SPDX-License-Identifier: Apache-2.0
"""``self_attention``: softmax(scale q k^T) v over the tokens of a map, many heads."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import torch

from sdxl_fast.constraints import LastAtMost, LastMultiple
from sdxl_fast.ops import _attention, _attention_cpu, _backends, _sdpa
from sdxl_fast.reference import self_attention as reference


def self_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Returns ``softmax(scale * q @ k.T) @ v`` per sample and head, differentiable twice.

    Args:
        q: [N,S,H,D], float32, bfloat16, float16 or float64, of any strides with the D channels side by side: a packed
            projection [N,S,3*H*D] is three views, ``qkv.view(N, S, 3, H, D).unbind(2)``. Anything else is copied.
        k, v: [N,T,H,D] in q's dtype, of such strides; T >= 1, and usually S.
        scale: factor of the scores, >= 0; None is 1/sqrt(D).

    Returns:
        [N,S,H,D] in q's dtype, contiguous: ``.flatten(2)`` is the [N,S,H*D] that the output projection reads, and
        copies nothing. Scores, softmax and sums are float32 (float64 for float64). Autocast does not change the dtype.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); tiled as in Dao et al. 2022 (arXiv:2205.14135).
    """
    out: torch.Tensor = _OP(q, k, v, scale)[0]
    return out


class _SelfAttention(_attention.Attention):
    name = "self_attention"
    reference: ClassVar[ModuleType] = reference
    rules = _attention.rules("[N,S,H,D]")
    backends = (
        _backends.triton("self_attention", "q", LastMultiple("q", 8), LastAtMost("q", 128)),
        _attention_cpu.backend(),
        _sdpa.backend(),
        _backends.eager(reference),
    )


_OP = _SelfAttention(self_attention)
