# SPDX-License-Identifier: Apache-2.0
"""Where the tiles of a map lie, [rows of H*W, channels] in both memory formats, and the values of their channels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_offsets(i_n, row_start, o_c, channels, hw, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr):
    """Element offsets (int64) of the tile at row_start of sample i_n, and how far one row moves them."""
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    if CHANNELS_LAST:
        row_stride = tl.cast(channels, tl.int64)
        o_rc = o_r[:, None] * channels + o_c[None, :]
    else:
        row_stride = tl.cast(1, tl.int64)
        o_rc = o_r[:, None] + o_c.to(tl.int64)[None, :] * hw
    return i_n * channels * hw + row_start * row_stride + o_rc, row_stride


@triton.jit
def tile_pointers(
    x_ptr, skip_ptr, i_n, row_start, o_c, channels, skip_channels, hw,
    CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pointers of the tile at row_start of sample i_n, in x or in skip, and how far one row moves them."""
    if skip_ptr is None:
        o_tile, row_stride = tile_offsets(i_n, row_start, o_c, channels, hw, CHANNELS_LAST, BLOCK_R)
        return x_ptr + o_tile, row_stride
    else:
        x_channels = channels - skip_channels
        of_x = tl.program_id(1) * BLOCK_C < x_channels
        o_own = o_c - tl.where(of_x, 0, x_channels)
        own_channels = tl.where(of_x, x_channels, skip_channels)
        o_tile, row_stride = tile_offsets(i_n, row_start, o_own, own_channels, hw, CHANNELS_LAST, BLOCK_R)
        return tl.where(of_x, x_ptr, skip_ptr) + o_tile, row_stride


@triton.jit
def channel_vector(ptr, offset, o_c, m_c, default: tl.constexpr):
    """fp32 values of an optional per-channel tensor; `default` everywhere when it is absent."""
    if ptr is None:
        return tl.full(o_c.shape, default, tl.float32)
    else:
        return tl.load(ptr + offset + o_c, mask=m_c, other=default).to(tl.float32)
