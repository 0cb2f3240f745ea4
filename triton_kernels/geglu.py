# SPDX-License-Identifier: Apache-2.0
"""geglu: y = value * GELU(gate), with value and gate the first and second half of the last dimension.

Formula   forward  y = v GELU(g);   backward  dv = dy GELU(g),  dg = dy v GELU'(g).
Grid      (row blocks, column blocks). A program owns a [BLOCK_R, BLOCK_C] tile of the output; long rows make it one
          row by 1024 columns, short ones several rows.
Registers the tile of v, g and dy in fp32; nothing is kept between tiles, nothing is saved by the forward but x.
Bytes     forward reads 2 and writes 1 element per output; backward reads 3 and writes 2.
Wrong     when x comes straight from the projection before it: there the product belongs in that GEMM's epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._config import pick_config
from ._float8 import reciprocal_of, round_result, written
from ._math import gelu_and_grad, round_to


@triton.jit
def geglu_fwd_kernel(
    x_ptr, scale_ptr, y_ptr, rows, cols, TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    i_col = tl.program_id(1) * BLOCK_C
    o_r = tl.arange(0, BLOCK_R)
    o_c = i_col + tl.arange(0, BLOCK_C)
    m_rc = (i_row + o_r < rows)[:, None] & (o_c < cols)[None, :]
    cols_64 = tl.cast(cols, tl.int64)
    row_64 = i_row + o_r
    p_x = x_ptr + row_64[:, None] * (2 * cols_64) + o_c[None, :]
    b_v = tl.load(p_x, mask=m_rc, other=0.0).to(tl.float32)
    b_g = tl.load(p_x + cols_64, mask=m_rc, other=0.0).to(tl.float32)
    b_gelu, _ = gelu_and_grad(b_g, TANH, x_ptr.dtype.element_ty != tl.float32)
    p_y = y_ptr + row_64[:, None] * cols_64 + o_c[None, :]
    b_y = round_result(b_v * b_gelu, reciprocal_of(scale_ptr), x_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
    tl.store(p_y, b_y, mask=m_rc)


@triton.jit
def geglu_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, rows, cols, TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    i_col = tl.program_id(1) * BLOCK_C
    o_r = tl.arange(0, BLOCK_R)
    o_c = i_col + tl.arange(0, BLOCK_C)
    m_rc = (i_row + o_r < rows)[:, None] & (o_c < cols)[None, :]
    cols_64 = tl.cast(cols, tl.int64)
    row_64 = i_row + o_r
    o_x = row_64[:, None] * (2 * cols_64) + o_c[None, :]
    b_v = tl.load(x_ptr + o_x, mask=m_rc, other=0.0).to(tl.float32)
    b_g = tl.load(x_ptr + o_x + cols_64, mask=m_rc, other=0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + row_64[:, None] * cols_64 + o_c[None, :], mask=m_rc, other=0.0).to(tl.float32)
    b_gelu, b_grad = gelu_and_grad(b_g, TANH, x_ptr.dtype.element_ty != tl.float32)
    tl.store(dx_ptr + o_x, round_to(b_dy * b_gelu, dx_ptr.dtype.element_ty), mask=m_rc)
    tl.store(dx_ptr + o_x + cols_64, round_to(b_dy * b_v * b_grad, dx_ptr.dtype.element_ty), mask=m_rc)


def _rows_cols(x: torch.Tensor) -> tuple[int, int]:
    cols = x.shape[-1] // 2
    return (x.numel() // (2 * cols) if cols else 0), cols


def geglu_fwd(x: torch.Tensor, approximate: str, scale_y: torch.Tensor | None = None) -> torch.Tensor:
    """y of shape (..., C) from contiguous x of shape (..., 2C), fp32, bf16 or fp16; approximate is none or tanh.

    With scale_y, fp32 of one element, y is float8_e4m3fn.
    """
    rows, cols = _rows_cols(x)
    y = x.new_empty((*x.shape[:-1], cols), dtype=x.dtype if scale_y is None else torch.float8_e4m3fn)
    if y.numel() == 0:
        return y
    config = pick_config("geglu", (rows, cols), x.dtype)
    grid = (triton.cdiv(rows, config.block_rows), triton.cdiv(cols, config.block_cols))
    geglu_fwd_kernel[grid](
        x.contiguous(), scale_y, written(y), rows, cols,
        TANH=approximate == "tanh", BLOCK_R=config.block_rows, BLOCK_C=config.block_cols, **config.options(),
    )  # fmt: skip
    return y


def geglu_bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """dx of x's shape and dtype from dy (..., C) and the saved x (..., 2C)."""
    rows, cols = _rows_cols(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx
    config = pick_config("geglu", (rows, cols), x.dtype)
    grid = (triton.cdiv(rows, config.block_rows), triton.cdiv(cols, config.block_cols))
    geglu_bwd_kernel[grid](
        dy.contiguous(), x.contiguous(), dx, rows, cols,
        TANH=approximate == "tanh", BLOCK_R=config.block_rows, BLOCK_C=config.block_cols, **config.options(),
    )  # fmt: skip
    return dx
