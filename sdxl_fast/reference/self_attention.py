# SPDX-License-Identifier: Apache-2.0
"""Attention of a map's tokens to themselves: [N,S,H,D] each; formulas and costs in ``_attention.py``."""

from sdxl_fast.reference._attention import WRONG, bwd, bytes, flops, fwd

__all__ = ["WRONG", "bwd", "bytes", "flops", "fwd"]
