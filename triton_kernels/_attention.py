# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: tiles of tokens, products, one step of a streamed softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import INTERPRETED, round_to

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """b_a @ b_b + b_acc in fp32; fp32 operands as PRECISION says, 16-bit ones exactly.

    The interpreter multiplies bf16 as if the bits were integers, so there every operand becomes fp32, which holds the
    same numbers.
    """
    if INTERPRETED:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def load_rows(ptr, o_r, o_d, stride, rows, cols, MASK_R: tl.constexpr, MASK_D: tl.constexpr):
    """The [rows, channels] tile at ptr; zeros beyond `rows` and `cols`, where MASK_R and MASK_D say there is such."""
    p_x = ptr + o_r[:, None] * stride + o_d[None, :]
    if MASK_R and MASK_D:
        b_x = tl.load(p_x, mask=(o_r < rows)[:, None] & (o_d < cols)[None, :], other=0.0)
    elif MASK_R:
        b_x = tl.load(p_x, mask=(o_r < rows)[:, None], other=0.0)
    elif MASK_D:
        b_x = tl.load(p_x, mask=(o_d < cols)[None, :], other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x


@triton.jit
def blocks_in_loop(rows, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """How many blocks a loop over `rows` takes; TAIL as in AttentionConfig.tail."""
    return rows // BLOCK if TAIL == 2 else (rows + BLOCK - 1) // BLOCK


@triton.jit
def store_rows(ptr, b_x, o_r, o_d, stride, rows, cols):
    """Stores what lies below `rows` and `cols`, rounded to the tensor's dtype."""
    m_rd = (o_r < rows)[:, None] & (o_d < cols)[None, :]
    tl.store(ptr + o_r[:, None] * stride + o_d[None, :], round_to(b_x, ptr.dtype.element_ty), mask=m_rd)


@triton.jit
def softmax_step(b_s, c_max, c_sum, b_acc, scale_log2):
    """Takes one block of scores [M, N] into the running maximum, sum and weighted sum of a softmax in base 2.

    Returns the block's weights and the three, the weighted sum still without the block's own part. The scale is a
    factor of the exponent, one multiply-add with the maximum.
    """
    c_new = tl.maximum(c_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - c_new[:, None])
    c_keep = tl.exp2(c_max - c_new)
    return b_p, c_new, c_sum * c_keep + tl.sum(b_p, 1), b_acc * c_keep[:, None]


def precision_of(dtype: torch.dtype) -> str:
    """How products of fp32 operands are formed: three TF32 products of split operands, to about 2^-21.

    IEEE products have no tensor cores, and as unrolled multiply-adds they spill.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


def scales_of(head_dim: int, scale: float | None) -> tuple[float, float]:
    """The factor of the scores (None is 1/sqrt(head_dim)), and what it is in the exponent of two.

    The latter is never quite zero: keys that do not exist score minus infinity, which times zero would be NaN.
    """
    scale = head_dim**-0.5 if scale is None else scale
    return scale, max(scale * LOG2E.value, 1e-30)
