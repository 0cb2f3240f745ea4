# SPDX-License-Identifier: Apache-2.0
"""group_norm_silu: y = act(GroupNorm(x + shift)), with shift one value per (sample, channel) and act none or SiLU.

Formula   xh = (x + shift - mean_g) rstd_g,  z = xh w + b,  y = act(z).
          Backward with dz = dy act'(z), M the elements of a group: S1_g = sum(w dz) / M, S2_g = sum(w dz xh) / M,
          dx = rstd (w dz - S1 - xh S2),  db = sum(dz),  dw = sum(dz xh),
          dshift = sum_hw dx = rstd (w sum(dz) - HW S1 - S2 sum(xh)): no further pass over the map.
Grid      (row chunks, channel blocks, samples) for every pass over the map: a group of the 1024 px VAE has 8 M elements
          and is shared by hundreds of programs. Rows are the H*W positions, columns the channels, in both memory
          formats; only the strides differ. The finalizing kernels run one program per group.
          The channels of a forward may come from two tensors, x's before skip's: a channel block is of one of them.
          Forward: moments per (chunk, channel) -> mean and rstd per group -> apply.
          Backward: three sums per (chunk, channel) -> group sums, dw, db, dshift -> dx.
Registers one [BLOCK_R, BLOCK_C] tile and its accumulators; per-channel factors once per program.
Bytes     forward reads 2 and writes 1 element per element (the second read comes from L2 for maps that fit there, which
          all maps of the SDXL UNet do and those of the VAE decoder above 256 px do not); backward reads 4, writes 1.
          The partial sums are at most a few percent of that.
Wrong     for tiny maps, where three launches cost more than the work.

Deterministic: no atomics; partial sums are merged in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._config import KernelConfig, next_power_of_2, pick_config
from ._float8 import reciprocal_of, round_result, written
from ._maps import channel_vector, tile_offsets, tile_pointers
from ._math import round_to, sigmoid, silu_grad


@triton.jit
def group_norm_silu_moments_kernel(
    x_ptr, skip_ptr, shift_ptr, mean_ptr, m2_ptr, channels, skip_channels, hw, chunk, num_chunks,
    CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every channel over one chunk of rows, by Welford's update."""
    i_chunk = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    rows = tl.minimum(hw - i_chunk * chunk, chunk).to(tl.int32)
    p_tile, row_stride = tile_pointers(
        x_ptr, skip_ptr, i_n, i_chunk * chunk, o_c, channels, skip_channels, hw, CHANNELS_LAST, BLOCK_R, BLOCK_C
    )
    b_shift = channel_vector(shift_ptr, i_n * channels, o_c, m_c, 0.0)

    b_count = tl.zeros([BLOCK_R], tl.float32)
    b_mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_m2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_row in range(0, rows, BLOCK_R):
        m_r = i_row + tl.arange(0, BLOCK_R) < rows
        m_rc = m_r[:, None] & m_c[None, :]
        p_x = p_tile + tl.cast(i_row, tl.int64) * row_stride
        b_x = tl.load(p_x, mask=m_rc, other=0.0).to(tl.float32)
        b_count += tl.where(m_r, 1.0, 0.0)
        b_inv = tl.where(m_r, 1.0 / tl.maximum(b_count, 1.0), 0.0)
        b_delta = b_x + b_shift[None, :] - b_mean
        b_step = b_delta * b_inv[:, None]  # zero on rows past the end: they change neither moment
        b_mean += b_step
        b_m2 += tl.where(m_rc, b_delta * (b_delta - b_step), 0.0)

    total = tl.sum(b_count, 0)
    c_mean = tl.sum(b_mean * b_count[:, None], 0) / total
    b_dev = b_mean - c_mean[None, :]
    c_m2 = tl.sum(b_m2 + b_count[:, None] * b_dev * b_dev, 0)
    o_out = (i_n * num_chunks + i_chunk) * channels + o_c
    tl.store(mean_ptr + o_out, c_mean, mask=m_c)
    tl.store(m2_ptr + o_out, c_m2, mask=m_c)


@triton.jit
def group_norm_silu_stats_kernel(
    part_mean_ptr, part_m2_ptr, mean_ptr, rstd_ptr, channels, hw, groups, chunk, num_chunks, eps,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one (sample, group): the moments of its chunks and channels merged in two passes over them."""
    i_g = tl.program_id(0)
    i_n = tl.program_id(1).to(tl.int64)
    group_channels = channels // groups
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < group_channels
    base = i_n * num_chunks * channels + i_g * group_channels
    total = tl.cast(group_channels, tl.float32) * hw

    b_sum = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i_k in range(0, num_chunks, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_kc = (o_k < num_chunks)[:, None] & m_c[None, :]
        b_rows = tl.minimum(hw - o_k.to(tl.int64) * chunk, chunk).to(tl.float32)
        o_kc = base + o_k[:, None].to(tl.int64) * channels + o_c[None, :]
        b_sum += b_rows[:, None] * tl.load(part_mean_ptr + o_kc, mask=m_kc, other=0.0)
    mean = tl.sum(tl.sum(b_sum, 0), 0) / total

    b_m2 = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i_k in range(0, num_chunks, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_kc = (o_k < num_chunks)[:, None] & m_c[None, :]
        b_rows = tl.minimum(hw - o_k.to(tl.int64) * chunk, chunk).to(tl.float32)
        o_kc = base + o_k[:, None].to(tl.int64) * channels + o_c[None, :]
        b_dev = tl.load(part_mean_ptr + o_kc, mask=m_kc, other=0.0) - mean
        b_m2 += tl.load(part_m2_ptr + o_kc, mask=m_kc, other=0.0) + tl.where(m_kc, b_rows[:, None] * b_dev * b_dev, 0.0)
    var = tl.sum(tl.sum(b_m2, 0), 0) / total
    tl.store(mean_ptr + i_n * groups + i_g, mean)
    tl.store(rstd_ptr + i_n * groups + i_g, 1.0 / tl.sqrt_rn(var + eps))


@triton.jit
def group_norm_silu_apply_kernel(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, scale_ptr, y_ptr,
    channels, skip_channels, hw, groups, chunk,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(2).to(tl.int64)
    # Last chunk first: its rows are the ones the moments kernel read last, so they are the ones still in L2.
    i_chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    rows = tl.minimum(hw - i_chunk * chunk, chunk).to(tl.int32)
    o_tile, row_stride = tile_offsets(i_n, i_chunk * chunk, o_c, channels, hw, CHANNELS_LAST, BLOCK_R)
    p_tile, x_stride = tile_pointers(
        x_ptr, skip_ptr, i_n, i_chunk * chunk, o_c, channels, skip_channels, hw, CHANNELS_LAST, BLOCK_R, BLOCK_C
    )
    o_g = i_n * groups + o_c // (channels // groups)
    b_rstd = tl.load(rstd_ptr + o_g, mask=m_c, other=0.0)
    # x + (shift - mean), then one multiply-add: folding the mean into the bias would lose |mean| / std digits.
    b_center = channel_vector(shift_ptr, i_n * channels, o_c, m_c, 0.0) - tl.load(mean_ptr + o_g, mask=m_c, other=0.0)
    b_scale = b_rstd * channel_vector(weight_ptr, 0, o_c, m_c, 1.0)
    b_bias = channel_vector(bias_ptr, 0, o_c, m_c, 0.0)
    reciprocal = reciprocal_of(scale_ptr)
    for i_row in range(0, rows, BLOCK_R):
        m_rc = (i_row + tl.arange(0, BLOCK_R) < rows)[:, None] & m_c[None, :]
        o_rc = tl.cast(i_row, tl.int64) * row_stride + o_tile
        p_x = p_tile + tl.cast(i_row, tl.int64) * x_stride
        b_x = tl.load(p_x, mask=m_rc, other=0.0).to(tl.float32)
        b_y = (b_x + b_center[None, :]) * b_scale[None, :] + b_bias[None, :]
        if SILU:
            b_y = b_y * sigmoid(b_y)
        b_y = round_result(b_y, reciprocal, x_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
        tl.store(y_ptr + o_rc, b_y, mask=m_rc)


@triton.jit
def _load_dz(dy_ptr, x_ptr, o_rc, m_rc, b_center, b_rstd, b_weight, b_bias, SILU: tl.constexpr):
    """dz = dy act'(z) and xh of one tile; both are zero where masked."""
    b_dz = tl.load(dy_ptr + o_rc, mask=m_rc, other=0.0).to(tl.float32)
    b_x = tl.load(x_ptr + o_rc, mask=m_rc, other=0.0).to(tl.float32)
    b_xh = tl.where(m_rc, (b_x + b_center[None, :]) * b_rstd[None, :], 0.0)
    if SILU:
        b_dz = b_dz * silu_grad(b_xh * b_weight[None, :] + b_bias[None, :])
    return b_dz, b_xh


@triton.jit
def group_norm_silu_bwd_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, sums_ptr,
    channels, hw, groups, chunk, num_chunks,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum(dz), sum(dz xh) and sum(xh) of every channel over one chunk of rows."""
    i_chunk = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    rows = tl.minimum(hw - i_chunk * chunk, chunk).to(tl.int32)
    o_tile, row_stride = tile_offsets(i_n, i_chunk * chunk, o_c, channels, hw, CHANNELS_LAST, BLOCK_R)
    o_g = i_n * groups + o_c // (channels // groups)
    b_rstd = tl.load(rstd_ptr + o_g, mask=m_c, other=0.0)
    b_center = channel_vector(shift_ptr, i_n * channels, o_c, m_c, 0.0) - tl.load(mean_ptr + o_g, mask=m_c, other=0.0)
    b_weight = channel_vector(weight_ptr, 0, o_c, m_c, 1.0)
    b_bias = channel_vector(bias_ptr, 0, o_c, m_c, 0.0)

    b_sum_dz = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_sum_dz_xh = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_sum_xh = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_row in range(0, rows, BLOCK_R):
        m_rc = (i_row + tl.arange(0, BLOCK_R) < rows)[:, None] & m_c[None, :]
        o_rc = tl.cast(i_row, tl.int64) * row_stride + o_tile
        b_dz, b_xh = _load_dz(dy_ptr, x_ptr, o_rc, m_rc, b_center, b_rstd, b_weight, b_bias, SILU)
        b_sum_dz += b_dz
        b_sum_dz_xh += b_dz * b_xh
        b_sum_xh += b_xh

    plane = tl.num_programs(2).to(tl.int64) * num_chunks * channels
    o_out = (i_n * num_chunks + i_chunk) * channels + o_c
    tl.store(sums_ptr + o_out, tl.sum(b_sum_dz, 0), mask=m_c)
    tl.store(sums_ptr + plane + o_out, tl.sum(b_sum_dz_xh, 0), mask=m_c)
    tl.store(sums_ptr + 2 * plane + o_out, tl.sum(b_sum_xh, 0), mask=m_c)


@triton.jit
def group_norm_silu_bwd_finalize_kernel(
    sums_ptr, weight_ptr, rstd_ptr, group_sums_ptr, dweight_ptr, dbias_ptr, dshift_ptr,
    n, channels, hw, groups, num_chunks,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One group over all samples: S1 and S2 per sample, dw and db of its channels, dshift."""
    i_g = tl.program_id(0)
    group_channels = channels // groups
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < group_channels
    o_ch = i_g * group_channels + o_c
    b_weight = channel_vector(weight_ptr, 0, o_ch, m_c, 1.0)
    plane = tl.cast(n, tl.int64) * num_chunks * channels
    inv_count = 1.0 / (tl.cast(group_channels, tl.float32) * hw)
    b_dweight = tl.zeros([BLOCK_C], tl.float32)
    b_dbias = tl.zeros([BLOCK_C], tl.float32)
    for i_n in range(0, n):
        base = tl.cast(i_n, tl.int64) * num_chunks * channels
        b_dz = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        b_dz_xh = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        b_xh = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        for i_k in range(0, num_chunks, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_kc = (o_k < num_chunks)[:, None] & m_c[None, :]
            p_kc = sums_ptr + base + o_k[:, None].to(tl.int64) * channels + o_ch[None, :]
            b_dz += tl.load(p_kc, mask=m_kc, other=0.0)
            b_dz_xh += tl.load(p_kc + plane, mask=m_kc, other=0.0)
            b_xh += tl.load(p_kc + 2 * plane, mask=m_kc, other=0.0)
        c_dz = tl.sum(b_dz, 0)
        c_dz_xh = tl.sum(b_dz_xh, 0)
        b_dbias += c_dz
        b_dweight += c_dz_xh
        s1 = tl.sum(c_dz * b_weight, 0) * inv_count
        s2 = tl.sum(c_dz_xh * b_weight, 0) * inv_count
        tl.store(group_sums_ptr + (tl.cast(i_n, tl.int64) * groups + i_g) * 2, s1)
        tl.store(group_sums_ptr + (tl.cast(i_n, tl.int64) * groups + i_g) * 2 + 1, s2)
        if dshift_ptr is not None:
            rstd = tl.load(rstd_ptr + tl.cast(i_n, tl.int64) * groups + i_g)
            c_dshift = rstd * (b_weight * c_dz - s1 * hw - s2 * tl.sum(b_xh, 0))
            p_dshift = dshift_ptr + tl.cast(i_n, tl.int64) * channels + o_ch
            tl.store(p_dshift, round_to(c_dshift, dshift_ptr.dtype.element_ty), mask=m_c)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + o_ch, round_to(b_dweight, dweight_ptr.dtype.element_ty), mask=m_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_ch, round_to(b_dbias, dbias_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def group_norm_silu_dx_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, group_sums_ptr, dx_ptr,
    channels, hw, groups, chunk,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(2).to(tl.int64)
    i_chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # last rows first: still in L2
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    rows = tl.minimum(hw - i_chunk * chunk, chunk).to(tl.int32)
    o_tile, row_stride = tile_offsets(i_n, i_chunk * chunk, o_c, channels, hw, CHANNELS_LAST, BLOCK_R)
    o_g = i_n * groups + o_c // (channels // groups)
    b_rstd = tl.load(rstd_ptr + o_g, mask=m_c, other=0.0)
    b_center = channel_vector(shift_ptr, i_n * channels, o_c, m_c, 0.0) - tl.load(mean_ptr + o_g, mask=m_c, other=0.0)
    b_weight = channel_vector(weight_ptr, 0, o_c, m_c, 1.0)
    b_bias = channel_vector(bias_ptr, 0, o_c, m_c, 0.0)
    b_s1 = tl.load(group_sums_ptr + 2 * o_g, mask=m_c, other=0.0)
    b_s2 = tl.load(group_sums_ptr + 2 * o_g + 1, mask=m_c, other=0.0)
    for i_row in range(0, rows, BLOCK_R):
        m_rc = (i_row + tl.arange(0, BLOCK_R) < rows)[:, None] & m_c[None, :]
        o_rc = tl.cast(i_row, tl.int64) * row_stride + o_tile
        b_dz, b_xh = _load_dz(dy_ptr, x_ptr, o_rc, m_rc, b_center, b_rstd, b_weight, b_bias, SILU)
        b_dx = b_rstd[None, :] * (b_weight[None, :] * b_dz - b_s1[None, :] - b_xh * b_s2[None, :])
        tl.store(dx_ptr + o_rc, round_to(b_dx, dx_ptr.dtype.element_ty), mask=m_rc)


def _layout(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """x made dense, and whether it is channels-last (NCHW wins when both hold, as for one channel or one pixel)."""
    if x.is_contiguous():
        return x, False
    return x.contiguous(memory_format=torch.channels_last), True


def _geometry(
    x: torch.Tensor, channels_last: bool, skip_channels: int = 0
) -> tuple[int, int, int, KernelConfig, tuple[int, int, int]]:
    n, x_channels, height, width = x.shape
    channels, hw = x_channels + skip_channels, height * width
    config = pick_config(
        "group_norm_silu", (n, channels, hw), x.dtype, channels_last=channels_last, skip_channels=skip_channels
    )
    grid = (triton.cdiv(hw, config.rows_per_program), triton.cdiv(channels, config.block_cols), n)
    return n, channels, hw, config, grid


def _merge_tile(group_channels: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_C) of the kernels that merge partial sums: about 2048 of them at a time."""
    block_c = next_power_of_2(group_channels)
    return max(1, 2048 // block_c), block_c


def group_norm_silu_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
    scale_y: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd): y of x's dtype and memory format, (N, C, H, W); mean and rstd (N, num_groups) fp32.

    x: (N, C, H, W), fp32, bf16 or fp16, contiguous or channels_last; weight, bias: (C,) of x's dtype or fp32, or None;
    shift: (N, C) of x's dtype, or None; activation is none or silu. With scale_y, fp32 of one element, y is
    float8_e4m3fn. With skip, (N, C2, H, W) of x's dtype, C counts its channels too, which come after x's; both are
    channels_last then, with multiples of 16 channels.
    """
    x, channels_last = _layout(x)
    skip_channels = 0 if skip is None else skip.shape[1]
    n, channels, hw, config, grid = _geometry(x, channels_last, skip_channels)
    y = torch.empty(
        (n, channels, *x.shape[2:]), dtype=x.dtype if scale_y is None else torch.float8_e4m3fn, device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
    mean = x.new_empty((n, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    shift = None if shift is None else shift.contiguous()
    chunk, num_chunks = config.rows_per_program, grid[0]
    partials = x.new_empty((2, n, num_chunks, channels), dtype=torch.float32)
    tile = {"CHANNELS_LAST": channels_last, "BLOCK_R": config.block_rows, "BLOCK_C": config.block_cols}
    group_norm_silu_moments_kernel[grid](
        x, skip, shift, partials[0], partials[1], channels, skip_channels, hw, chunk, num_chunks,
        **tile, **config.options(),
    )  # fmt: skip
    block_k, block_c = _merge_tile(channels // num_groups)
    # One program per sample and group, a few dozen: registers cost no occupancy, and at 128 Triton 3.6 spills on sm_89.
    group_norm_silu_stats_kernel[(num_groups, n)](
        partials[0], partials[1], mean, rstd, channels, hw, num_groups, chunk, num_chunks, eps,
        BLOCK_K=block_k, BLOCK_C=block_c, **config.options(max_registers=160),
    )  # fmt: skip
    group_norm_silu_apply_kernel[grid](
        x, skip, weight, bias, shift, mean, rstd, scale_y, written(y), channels, skip_channels, hw, num_groups, chunk,
        SILU=activation == "silu", **tile, **config.options(),
    )  # fmt: skip
    return y, mean, rstd


def group_norm_silu_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias, dshift), None where `needs` is False; dtypes and shapes those of x, weight, bias, shift.

    mean and rstd are the forward's; nothing that was saved is written to.
    """
    x, channels_last = _layout(x)
    dy = dy.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    n, channels, hw, config, grid = _geometry(x, channels_last)
    dx = torch.empty_like(x) if needs[0] else None
    dweight = torch.empty_like(weight) if needs[1] and weight is not None else None
    dbias = torch.empty_like(bias) if needs[2] and bias is not None else None
    dshift = x.new_empty((n, channels)) if needs[3] and shift is not None else None
    if x.numel() == 0:
        grads = [None if g is None else g.zero_() for g in (dx, dweight, dbias, dshift)]
        return grads[0], grads[1], grads[2], grads[3]
    shift = None if shift is None else shift.contiguous()
    num_chunks = grid[0]
    sums = x.new_empty((3, n, num_chunks, channels), dtype=torch.float32)
    group_sums = x.new_empty((n, num_groups, 2), dtype=torch.float32)
    flags = {
        "SILU": activation == "silu", "CHANNELS_LAST": channels_last,
        "BLOCK_R": config.block_rows, "BLOCK_C": config.block_cols,
    }  # fmt: skip
    shape = (channels, hw, num_groups, config.rows_per_program)
    group_norm_silu_bwd_sums_kernel[grid](
        dy, x, weight, bias, shift, mean, rstd, sums, *shape, num_chunks, **flags, **config.options(max_registers=160)
    )  # fmt: skip
    block_k, block_c = _merge_tile(channels // num_groups)
    group_norm_silu_bwd_finalize_kernel[(num_groups,)](
        sums, weight, rstd, group_sums, dweight, dbias, dshift, n, channels, hw, num_groups, num_chunks,
        BLOCK_K=block_k, BLOCK_C=block_c, **config.options(max_registers=128),
    )  # fmt: skip
    if dx is not None:
        group_norm_silu_dx_kernel[grid](
            dy, x, weight, bias, shift, mean, rstd, group_sums, dx, *shape, **flags, **config.options()
        )  # fmt: skip
    return dx, dweight, dbias, dshift
