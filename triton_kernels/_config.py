# SPDX-License-Identifier: Apache-2.0
"""Launch configurations: frozen dataclasses chosen by pure functions of shape and dtype.

Nothing here touches a device and nothing is tuned at run time: the first call of a process launches the same kernels
as the millionth, and a CPU test can check every choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# One SM of every supported GPU keeps about 64 resident warps. A launch of ~1024 programs of 4 warps gives each of the
# 108 to 188 SMs of an A100 / H100 / RTX PRO 6000 between 5 and 10 of them: enough independent loads in flight to cover
# DRAM latency, few enough that the partial sums of a GroupNorm stay a few percent of its input.
TARGET_PROGRAMS = 1024


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """How one op is cut into Triton programs.

    `block_rows` x `block_cols` is the tile a program holds in registers (both powers of two, as Triton requires);
    `rows_per_program` how many rows it walks through in steps of `block_rows`. What a row and a column are is said in
    the kernel's own header.
    """

    block_rows: int
    block_cols: int
    rows_per_program: int
    num_warps: int

    def __post_init__(self) -> None:
        for name in ("block_rows", "block_cols", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.rows_per_program < 1 or self.rows_per_program % self.block_rows:
            raise ValueError(f"rows_per_program={self.rows_per_program} is not a multiple of {self.block_rows}")

    def options(self, *, max_registers: int = 96) -> dict[str, int | bool]:
        """Keyword arguments of the launch that are Triton's rather than the kernel's.

        Multiply-adds are fused, explicitly: Triton's default changes between 3.9 and 3.10, the numbers must not.
        Registers are capped because ptxas, left alone, aims for 56 in some kernels and spills to get there. 96 is what
        a streaming kernel needs (20 warps an SM, 20 KB of loads in flight); the reductions need more and say so. No
        program may ask for more than the 65,536 registers of an SM.
        """
        max_registers = min(max_registers, 65536 // (32 * self.num_warps))
        return {"num_warps": self.num_warps, "enable_fp_fusion": True, "maxnreg": max_registers}


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is >= n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


def _largest_power_of_2_divisor(n: int) -> int:
    return n & -n


def _split_rows(rows: int, block_rows: int, programs_per_split: int, max_splits: int) -> int:
    """Rows per program such that about TARGET_PROGRAMS programs run; a multiple of block_rows."""
    splits = max(1, min(max_splits, TARGET_PROGRAMS // max(1, programs_per_split)))
    blocks = -(-rows // block_rows)
    return max(1, -(-blocks // splits)) * block_rows


def group_norm_silu_config(
    n: int, channels: int, hw: int, dtype: torch.dtype, *, channels_last: bool, skip_channels: int = 0
) -> KernelConfig:
    """Rows are the `hw` positions, columns the channels, for both memory formats.

    A tile is 2048 elements on 4 warps: 16 per thread, so the largest kernel (three fp32 accumulators an element)
    stays far from spilling. Channels-last tiles are at least 128 bytes wide (one full line) where C allows it; SDXL's
    widths are multiples of 64, so a 64- or 128-wide tile has no masked lane. Where the last `skip_channels` come from a
    tensor of their own, a tile is as wide as divides the channels of both: it reads one of them.
    """
    tile = 2048
    if channels_last:
        widest = 128 if dtype.itemsize <= 2 else 64
        block_cols = min(_largest_power_of_2_divisor(math.gcd(channels, skip_channels)), widest)
        if block_cols < 32 and skip_channels == 0:
            block_cols = min(next_power_of_2(channels), widest)
        block_rows = min(tile // block_cols, next_power_of_2(hw))
    else:
        block_rows = min(next_power_of_2(hw), 1024)
        block_cols = min(tile // block_rows, next_power_of_2(channels))
    col_blocks = -(-channels // block_cols)
    rows_per_program = _split_rows(hw, block_rows, n * col_blocks, max_splits=TARGET_PROGRAMS)
    return KernelConfig(block_rows, block_cols, rows_per_program, num_warps=4)


def geglu_config(rows: int, cols: int, dtype: torch.dtype) -> KernelConfig:
    """Rows are the product of the leading dimensions, columns the C outputs of one row.

    1024 elements on 4 warps: 8 elements a thread, one 16-byte access of a 16-bit dtype per operand.
    """
    tile = 1024
    block_cols = min(next_power_of_2(cols), tile)
    block_rows = min(tile // block_cols, next_power_of_2(rows))
    return KernelConfig(block_rows, block_cols, block_rows, num_warps=4)


def layer_norm_config(rows: int, cols: int, dtype: torch.dtype) -> KernelConfig:
    """Rows are the product of the leading dimensions; a program holds whole rows, padded to a power of two.

    A tile of 1024 elements on 4 warps, 8 a thread: the backward keeps five floats an element. Wider rows take more
    warps, up to the 16 of 4096 elements; of 8192, eight a thread spill with their 64 registers, and sixteen with 128.
    The backward walks through `rows_per_program` rows, so that the partial sums of the parameters, 8 bytes a column
    and program, stay few; 2048 warps are 15 on each SM of an H100. Its offsets within a program's rows have 32 bits.
    """
    block_cols = next_power_of_2(cols)
    block_rows = max(1, min(next_power_of_2(rows), 1024 // block_cols))
    num_warps = max(4, min(16, block_cols // 256))
    run = _split_rows(rows, block_rows, 1, max_splits=max(256, 2048 // num_warps))
    run = min(run, max(1, 2**30 // (block_rows * block_cols)) * block_rows)
    return KernelConfig(block_rows, block_cols, run, num_warps)


def noising_config(n: int, elements: int, dtype: torch.dtype) -> KernelConfig:
    """For `forward_diffusion` and `ddim_move`.

    One row per sample; columns are groups of four elements that share one Philox call.

    256 groups on 4 warps: 2 Philox calls and 8 normals a thread. More would only lengthen the tail of a launch that
    is short anyway (the latent of a 1024 px image has 16,384 groups).
    """
    return KernelConfig(1, min(next_power_of_2(-(-elements // 4)), 256), 1, num_warps=4)


def pick_config(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool = True, skip_channels: int = 0
) -> KernelConfig:
    """The launch configuration of `op` for one shape: a pure function, the same on every GPU.

    `shape` is (N, C, H*W) for `group_norm_silu`, (rows, cols) for `geglu` (cols counts outputs) and `layer_norm`, and
    (N, elements per sample) for `forward_diffusion`, `ddim_move` and `to_uint8`, (modules,) for `lora_merge`, whose
    dtype is that of the factors. `channels_last` and `skip_channels`, of C, matter to `group_norm_silu` only.
    Raises ValueError for an unknown op.
    """
    if op == "group_norm_silu":
        n, channels, hw = shape
        return group_norm_silu_config(n, channels, hw, dtype, channels_last=channels_last, skip_channels=skip_channels)
    if op == "geglu":
        rows, cols = shape
        return geglu_config(rows, cols, dtype)
    if op == "layer_norm":
        rows, cols = shape
        return layer_norm_config(rows, cols, dtype)
    if op == "lora_merge":
        # Sums of 32 floats a thread; products of floats are multiply-adds, which keep both their blocks in registers.
        return KernelConfig(64, 128 if dtype.itemsize == 2 else 64, 64, num_warps=8)
    if op == "to_uint8":
        return KernelConfig(1, 1024, 1, num_warps=4)  # 8 bytes a thread
    if op in ("forward_diffusion", "ddim_move"):
        n, elements = shape
        return noising_config(n, elements, dtype)
    known = "group_norm_silu, layer_norm, geglu, forward_diffusion, ddim_move, to_uint8, lora_merge"
    raise ValueError(f"no launch configuration for op {op!r}; have {known}")
