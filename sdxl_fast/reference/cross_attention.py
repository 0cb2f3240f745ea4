# SPDX-License-Identifier: Apache-2.0
"""Attention of a map's tokens to the prompt's: T keys, 77 in SDXL, all of which take part, padding included.

Formulas and costs in ``_attention.py``.
"""

from sdxl_fast.reference._attention import WRONG, bwd, bytes, flops, fwd

__all__ = ["WRONG", "bwd", "bytes", "flops", "fwd"]
