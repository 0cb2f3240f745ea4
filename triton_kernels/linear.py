# SPDX-License-Identifier: Apache-2.0
"""linear: y = x W^T [+ bias] [+ residual], and the same of float8_e4m3 with a scale each.

Formula   y[m, n] = scale_x scale_w sum over k of x[m, k] W[n, k] + bias[n] + residual[m, n].
Grid      (tiles,). A program makes BLOCK_M x BLOCK_N of y; GROUP_M row blocks are walked through together, so that
          programs that run at the same time share their operands in L2.
Registers the fp32 tile; the operands stream through shared memory.
Bytes     y once; x once a column block and W once a row block, most of it from L2.
Wrong     on sm_90a, whose wgmma tiles of 128 x 160 fit SDXL's widths: the CUDA backend; for a handful of rows, where
          reading W is all the work and the programs are too few to do it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import round_to
from ._matrix import GROUP, dot, matrix_config, tile_of


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, scale_x_ptr, scale_w_ptr, y_ptr, rows, c_in, c_out, w_n, w_k,
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
    p_w = w_ptr + o_n.to(tl.int64)[None, :] * w_n + o_k[:, None] * w_k
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, c_in, BLOCK_K):
        m_x = m_m[:, None]
        m_w = m_n[None, :]
        if not EVEN_K:
            m_x = m_x & (o_k < c_in - i_k)[None, :]
            m_w = m_w & (o_k < c_in - i_k)[:, None]
        b_x = tl.load(p_x + i_k, mask=m_x, other=0.0)
        b_w = tl.load(p_w + i_k * w_k, mask=m_w, other=0.0)
        b_acc = dot(b_x, b_w, b_acc)
    if scale_x_ptr is not None:
        b_acc *= tl.load(scale_x_ptr) * tl.load(scale_w_ptr)
    if bias_ptr is not None:
        b_acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    base = first * c_out
    o_mn = o_m[:, None] * c_out + o_n[None, :]
    m_mn = m_m[:, None] & m_n[None, :]
    if residual_ptr is not None:
        b_acc += tl.load(residual_ptr + base + o_mn, mask=m_mn, other=0.0).to(tl.float32)
    tl.store(y_ptr + base + o_mn, round_to(b_acc, y_ptr.dtype.element_ty), mask=m_mn)


def linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale_x: torch.Tensor | None,
    scale_w: torch.Tensor | None,
) -> torch.Tensor:
    """y [..., N] from contiguous x [..., K] and weight [N, K] of any strides, fp32, bf16, fp16, or e4m3 with scales.

    bias [N] and residual [..., N] of y's dtype, contiguous, or None; y is bf16 for e4m3, else of x's dtype.
    """
    c_out, c_in = weight.shape
    rows = x.numel() // c_in if c_in else x.shape[:-1].numel()
    dtype = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    y = torch.empty((*x.shape[:-1], c_out), dtype=dtype, device=x.device)
    if rows == 0:
        return y
    config = matrix_config(rows, c_out, c_in, x.dtype)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(c_out, config.block_n),)
    linear_kernel[grid](
        x, weight, bias, residual, scale_x, scale_w, y, rows, c_in, c_out, *weight.stride(),
        EVEN_K=c_in % config.block_k == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=GROUP, **config.options(),
    )  # fmt: skip
    return y
