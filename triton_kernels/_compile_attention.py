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


def cross_attention_cases(dtype: torch.dtype) -> None:
    """A prompt of 77 tokens, and the longest; all gradients and each alone."""
    from .cross_attention import cross_attention_bwd, cross_attention_fwd

    shapes = ((1, 1024, 20, 64, 77), (1, 4096, 10, 64, 77), (2, 100, 4, 24, 256), (2, 1000, 8, 128, 100))
    for n, tokens, heads, head_dim, keys in shapes[:1] if dtype == torch.float16 else shapes:
        q = torch.empty((n, tokens, heads, head_dim), dtype=dtype, device="meta")
        k, v, _ = _packed(n, keys, heads, head_dim, dtype)
        cross_attention_fwd(q, k, v, None)
    q = torch.empty((1, 1024, 20, 64), dtype=dtype, device="meta")
    k, v, _ = _packed(1, 77, 20, 64, dtype)
    out, lse = cross_attention_fwd(q, k, v, None)
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        cross_attention_bwd(out, q, k, v, out, lse, None, needs)


def vae_attention_cases(dtype: torch.dtype) -> None:
    """1024 px, 832 by 1216, and narrower heads."""
    from .vae_attention import vae_attention_fwd

    shapes = ((1, 16384, 512), (1, 15808, 512), (1, 4100, 512), (1, 4100, 256), (2, 100, 384))
    for n, tokens, head_dim in shapes[:1] if dtype == torch.float16 else shapes:
        x = torch.empty((n, tokens, head_dim), dtype=dtype, device="meta")
        vae_attention_fwd(x, x, x, None)
