# SPDX-License-Identifier: Apache-2.0
"""layer_norm: y = (s - mean) rstd weight + bias over rows, s = x + residual, rounded and returned.

Formula   backward: dx = rstd (w dy - c1 - xhat c2) + dsum, with c1 and c2 the row's means of w dy and w dy xhat;
          dweight = sum over rows of dy xhat, dbias of dy.
Grid      forward: blocks of rows. Backward: runs of blocks of rows; a program keeps the parameters' sums of its run,
          which a second kernel adds up, blocks of columns, in a fixed order.
Registers whole rows as floats, padded to a power of two; in the backward two sums per column beside them.
Bytes     forward reads 1 and writes 1 element per element, 2 and 2 with a residual; y may be float8, half of 16 bits;
          backward reads 2 (3) and writes 1.
Wrong     for rows beyond 4096 elements, which no program can hold; widths just above a power of two waste half of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._config import pick_config
from ._float8 import reciprocal_of, round_result, written
from ._math import round_to


@triton.jit
def _column_vector(ptr, o_c, m_c, absent: tl.constexpr):
    """A [C] parameter as fp32, `absent` everywhere when it is None."""
    if ptr is not None:
        return tl.load(ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    return tl.full(o_c.shape, absent, tl.float32)


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, rows, cols, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    base = first * cols
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_r = o_r < rows - first
    m_c = o_c < cols
    m_rc = m_r[:, None] & m_c[None, :]
    o_rc = o_r[:, None] * cols + o_c[None, :]  # 32 bits: an address per element would be two registers more
    b_s = tl.load(x_ptr + base + o_rc, mask=m_rc, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        b_residual = tl.load(residual_ptr + base + o_rc, mask=m_rc, other=0.0).to(tl.float32)
        b_sum = round_to(b_s + b_residual, sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + base + o_rc, b_sum, mask=m_rc)
        b_s = b_sum.to(tl.float32)
    mean = tl.sum(b_s, 1) / cols
    b_d = tl.where(m_rc, b_s - mean[:, None], 0.0)
    rest = tl.sum(b_d, 1) / cols  # what the rounding of the mean left over
    mean += rest
    b_d = tl.where(m_rc, b_d - rest[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(b_d * b_d, 1) / cols + eps)
    tl.store(mean_ptr + first + o_r, mean, mask=m_r)
    tl.store(rstd_ptr + first + o_r, rstd, mask=m_r)
    b_weight = _column_vector(weight_ptr, o_c, m_c, 1.0)
    b_bias = _column_vector(bias_ptr, o_c, m_c, 0.0)
    b_y = b_d * rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    b_y = round_result(b_y, reciprocal_of(scale_ptr), x_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + o_rc, b_y, mask=m_rc)


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr, dsum_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partials_ptr, rows, cols, run,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of a run of rows, and their sums of dy xhat and dy: partials[program, 2, cols]."""
    first = tl.program_id(0).to(tl.int64) * run
    base = first * cols
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < cols
    b_weight = _column_vector(weight_ptr, o_c, m_c, 1.0)
    b_dweight = tl.zeros([BLOCK_C], tl.float32)
    b_dbias = tl.zeros([BLOCK_C], tl.float32)
    left = tl.minimum(rows - first, run).to(tl.int32)
    for i_row in range(0, left, BLOCK_R):
        o_r = i_row + tl.arange(0, BLOCK_R)
        m_r = o_r < left
        m_rc = m_r[:, None] & m_c[None, :]
        o_rc = o_r[:, None] * cols + o_c[None, :]  # in 32 bits, or four addresses an element live through the loop
        b_dy = tl.load(dy_ptr + base + o_rc, mask=m_rc, other=0.0).to(tl.float32)
        b_s = tl.load(s_ptr + base + o_rc, mask=m_rc, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + first + o_r, mask=m_r, other=0.0)
        rstd = tl.load(rstd_ptr + first + o_r, mask=m_r, other=0.0)
        b_xhat = tl.where(m_rc, (b_s - mean[:, None]) * rstd[:, None], 0.0)
        if partials_ptr is not None:
            b_dweight += tl.sum(b_dy * b_xhat, 0)
            b_dbias += tl.sum(b_dy, 0)
        if dx_ptr is not None:
            b_g = b_dy * b_weight[None, :]
            c1 = tl.sum(b_g, 1) / cols
            c2 = tl.sum(b_g * b_xhat, 1) / cols
            b_dx = rstd[:, None] * (b_g - c1[:, None] - b_xhat * c2[:, None])
            if dsum_ptr is not None:
                b_dx += tl.load(dsum_ptr + base + o_rc, mask=m_rc, other=0.0).to(tl.float32)
            tl.store(dx_ptr + base + o_rc, round_to(b_dx, dx_ptr.dtype.element_ty), mask=m_rc)
    if partials_ptr is not None:
        o_out = tl.program_id(0).to(tl.int64) * 2 * cols + o_c
        tl.store(partials_ptr + o_out, b_dweight, mask=m_c)
        tl.store(partials_ptr + o_out + cols, b_dbias, mask=m_c)


@triton.jit
def layer_norm_merge_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, programs, cols, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < cols
    b_dweight = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    b_dbias = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i_k in range(0, programs, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_kc = (o_k < programs)[:, None] & m_c[None, :]
        p_kc = partials_ptr + o_k[:, None].to(tl.int64) * 2 * cols + o_c[None, :]
        b_dweight += tl.load(p_kc, mask=m_kc, other=0.0)
        b_dbias += tl.load(p_kc + cols, mask=m_kc, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + o_c, round_to(tl.sum(b_dweight, 0), dweight_ptr.dtype.element_ty), mask=m_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_c, round_to(tl.sum(b_dbias, 0), dbias_ptr.dtype.element_ty), mask=m_c)


def layer_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    scale_y: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """(y, mean, rstd), or (y, sum, mean, rstd) with a residual; y and sum like x, mean and rstd (...,) fp32.

    x, residual: (..., C), fp32, bf16 or fp16, contiguous, C <= 4096; weight, bias: (C,) of x's dtype or fp32, or None.
    With scale_y, fp32 of one element, y is float8_e4m3fn.
    """
    cols = x.shape[-1]
    y = torch.empty_like(x, dtype=x.dtype if scale_y is None else torch.float8_e4m3fn)
    total = None if residual is None else torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    rows = mean.numel()
    if x.numel():
        config = pick_config("layer_norm", (rows, cols), x.dtype)
        layer_norm_fwd_kernel[(triton.cdiv(rows, config.block_rows),)](
            x, residual, weight, bias, scale_y, written(y), total, mean, rstd, rows, cols, eps,
            BLOCK_R=config.block_rows, BLOCK_C=config.block_cols, **config.options(),
        )  # fmt: skip
    return (y, mean, rstd) if total is None else (y, total, mean, rstd)


def layer_norm_bwd(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(ds, dweight, dbias), None where `needs` is False or there is no weight; s is x, or the sum."""
    cols, rows = s.shape[-1], mean.numel()
    ds = torch.empty_like(s) if needs[0] else None
    dweight, dbias = (torch.empty_like(weight) if need and weight is not None else None for need in needs[1:])
    wanted = dweight is not None or dbias is not None
    if s.numel() == 0:
        return ds, *(None if g is None else g.zero_() for g in (dweight, dbias))  # type: ignore[return-value]
    config = pick_config("layer_norm", (rows, cols), s.dtype)
    run = config.rows_per_program if wanted else config.block_rows
    programs = triton.cdiv(rows, run)
    partials = s.new_empty((programs, 2, cols), dtype=torch.float32) if wanted else None
    if ds is not None or wanted:
        layer_norm_bwd_kernel[(programs,)](
            dy, dsum, s, weight, mean, rstd, ds, partials, rows, cols, run,
            BLOCK_R=config.block_rows, BLOCK_C=config.block_cols, **config.options(),
        )  # fmt: skip
    if wanted:
        layer_norm_merge_kernel[(triton.cdiv(cols, 64),)](
            partials, dweight, dbias, programs, cols, BLOCK_K=32, BLOCK_C=64, **config.options()
        )
    return ds, dweight, dbias
