# SPDX-License-Identifier: Apache-2.0
"""lora_merge: weight = base + scale up down, in place, for any number of modules in one launch.

Formula   sums over the rank in fp32 (16-bit factors by the tensor cores), scaled, added and rounded once.
Grid      one program per tile of some module's weight; it finds the module in a table of addresses and sizes.
Registers the tile's sums; blocks of both factors pass through shared memory.
Bytes     reads and writes 1 element per element; the factors again for every tile, from the L2 cache.
Wrong     where one module is ragged or unaligned: the whole launch then moves single elements.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._config import next_power_of_2, pick_config
from ._math import INTERPRETED, round_to


@triton.jit
def lora_merge_kernel(
    table_ptr, like_weight_ptr, like_factor_ptr, count,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    weight_ty = like_weight_ptr.dtype.element_ty
    factor_ty = like_factor_ptr.dtype.element_ty
    i_tile = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    first_tiles = tl.load(table_ptr + 8 * count + o_m, mask=o_m < count, other=0x7FFFFFFFFFFF)
    i_m = tl.sum((first_tiles <= i_tile).to(tl.int32), 0) - 1
    p_m = table_ptr + i_m
    weight_ptr = tl.load(p_m).to(tl.pointer_type(weight_ty))
    base_ptr = tl.load(p_m + count).to(tl.pointer_type(weight_ty))
    down_ptr = tl.load(p_m + 2 * count).to(tl.pointer_type(factor_ty))
    up_ptr = tl.load(p_m + 3 * count).to(tl.pointer_type(factor_ty))
    # Sizes within a tile have 32 bits, or the addresses of a ragged one do not fit into the registers.
    rows = tl.load(p_m + 4 * count)
    cols = tl.load(p_m + 5 * count).to(tl.int32)
    rank = tl.load(p_m + 6 * count).to(tl.int32)
    scale = tl.load(p_m + 7 * count).to(tl.float64, bitcast=True).to(tl.float32)
    i_tile -= tl.load(p_m + 8 * count)
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        base_ptr = tl.multiple_of(base_ptr, 16)
        down_ptr = tl.multiple_of(down_ptr, 16)
        up_ptr = tl.multiple_of(up_ptr, 16)
        cols = tl.multiple_of(cols, 16)
        rank = tl.multiple_of(rank, 16)
    across = tl.cdiv(cols, BLOCK_C)
    row = i_tile // across * BLOCK_R
    col = (i_tile % across).to(tl.int32) * BLOCK_C
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_r = o_r < rows - row
    m_c = o_c < cols - col
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    up_ptr += row * rank
    down_ptr += col
    for i_k in range(0, rank, BLOCK_K):
        o_k = tl.arange(0, BLOCK_K)
        m_k = o_k < rank - i_k
        p_up = up_ptr + i_k + (o_r[:, None] * rank + o_k[None, :])
        b_up = tl.load(p_up, mask=m_r[:, None] & m_k[None, :], other=0.0)
        p_down = down_ptr + tl.cast(i_k, tl.int64) * cols + (o_k[:, None] * cols + o_c[None, :])
        b_down = tl.load(p_down, mask=m_k[:, None] & m_c[None, :], other=0.0)
        if INTERPRETED:  # whose product of bfloat16 matrices is wrong
            b_up = b_up.to(tl.float32)
            b_down = b_down.to(tl.float32)
        b_sum = tl.dot(b_up, b_down, b_sum, input_precision="ieee")
    start = row * cols + col
    o_rc = o_r[:, None] * cols + o_c[None, :]
    m_rc = m_r[:, None] & m_c[None, :]
    b_base = tl.load(base_ptr + start + o_rc, mask=m_rc, other=0.0).to(tl.float32)
    tl.store(weight_ptr + start + o_rc, round_to(b_base + scale * b_sum, weight_ty), mask=m_rc)


def _aligned(weight: torch.Tensor, base: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> bool:
    cols, rank = math.prod(weight.shape[1:]), down.shape[0]
    addresses = (0 if t.device.type == "meta" else t.data_ptr() for t in (weight, base, down, up))
    return cols % 16 == 0 and rank % 16 == 0 and all(address % 16 == 0 for address in addresses)


def lora_merge_fwd(
    weights: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    scales: Sequence[float],
) -> None:
    """Writes base + scale up down to every weight.

    weights, bases: (out, ...), fp32, bf16 or fp16, dense; downs: (rank, ...), ups: (out, rank, ...), fp32, bf16 or
    fp16, their columns in the order in which the weight's lie in memory. All of one dtype each, on one device; fewer
    than 2^25 columns and ranks.
    """
    config = pick_config("lora_merge", (len(weights),), downs[0].dtype)
    aligned = all(_aligned(*tensors) for tensors in zip(weights, bases, downs, ups, strict=True))
    # The masks and addresses of a ragged tile take registers: 128 columns wide it spills on sm_80 and sm_120.
    block_cols = config.block_cols if aligned else 64
    # Addresses, rows, columns, rank, the bits of the scale as a double, and the first of the module's tiles.
    rows: list[tuple[int, ...]] = []
    tiles = 0
    for weight, base, down, up, scale in zip(weights, bases, downs, ups, scales, strict=True):
        addresses = [0 if t.device.type == "meta" else t.data_ptr() for t in (weight, base, down, up)]
        sizes = (weight.shape[0], math.prod(weight.shape[1:]), down.shape[0])
        rows.append((*addresses, *sizes, *struct.unpack("q", struct.pack("d", scale)), tiles))
        tiles += triton.cdiv(sizes[0], config.block_rows) * triton.cdiv(sizes[1], block_cols)
    if tiles == 0:
        return
    table = torch.tensor(list(zip(*rows, strict=True)), dtype=torch.int64)
    lead = weights[0]
    # Pinned, so that the copy waits for nothing; PyTorch keeps the memory until it is done.
    table = (table.pin_memory() if lead.is_cuda else table).to(lead.device, non_blocking=True)
    lora_merge_kernel[(tiles,)](
        table, lead, downs[0], len(weights), ALIGNED=aligned, BLOCK_M=next_power_of_2(len(weights)),
        BLOCK_R=config.block_rows, BLOCK_C=block_cols, BLOCK_K=64 // downs[0].element_size(),
        **config.options(max_registers=128),
    )  # fmt: skip
