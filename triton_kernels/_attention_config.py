# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the attention kernels: pure functions of shape, dtype and GPU.

Unlike the streaming kernels of `_config.py` these live in shared memory, of which GPUs have 99 to 227 KB a program,
and at batch 1 they have few programs, so the target takes part: its architecture and its number of SMs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ._config import next_power_of_2

# Shared memory one program may have, by architecture, in bytes.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU: architecture as 10 * major + minor, and its number of streaming multiprocessors."""

    arch: int
    sms: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory one program may have; an unknown architecture counts as the smallest."""
        return SHARED_BYTES.get(self.arch, min(SHARED_BYTES.values()))

    @property
    def shared_operands(self) -> bool:
        """Whether the matrix instructions read their operands from shared memory (wgmma, tcgen05), not registers."""
        return self.arch in (90, 100)


# Where there is no GPU to ask (the interpreter, meta tensors): the H100 the numbers below speak of.
H100 = Target(90, 132)
_assumed: ContextVar[Target | None] = ContextVar("sdxl_fast_triton_target", default=None)


@contextmanager
def assuming(target: Target) -> Iterator[None]:
    """Inside the block every choice is made for `target`: to compile kernels for a GPU that is not here."""
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


@functools.cache
def _ask(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    return Target(10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count)


def target_of(x: torch.Tensor) -> Target:
    """The GPU that x lies on, or the assumed one."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _ask(x.device.index) if x.device.type == "cuda" else H100


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How one attention kernel is cut.

    A program owns `block_m` rows and walks through the other side in blocks of `block_n`, with `num_stages` of them on
    their way. `peel` takes an incomplete last block out of the loop, which then has no masks; the two copies share the
    operands that stay, which is free where they lie in shared memory, and elsewhere means registers, and spills.
    For wide heads: `chunk` is how many channels of q and k are multiplied at a time (0 all, with q staying), `parts`
    into how many programs the channels of v are divided, each of which makes the scores.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    peel: bool = False
    chunk: int = 0
    parts: int = 1
    max_registers: int | None = None

    def tail(self, rows: int) -> int:
        """What the other side ends with: 0 a whole block, 1 masks in every block, 2 one masked block after the loop."""
        if rows % self.block_n == 0:
            return 0
        return 2 if self.peel else 1

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch that are Triton's rather than the kernel's."""
        found: dict[str, int | bool] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        return found if self.max_registers is None else found | {"maxnreg": self.max_registers}


def padded_head_dim(head_dim: int) -> int:
    """Channels of a tile: a power of two, and at least what a matrix instruction takes."""
    return max(16, next_power_of_2(head_dim))


# What a row of queries costs in a 64-row tile, relative to a 128-row one: each tile reads all of K and V from L2, 64
# against 128 FLOP a byte. At the 5.5 TB/s of an H100's L2 the small tile cannot exceed 350 TFLOP/s, where 450 are to be
# had: 1.28.
SMALL_TILE_COST = 1.25


def query_rows(tiles_per_row: int, queries: int, target: Target) -> int:
    """Queries per program, 128 or 64: the one that keeps the busiest SM less busy.

    `tiles_per_row` is N * heads. Programs are all alike, so the time is that of ceil(programs / SMs) of them. On 132
    SMs, at batch 1:

        S=1024, 20 heads   128 rows: 160 programs, 2 on the busiest SM, 256 rows; 61 % of the SMs' time is used
                            64 rows: 320 programs, 3,                   192 rows; 81 %, at 1.25 a row: 240  <- chosen
        S=4096, 10 heads   128 rows: 320 programs, 3,                   384 rows; 81 %                      <- chosen
                            64 rows: 640 programs, 5,                   320 rows; 97 %, at 1.25 a row: 400

    From batch 4 on the waves are many, and 128 rows win throughout.
    """

    def busiest(rows: int) -> int:
        programs = tiles_per_row * -(-queries // rows)
        return -(-programs // target.sms) * rows

    if queries <= 64 or busiest(64) * SMALL_TILE_COST < busiest(128):
        return 64
    return 128


def _float32_config(block_d: int) -> AttentionConfig:
    """Three TF32 products hold every operand twice: small tiles, the largest that spill on no GPU.

    Left alone, ptxas would rather have 128 registers and spill in some of them.
    """
    if block_d <= 32:
        return AttentionConfig(32, 16, 4, 1, max_registers=255)
    return AttentionConfig(32 if block_d == 64 else 16, 32, 8, 1, max_registers=255)


def self_attention_fwd_config(
    n: int, heads: int, queries: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    """A program owns `block_m` queries of one head and walks through the keys.

    16 queries a warp. At 64 channels two programs of 128 queries share an SM of sm_90, each with 64 KB of the 227 and
    126 registers a thread: while one takes exponentials, the other multiplies.
    """
    block_d = padded_head_dim(head_dim)
    if dtype.itemsize == 4:
        return _float32_config(block_d)
    block_m = query_rows(n * heads, queries, target)
    block_n = 64 if block_d <= 64 or target.shared_operands else 32
    return AttentionConfig(
        block_m,
        block_n,
        num_warps=block_m // 16,
        num_stages=3 if block_d <= 64 else 2,
        peel=target.shared_operands and block_d <= 64,
    )


def self_attention_bwd_config(
    n: int, heads: int, rows: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    """For both kernels of the backward: `block_m` rows stay, of the queries for dq, of the keys for dk and dv.

    The sums of dk and dv and two blocks of scores fill the registers: 128 x 64 scores on 8 warps, 64 x 32 on 4.
    """
    block_d = padded_head_dim(head_dim)
    if dtype.itemsize == 4:
        return _float32_config(block_d)
    if block_d > 64:
        return AttentionConfig(64, 32, num_warps=8, num_stages=2)
    block_m = query_rows(n * heads, rows, target)
    return AttentionConfig(block_m, block_m // 2, block_m // 16, num_stages=2, peel=target.shared_operands)


def vae_attention_config(head_dim: int, keys: int, dtype: torch.dtype, target: Target) -> AttentionConfig:
    """For one head of more than 128 channels, whose weighted sums fill the registers.

    With 512 channels a program either owns 64 queries whole, at 64 FLOP a byte read from L2, or 128 queries and half of
    v's channels: half as many again products, but 85 useful FLOP a byte. On sm_90 and sm_100 L2 is the tighter limit
    (an H100's 5.5 TB/s allow 350 or 470 TFLOP/s), so the latter, in 224 of the 227 KB; elsewhere the products are. The
    16,384 tokens of a 1024 px image make 256 programs either way, 97 % of two rounds on 132 SMs. Where shared memory
    has 99 KB, q comes by in chunks instead of staying.
    """
    block_d = padded_head_dim(head_dim)
    if dtype.itemsize == 4:
        return AttentionConfig(32, 16, num_warps=8, num_stages=1, chunk=64, parts=block_d // 256)
    if target.shared_operands:
        # The masks of an incomplete block need registers that sm_100's addresses of tensor memory have taken.
        block_n = 16 if target.arch == 100 and keys % 32 else 32
        return AttentionConfig(128, block_n, num_warps=8, num_stages=2, parts=block_d // 256)
    # 384 channels in a tile of 512 need masks, for which sm_120 has no registers left beside blocks of 32 keys.
    block_n = 16 if target.arch == 120 and head_dim != block_d else 32
    return AttentionConfig(64, block_n, num_warps=8, num_stages=2, chunk=0 if target.shared_bytes > 140 * 1024 else 64)


def cross_attention_fwd_config(
    n: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    """A program owns `block_m` queries of one head and all keys, `block_n` of them with the padding.

    The work is small and bound by its launch and its reads; what matters is that every SM has some: 128 queries a
    program where that leaves two for each SM (10 heads of 4096 tokens: 320 on 132), else 64 (20 heads of 1024: 320).
    """
    block_n = max(16, next_power_of_2(keys))
    block_d = padded_head_dim(head_dim)
    if dtype.itemsize == 4:
        return AttentionConfig(16, block_n, num_warps=8, num_stages=1)
    block_m = 128 if n * heads * -(-queries // 128) >= 2 * target.sms else 64
    if block_n == 256 or block_d == 128:
        return AttentionConfig(64, block_n, num_warps=8, num_stages=1)
    return AttentionConfig(block_m, block_n, num_warps=block_m // 16, num_stages=1)


def query_runs(tiles_per_row: int, queries: int, keys: int, target: Target) -> int:
    """Into how many runs the queries are divided where dk and dv have few keys; `tiles_per_row` is N * heads.

    As many as give each SM two programs of 64 keys, none shorter than 128 queries: 8 for 20 heads of 1024 tokens and 77
    keys on 132 SMs, whose sums of 0.8 MB each stay in L2. From batch 7 there is one, and nothing to add up.
    """
    programs = tiles_per_row * -(-keys // 64)
    return max(1, min(-(-queries // 128), 2 * target.sms // programs))
