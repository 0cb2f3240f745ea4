# SPDX-License-Identifier: Apache-2.0
"""upsample_conv2d: nearest-neighbour upsampling by two and a 3x3 convolution, as four 2x2 convolutions of x.

Formula   y[n, 2u+i, 2v+j, o] = bias[o] + sum over a, b, c of x[n, u+i-1+a, v+j-1+b, c] k[c, o, 3-i-2a, 3-j-2b].
Grid      (tiles, 4 phases). A program owns BLOCK_M input positions (n, u, v) and BLOCK_N output channels of the phase
          (i, j) = (phase / 2, phase % 2): an implicit matrix product, M = N H W, K = 4 C_in.
Registers the fp32 tile, and of each row its place in the map.
Bytes     x four times, once a phase, of which L2 serves three; y written once, in rows of C_out.
Wrong     for a C_out of a few channels, where most of a tile is empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import round_to
from ._matrix import GROUP, dot, matrix_config, tile_of


@triton.jit
def upsample_conv2d_kernel(
    x_ptr, k_ptr, bias_ptr, y_ptr, n, c_in, h, w, c_out,
    x_n, x_c, x_h, x_w, k_c, k_o, k_h, k_w, y_n, y_c, y_h, y_w,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    i_phase = tl.program_id(1) // 2
    j_phase = tl.program_id(1) % 2
    rows = n * h * w
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(c_out, BLOCK_N), GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < rows
    m_n = o_n < c_out
    v = o_m % w
    u = o_m // w % h
    sample = (o_m // (w * h)).to(tl.int64)
    # What a tap adds to a position fits in 32 bits where the position itself does not.
    p_x = x_ptr + sample * x_n + u.to(tl.int64) * x_h + v.to(tl.int64) * x_w
    p_k = k_ptr + o_n * k_o
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slices = tl.cdiv(c_in, BLOCK_K)
    for step in range(0, 4 * slices):
        tap = step // slices
        o_c = (step - tap * slices) * BLOCK_K + o_k
        a = tap // 2
        b = tap % 2
        i_h = u + (i_phase - 1 + a)
        i_w = v + (j_phase - 1 + b)
        m_x = (m_m & (i_h >= 0) & (i_h < h) & (i_w >= 0) & (i_w < w))[:, None]
        m_k = m_n[None, :]
        if not EVEN_K:
            m_x = m_x & (o_c < c_in)[None, :]
            m_k = m_k & (o_c < c_in)[:, None]
        x_at = (i_phase - 1 + a) * x_h + (j_phase - 1 + b) * x_w
        b_x = tl.load(p_x[:, None] + x_at + (o_c.to(tl.int64) * x_c)[None, :], mask=m_x, other=0.0)
        tap_at = (3 - i_phase - 2 * a) * k_h + (3 - j_phase - 2 * b) * k_w
        b_k = tl.load(p_k[None, :] + tap_at + (o_c * k_c)[:, None], mask=m_k, other=0.0)
        b_acc = dot(b_x, b_k, b_acc)
    if bias_ptr is not None:
        b_acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y_ptr + sample * y_n + (2 * u + i_phase).to(tl.int64) * y_h + (2 * v + j_phase).to(tl.int64) * y_w
    o_y = (o_n.to(tl.int64) * y_c)[None, :]
    tl.store(p_y[:, None] + o_y, round_to(b_acc, y_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def upsample_conv2d_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, phases: torch.Tensor
) -> torch.Tensor:
    """y [N, C_out, 2H, 2W] from x [N, C_in, H, W], fp32, bf16 or fp16, and phases [C_in, C_out, 4, 4] of its dtype.

    phases is the kernel of the equal transposed convolution; of weight nothing is read. Any strides; fastest with
    channels_last maps and C_in innermost in phases. bias [C_out] of any float dtype or None.
    """
    n, c_in, h, w = x.shape
    c_out = phases.shape[1]
    last = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    y = torch.empty((n, c_out, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=last)
    rows = n * h * w
    if rows == 0:
        return y
    config = matrix_config(4 * rows, c_out, 4 * c_in, x.dtype)
    block_k = min(config.block_k, max(16, triton.next_power_of_2(c_in)))
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(c_out, config.block_n), 4)
    upsample_conv2d_kernel[grid](
        x, phases, bias, y, n, c_in, h, w, c_out, *x.stride(), *phases.stride(), *y.stride(),
        EVEN_K=c_in % block_k == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, GROUP_M=GROUP,
        **config.options(),
    )  # fmt: skip
    return y
