# SPDX-License-Identifier: Apache-2.0
"""to_uint8: round(255 clamp(x / 2 + 1/2, 0, 1)), ties to even, written channels innermost.

Formula   in fp32, rounded after every step, so multiply-adds are not fused. Adding 1.5 * 2^23 rounds to an integer.
Grid      (blocks of bytes of one sample, samples).
Registers one value per byte. The number of channels is a constant, so that no element pays a division.
Bytes     reads 1 element and writes 1 byte.
Wrong     where the last convolution can do it in its epilogue; planes are gathered through the cache, three at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._config import pick_config
from .forward_diffusion import _memory_format


@triton.jit
def to_uint8_kernel(
    x_ptr, out_ptr, hw, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_n = tl.program_id(1).to(tl.int64)
    elements = tl.cast(hw, tl.int64) * CHANNELS
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    if CHANNELS_LAST:
        o_mem = o_e
    else:
        o_mem = (o_e % CHANNELS) * hw + o_e // CHANNELS
    b_x = tl.load(x_ptr + i_n * elements + o_mem, mask=m_e, other=0.0).to(tl.float32)
    b_half = b_x * 0.5 + 0.5
    b_unit = tl.where(b_half > 0.0, tl.where(b_half < 1.0, b_half, 1.0), 0.0)  # NaN is not above 0
    b_whole = (b_unit * 255.0 + 12582912.0) - 12582912.0
    tl.store(out_ptr + i_n * elements + o_e, b_whole.to(tl.int32).to(tl.uint8), mask=m_e)


def to_uint8_fwd(x: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, C) of x (N, C, H, W), fp32, bf16 or fp16, contiguous or channels_last."""
    n, channels, height, width = x.shape
    memory_format = _memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    out = x.new_empty((n, height, width, channels), dtype=torch.uint8)
    if x.numel():
        elements = channels * height * width
        config = pick_config("to_uint8", (n, elements), x.dtype)
        options = {**config.options(), "enable_fp_fusion": False}
        to_uint8_kernel[(triton.cdiv(elements, config.block_cols), n)](
            x, out, height * width, CHANNELS=channels, CHANNELS_LAST=memory_format == torch.channels_last,
            BLOCK=config.block_cols, **options,
        )  # fmt: skip
    return out
