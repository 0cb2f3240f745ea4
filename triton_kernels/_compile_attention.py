# SPDX-License-Identifier: Apache-2.0
"""The attention kernels' cases for `_compile`: SDXL's shapes, ragged ones, and every width of head.

They take seconds each to compile, so float16, of which the same code is made as of bfloat16, has one shape.
"""

from __future__ import annotations

import torch

from ._attention_config import H100, Target

# The GPU that an architecture is compiled for: A100, L40S, H100, B200, RTX PRO 6000.
TARGETS = {80: Target(80, 108), 89: Target(89, 142), 90: H100, 100: Target(100, 148), 120: Target(120, 188)}


def _packed(n: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k and v as views of one projection."""
    return torch.empty((n, tokens, 3, heads, head_dim), dtype=dtype, device="meta").unbind(2)


def self_attention_cases(dtype: torch.dtype) -> None:
    """Forward and backward: 1024 px, 832 by 1216, heads narrower and wider than 64."""
    from .self_attention import self_attention_bwd, self_attention_fwd

    square, portrait = (1, 1024, 20, 64), (1, 3952, 10, 64)
    widths = ((2, 100, 4, 24), (2, 1000, 8, 128))
    shapes = {torch.float32: ((1, 988, 20, 64), *widths), torch.bfloat16: (square, portrait, *widths)}
    for n, tokens, heads, head_dim in shapes.get(dtype, (square,)):
        q, k, v = _packed(n, tokens, heads, head_dim, dtype)
        out, lse = self_attention_fwd(q, k, v, None)
        self_attention_bwd(out, q, k, v, out, lse, None, (True, True, True))
    self_attention_bwd(out, q, k, v, out, lse, None, (False, True, False))
