# SPDX-License-Identifier: Apache-2.0
"""conv2d: a convolution with bias and residual as an implicit matrix product, also of e4m3 with a scale each.

Formula   y[n,p,q,o] = bias[o] + residual[n,p,q,o] + sum over r, s, c of x[n, p S + r - P, q S + s - P, c] w[o,c,r,s].
          For e4m3 the sum is multiplied by scale_x scale_w.
Grid      (tiles,). A program makes BLOCK_M positions (n, p, q) by BLOCK_N channels, K = taps times C_in, tap by tap.
Registers the fp32 tile, and of each row its place in the map.
Bytes     y once; x up to KERNEL^2 times a column block, which L1 and L2 serve but once.
Wrong     for a C_in or C_out of a few channels, where most of a tile is empty; on sm_90a, which has the CUDA backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import round_to
from ._matrix import GROUP, dot, matrix_config, tile_of, wide


@triton.jit
def conv2d_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, scale_x_ptr, scale_w_ptr, y_ptr, n, c_in, h, w, c_out, p, q,
    x_n, x_c, x_h, x_w, w_o, w_c, w_r, w_s, y_n, y_c, y_h, y_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    rows = n * p * q
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(c_out, BLOCK_N), GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < rows
    m_n = o_n < c_out
    i_q = o_m % q
    i_p = o_m // q % p
    sample = (o_m // (q * p)).to(tl.int64)
    if WIDE:  # 64-bit offsets, which take registers
        i_p, i_q = i_p.to(tl.int64), i_q.to(tl.int64)
        o_k, o_n = o_k.to(tl.int64), o_n.to(tl.int64)
    p_x = x_ptr + sample * x_n
    p_w = w_ptr + o_n.to(tl.int64) * w_o
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slices = tl.cdiv(c_in, BLOCK_K)
    for step in range(0, KERNEL * KERNEL * slices):
        tap = step // slices
        o_c = (step - tap * slices) * BLOCK_K + o_k
        r = tap // KERNEL
        s = tap % KERNEL
        i_h = i_p * STRIDE + (r - PADDING)
        i_w = i_q * STRIDE + (s - PADDING)
        m_x = (m_m & (i_h >= 0) & (i_h < h) & (i_w >= 0) & (i_w < w))[:, None]
        m_w = m_n[None, :]
        if not EVEN_K:
            m_x = m_x & (o_c < c_in)[None, :]
            m_w = m_w & (o_c < c_in)[:, None]
        b_x = tl.load(p_x[:, None] + (i_h * x_h + i_w * x_w)[:, None] + (o_c * x_c)[None, :], mask=m_x, other=0.0)
        b_w = tl.load(p_w[None, :] + (r * w_r + s * w_s) + (o_c * w_c)[:, None], mask=m_w, other=0.0)
        b_acc = dot(b_x, b_w, b_acc)
    if scale_x_ptr is not None:
        b_acc *= tl.load(scale_x_ptr) * tl.load(scale_w_ptr)
    if bias_ptr is not None:
        b_acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    base = (sample * y_n)[:, None]
    o_y = (i_p * y_h + i_q * y_w)[:, None] + (o_n * y_c)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if residual_ptr is not None:
        b_acc += tl.load(residual_ptr + base + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y_ptr + base + o_y, round_to(b_acc, y_ptr.dtype.element_ty), mask=m_y)


def conv2d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    scale_x: torch.Tensor | None = None,
    scale_w: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [N, C_out, P, Q] from x [N, C_in, H, W] and weight [C_out, C_in, k, k] of any strides.

    fp32, bf16, fp16, or e4m3 with scales.

    Fastest with channels_last maps and weights. bias [C_out]; residual like y and of the memory format of x; or None.
    y is bf16 for e4m3, else of x's dtype.
    """
    n, c_in, h, w = x.shape
    c_out, _, size, _ = weight.shape
    p, q = ((extent + 2 * padding - size) // stride + 1 for extent in (h, w))
    last = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    dtype = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    y = torch.empty((n, c_out, p, q), dtype=dtype, device=x.device, memory_format=last)
    rows = n * p * q
    if rows == 0:
        return y
    config = matrix_config(rows, c_out, size * size * c_in, x.dtype)
    # The tensor cores take 32 bytes of K at once.
    block_k = min(config.block_k, max(16, 32 // x.dtype.itemsize, triton.next_power_of_2(c_in)))
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(c_out, config.block_n),)
    conv2d_kernel[grid](
        x, weight, bias, residual, scale_x, scale_w, y, n, c_in, h, w, c_out, p, q,
        *x.stride(), *weight.stride(), *y.stride(),
        KERNEL=size, STRIDE=stride, PADDING=padding, WIDE=wide(x, y), EVEN_K=c_in % block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, GROUP_M=GROUP, **config.options(),
    )  # fmt: skip
    return y
