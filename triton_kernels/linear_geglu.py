# SPDX-License-Identifier: Apache-2.0
"""linear_geglu: y = value * GELU(gate) with value and gate the halves of x W^T + bias, in bf16, fp16, fp32 or e4m3.

Formula   v[m, n] = sum over k of x[m, k] W[n, k] + bias[n], g the same with row n + C of W; y = v GELU(g).
          For e4m3 the sums are multiplied by both scales; with scale_y, y is rounded once more, to e4m3.
Grid      (tiles,). A program makes BLOCK_M x BLOCK_N of y from two products with the same rows of x, so that the
          parameter keeps its layout: the gate's rows of W lie C rows below the value's.
Registers two fp32 tiles; the operands stream through shared memory.
Bytes     y once, half of what the projection alone would write; nothing of size 2C exists.
Wrong     where the projection is kept for the backward anyway; on sm_90a, which has the CUDA backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._float8 import reciprocal_of, round_result, written
from ._math import gelu_and_grad
from ._matrix import GROUP, dot, matrix_config, tile_of


@triton.jit
def linear_geglu_kernel(
    x_ptr, w_ptr, bias_ptr, scale_x_ptr, scale_w_ptr, scale_y_ptr, y_ptr, rows, c_in, c_out, w_n, w_k,
    TANH: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(c_out, BLOCK_N), GROUP_M)
    first = i_m.to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < rows - first
    m_n = o_n < c_out
    p_x = x_ptr + first * c_in + o_m[:, None] * c_in + o_k[None, :]
    p_v = w_ptr + o_n.to(tl.int64)[None, :] * w_n + o_k[:, None] * w_k
    p_g = p_v + tl.cast(c_out, tl.int64) * w_n
    b_v = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, c_in, BLOCK_K):
        m_x = m_m[:, None]
        m_w = m_n[None, :]
        if not EVEN_K:
            m_x = m_x & (o_k < c_in - i_k)[None, :]
            m_w = m_w & (o_k < c_in - i_k)[:, None]
        b_x = tl.load(p_x + i_k, mask=m_x, other=0.0)
        b_v = dot(b_x, tl.load(p_v + i_k * w_k, mask=m_w, other=0.0), b_v)
        b_g = dot(b_x, tl.load(p_g + i_k * w_k, mask=m_w, other=0.0), b_g)
    if scale_x_ptr is not None:
        scale = tl.load(scale_x_ptr) * tl.load(scale_w_ptr)
        b_v *= scale
        b_g *= scale
    if bias_ptr is not None:
        b_v += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_g += tl.load(bias_ptr + c_out + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_gelu, _ = gelu_and_grad(b_g, TANH, x_ptr.dtype.element_ty != tl.float32)
    p_y = y_ptr + first * c_out + o_m[:, None] * c_out + o_n[None, :]
    dtype: tl.constexpr = tl.bfloat16 if scale_x_ptr is not None else x_ptr.dtype.element_ty
    b_y = round_result(b_v * b_gelu, reciprocal_of(scale_y_ptr), dtype, y_ptr.dtype.element_ty)
    tl.store(p_y, b_y, mask=m_m[:, None] & m_n[None, :])


def linear_geglu_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    scale_x: torch.Tensor | None = None,
    scale_w: torch.Tensor | None = None,
    scale_y: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., C] from contiguous x [..., K] and weight [2C, K] of any strides, fp32, bf16, fp16, or e4m3 with scales.

    bias [2C] of the result's dtype or None; y is e4m3 with scale_y, bf16 for e4m3, else of x's dtype.
    """
    c_in = weight.shape[1]
    c_out = weight.shape[0] // 2
    rows = x.numel() // c_in if c_in else x.shape[:-1].numel()
    dtype = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    y = x.new_empty((*x.shape[:-1], c_out), dtype=dtype if scale_y is None else torch.float8_e4m3fn)
    if rows == 0:
        return y
    config = matrix_config(rows, c_out, c_in, x.dtype, operands=2)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(c_out, config.block_n),)
    linear_geglu_kernel[grid](
        x, weight, bias, scale_x, scale_w, scale_y, written(y), rows, c_in, c_out, *weight.stride(),
        TANH=approximate == "tanh",
        EVEN_K=c_in % config.block_k == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=GROUP, **config.options(),
    )  # fmt: skip
    return y
