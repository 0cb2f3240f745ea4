# SPDX-License-Identifier: Apache-2.0
"""Launch configurations are pure functions whose every choice can be launched and covers its tensor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from sdxl_fast.triton_kernels._config import TARGET_PROGRAMS, KernelConfig, next_power_of_2, pick_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, C, H*W): the UNet at 1024 px, the VAE decoder, discriminator heads, ragged and tiny maps, 2^32 elements.
GROUP_NORM_SHAPES = [
    *((n, c, 1024 * 4**level) for n in (1, 16) for level, c in enumerate((1280, 640, 320))),
    (1, 1920, 1024), (2, 2560, 1024), (1, 960, 16384),
    (1, 512, 16384), (1, 512, 262144), (1, 256, 1048576), (1, 128, 1048576),
    (64, 64, 256), (3, 6, 15), (1, 1, 1), (1, 7, 1), (2, 4096, 3), (1, 4096, 2**20),
]  # fmt: skip


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GROUP_NORM_SHAPES, ids=str)
def test_group_norm_silu(shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool) -> None:
    n, channels, hw = shape
    config = pick_config("group_norm_silu", shape, dtype, channels_last=channels_last)
    chunks = -(-hw // config.rows_per_program)
    col_blocks = -(-channels // config.block_cols)
    assert config.block_rows * config.block_cols <= 2048  # three fp32 accumulators an element stay in registers
    assert chunks * config.rows_per_program >= hw > (chunks - 1) * config.rows_per_program
    assert col_blocks <= 65535 and n <= 65535  # grid y and z
    assert n * chunks * col_blocks <= max(TARGET_PROGRAMS, n * col_blocks)
    # A large map is shared by enough programs to fill any GPU, whatever its number of groups.
    if n * hw * channels >= 2**22:
        assert n * chunks * col_blocks >= TARGET_PROGRAMS // 2
    # The backward's partial sums, three fp32 values a channel and chunk written and read once, are small change beside
    # its four reads and one write of the map.
    if hw >= 1024:
        assert 2 * chunks * 3 * 4 <= 0.2 * 5 * hw * dtype.itemsize


@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560, 128, 256, 512])
def test_sdxl_widths_have_no_masked_lane(channels: int) -> None:
    config = pick_config("group_norm_silu", (1, channels, 4096), torch.bfloat16)
    assert channels % config.block_cols == 0
    assert config.block_cols * 2 >= 128  # a full line per row of the tile


@pytest.mark.parametrize(
    "channels", [(1280, 1280), (1280, 640), (640, 640), (640, 320), (320, 320), (16, 112)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tile_is_of_one_of_two_maps(channels: tuple[int, int], dtype: torch.dtype) -> None:
    config = pick_config("group_norm_silu", (1, sum(channels), 4096), dtype, skip_channels=channels[1])
    assert all(c % config.block_cols == 0 for c in channels)
    assert config.block_cols >= 16 and config.block_rows * config.block_cols <= 2048


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 2560), (1024, 5120), (2**22, 1280), (7, 33), (1, 1), (5, 4097)], ids=str)
def test_geglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, cols = shape
    config = pick_config("geglu", shape, dtype)
    assert config.rows_per_program == config.block_rows
    assert config.block_rows * config.block_cols <= 1024
    assert -(-rows // config.block_rows) < 2**31 and -(-cols // config.block_cols) <= 65535


@pytest.mark.parametrize(
    "shape", [(4096, 640), (1024, 1280), (77, 2048), (7, 33), (1, 1), (3, 4096), (2**30, 4096), (2**40, 33)], ids=str
)
def test_layer_norm(shape: tuple[int, int]) -> None:
    rows, cols = shape
    config = pick_config("layer_norm", shape, torch.bfloat16)
    assert cols <= config.block_cols and config.block_rows * config.block_cols <= 256 * config.num_warps
    assert config.rows_per_program * cols < 2**31  # the backward's offsets
    assert config.num_warps * 32 * config.options()["maxnreg"] <= 65536
    if rows < 2**20:  # partial sums of two floats a column and program
        assert -(-rows // config.rows_per_program) <= 512


@pytest.mark.parametrize("elements", [1, 3, 4, 65536, 2**31 + 1])
def test_forward_diffusion(elements: int) -> None:
    config = pick_config("forward_diffusion", (2, elements), torch.float32)
    assert config.block_cols <= 256
    assert -(-elements // (4 * config.block_cols)) < 2**31


def test_pure_and_frozen() -> None:
    first = pick_config("geglu", (4096, 2560), torch.bfloat16)
    assert first == pick_config("geglu", (4096, 2560), torch.bfloat16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.num_warps = 8  # type: ignore[misc]
    assert first.options()["num_warps"] == first.num_warps


def test_refusals() -> None:
    with pytest.raises(ValueError, match="power of two"):
        KernelConfig(block_rows=3, block_cols=4, rows_per_program=3, num_warps=4)
    with pytest.raises(ValueError, match="multiple of"):
        KernelConfig(block_rows=4, block_cols=4, rows_per_program=6, num_warps=4)
    with pytest.raises(ValueError, match="no launch configuration for op 'conv'"):
        pick_config("conv", (1,), torch.float32)


def test_next_power_of_2() -> None:
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 4, 5, 1023, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 1024, 2048]
