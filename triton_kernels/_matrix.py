# SPDX-License-Identifier: Apache-2.0
"""What the matrix kernels share: tile sizes, the order in which programs take tiles, the product itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._config import next_power_of_2
from ._math import INTERPRETED

# Row blocks a group of consecutive programs shares: 8 of 128 rows times 8 columns of 128 is 64 programs, half an H100,
# that together read a sixteenth of what they would apart.
GROUP = 8


@dataclass(frozen=True, slots=True)
class MatrixConfig:
    """How an [M, K] x [K, N] product is cut: a program makes one `block_m` x `block_n` tile, `block_k` deep at a time.

    `num_stages` slices of both operands are in shared memory at once.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int, *, operands: int = 1) -> int:
        """Shared memory for `operands` right-hand sides beside the left one."""
        return self.num_stages * self.block_k * (self.block_m + operands * self.block_n) * itemsize

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch that are Triton's.

        Multiply-adds are fused, whatever Triton's default is. ptxas is told that it may use every register: left alone
        it aims for 168 in some kernels and spills to get there, and shared memory limits the occupancy before that.
        """
        registers = min(255, 65536 // (32 * self.num_warps))
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": registers}
        return {**options, "enable_fp_fusion": True}


def matrix_config(m: int, n: int, k: int, dtype: torch.dtype, *, operands: int = 1) -> MatrixConfig:
    """The tile for one product: a pure function, the same on every GPU.

    16-bit tiles of 128 x 128 x 64 in three stages take 96 KB, which the 99 KB of sm_86, sm_89 and sm_120 still hold,
    and 64 of a thread's registers; where they are too few for the 100 and more SMs of a large GPU, or too large for the
    matrix, they are halved. float32 is multiplied exactly, without tensor cores, in tiles that fit the registers so: 32
    deep they spill on sm_90. With two right-hand sides (`operands`) the tile is half as wide, and holds as much; it is
    half as deep, with a stage more, since 64 deep it spills on sm_120.
    """
    if dtype == torch.float32:
        return MatrixConfig(32, 32 // operands, 16, num_warps=4, num_stages=2)
    block_m, block_n = 128, 128 // operands
    while block_m > 64 and -(-m // block_m) * -(-n // block_n) < 96:
        block_m //= 2
    block_m = max(16, min(block_m, next_power_of_2(m)))
    block_n = max(16, min(block_n, next_power_of_2(n)))
    block_k = max(16 * 2 // dtype.itemsize, min(128 // operands // dtype.itemsize, next_power_of_2(k)))
    num_warps = 8 if block_m * block_n * operands > 64 * 128 else 4
    return MatrixConfig(block_m, block_n, block_k, num_warps=num_warps, num_stages=2 + operands)


def wide(*maps: torch.Tensor) -> bool:
    """Whether offsets within a sample of [N, C, H, W] maps need 64 bits, as those of the VAE at 4096 px do."""
    return any(sum((t.shape[d] - 1) * t.stride(d) for d in (1, 2, 3)) >= 2**31 for t in maps)


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row block, column block) of a program: column by column within groups of GROUP_M row blocks."""
    in_group = GROUP_M * tiles_n
    first = program // in_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = program % in_group
    return first + within % rows, within // rows


@triton.jit
def dot(b_a, b_b, b_acc):
    """b_acc + b_a @ b_b in fp32, fp32 operands not rounded to tf32.

    The interpreter multiplies bf16 as if its bits were integers, so there every operand becomes fp32 first.
    """
    if INTERPRETED:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")
