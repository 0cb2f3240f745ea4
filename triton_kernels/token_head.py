# SPDX-License-Identifier: Apache-2.0
"""token_head: logit[l] = sum over channels of direction (residual + LeakyReLU(GroupNorm(hidden))) + offset.

Formula   z = xh w + b, a = z where z > 0, else SLOPE z. Backward with e = direction dlogit: dresidual = e,
          dz = e or SLOPE e, dhidden as GroupNorm's from dz, ddirection = sum over tokens of dlogit (residual + a).
Grid      (groups, samples) in both directions: a group of 8 channels and 257 to 1370 tokens lies in one piece and is
          one program's. Forward: its share of every logit, which a second kernel adds up over the groups, in order.
Registers a tile of the group's channels x tokens; the group passes three times, in the backward twice.
Bytes     hidden and residual read (again from L1 or L2), and the shares, 4 bytes a group and token, written and read:
          at 8 channels of 16 bits an eighth of that. Backward the same two and both gradients. The sum of the two, and
          its 64 channels of projection, are never in memory.
Wrong     for groups of many channels and tokens, which have few programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._config import next_power_of_2
from ._math import round_to

# Of the leaky ReLU.
_SLOPE = tl.constexpr(0.2)
# Elements of a tile: 16 floats for each thread of 4 warps.
_TILE = 2048


@triton.jit
def _load(ptr, i_l, o_c, m_c, length, BLOCK_L: tl.constexpr):
    """Offsets of the tile [channels, tokens] of a group from token i_l on, its mask, and it in fp32."""
    o_l = i_l + tl.arange(0, BLOCK_L)
    m_cl = m_c[:, None] & (o_l < length)[None, :]
    o_cl = o_c[:, None] * length + o_l[None, :]
    return o_cl, m_cl, tl.load(ptr + o_cl, mask=m_cl, other=0.0).to(tl.float32)


@triton.jit
def _vector(ptr, o_c, m_c):
    return tl.load(ptr + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def token_head_fwd_kernel(
    hidden_ptr, residual_ptr, weight_ptr, bias_ptr, direction_ptr, shares_ptr, mean_ptr, rstd_ptr,
    group_channels, length, eps, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """mean and rstd of a group, and its share of the logit of every token."""
    i_g = tl.program_id(0)
    i_ng = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_g
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < group_channels
    first = i_ng * group_channels  # channel of the sample
    hidden_ptr += first * length
    residual_ptr += first * length
    count = tl.cast(group_channels, tl.float32) * length
    b_sum = tl.zeros([BLOCK_C], tl.float32)
    for i_l in range(0, length, BLOCK_L):
        _, _, b_x = _load(hidden_ptr, i_l, o_c, m_c, length, BLOCK_L)
        b_sum += tl.sum(b_x, 1)
    mean = tl.sum(b_sum, 0) / count
    b_rest = tl.zeros([BLOCK_C], tl.float32)
    b_m2 = tl.zeros([BLOCK_C], tl.float32)
    for i_l in range(0, length, BLOCK_L):
        _, m_cl, b_x = _load(hidden_ptr, i_l, o_c, m_c, length, BLOCK_L)
        b_d = tl.where(m_cl, b_x - mean, 0.0)
        b_rest += tl.sum(b_d, 1)
        b_m2 += tl.sum(b_d * b_d, 1)
    rest = tl.sum(b_rest, 0) / count  # what the rounding of the mean left over
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(tl.sum(b_m2, 0) / count - rest * rest, 0.0) + eps)
    mean += rest
    tl.store(mean_ptr + i_ng, mean)
    tl.store(rstd_ptr + i_ng, rstd)
    b_scale = rstd * _vector(weight_ptr, i_g * group_channels + o_c, m_c)
    b_bias = _vector(bias_ptr, i_g * group_channels + o_c, m_c)
    b_direction = _vector(direction_ptr, first + o_c, m_c)
    for i_l in range(0, length, BLOCK_L):
        _, _, b_x = _load(hidden_ptr, i_l, o_c, m_c, length, BLOCK_L)
        _, _, b_residual = _load(residual_ptr, i_l, o_c, m_c, length, BLOCK_L)
        b_z = (b_x - mean) * b_scale[:, None] + b_bias[:, None]
        b_total = b_residual + tl.where(b_z > 0.0, b_z, b_z * _SLOPE)
        o_l = i_l + tl.arange(0, BLOCK_L)
        tl.store(shares_ptr + i_ng * length + o_l, tl.sum(b_direction[:, None] * b_total, 0), mask=o_l < length)


@triton.jit
def token_head_merge_kernel(
    shares_ptr, offset_ptr, logits_ptr, groups, length, BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr
):
    """The sum over the groups, in order, and the offset."""
    i_n = tl.program_id(1).to(tl.int64)
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < length
    b_sum = tl.zeros([BLOCK_G, BLOCK_L], tl.float32)
    for i_g in range(0, groups, BLOCK_G):
        o_g = i_g + tl.arange(0, BLOCK_G)
        p_gl = shares_ptr + (i_n * groups + o_g.to(tl.int64)[:, None]) * length + o_l[None, :]
        b_sum += tl.load(p_gl, mask=(o_g < groups)[:, None] & m_l[None, :], other=0.0)
    b_logits = tl.sum(b_sum, 0) + tl.load(offset_ptr + i_n).to(tl.float32)
    tl.store(logits_ptr + i_n * length + o_l, b_logits, mask=m_l)


@triton.jit
def token_head_bwd_kernel(
    hidden_ptr, residual_ptr, weight_ptr, bias_ptr, direction_ptr, dlogits_ptr, mean_ptr, rstd_ptr, dhidden_ptr,
    dresidual_ptr, ddirection_ptr, partials_ptr, group_channels, length, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A group's dhidden, dresidual and ddirection, and its sums of dz xh and dz: partials[2, samples, channels]."""
    i_g = tl.program_id(0)
    i_n = tl.program_id(1).to(tl.int64)
    i_ng = i_n * tl.num_programs(0) + i_g
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < group_channels
    first = i_ng * group_channels
    start = first * length
    mean = tl.load(mean_ptr + i_ng)
    rstd = tl.load(rstd_ptr + i_ng)
    b_weight = _vector(weight_ptr, i_g * group_channels + o_c, m_c)
    b_bias = _vector(bias_ptr, i_g * group_channels + o_c, m_c)
    b_direction = _vector(direction_ptr, first + o_c, m_c)
    b_dweight = tl.zeros([BLOCK_C], tl.float32)
    b_dbias = tl.zeros([BLOCK_C], tl.float32)
    b_ddirection = tl.zeros([BLOCK_C], tl.float32)
    for i_l in range(0, length, BLOCK_L):
        _, m_cl, b_x = _load(hidden_ptr + start, i_l, o_c, m_c, length, BLOCK_L)
        o_l = i_l + tl.arange(0, BLOCK_L)
        b_dlogits = tl.load(dlogits_ptr + i_n * length + o_l, mask=o_l < length, other=0.0)[None, :]
        b_xh = tl.where(m_cl, (b_x - mean) * rstd, 0.0)
        b_z = b_xh * b_weight[:, None] + b_bias[:, None]
        b_dz = b_direction[:, None] * b_dlogits  # zero where masked, as both of its factors
        b_dz = tl.where(b_z > 0.0, b_dz, b_dz * _SLOPE)
        b_dweight += tl.sum(b_dz * b_xh, 1)
        b_dbias += tl.sum(b_dz, 1)
        if ddirection_ptr is not None:
            _, _, b_residual = _load(residual_ptr + start, i_l, o_c, m_c, length, BLOCK_L)
            b_ddirection += tl.sum(b_dlogits * (b_residual + tl.where(b_z > 0.0, b_z, b_z * _SLOPE)), 1)
    if ddirection_ptr is not None:
        tl.store(ddirection_ptr + first + o_c, round_to(b_ddirection, ddirection_ptr.dtype.element_ty), mask=m_c)
    if partials_ptr is not None:
        plane = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * group_channels
        tl.store(partials_ptr + first + o_c, b_dweight, mask=m_c)
        tl.store(partials_ptr + plane + first + o_c, b_dbias, mask=m_c)
    count = tl.cast(group_channels, tl.float32) * length
    s1 = tl.sum(b_weight * b_dbias, 0) / count
    s2 = tl.sum(b_weight * b_dweight, 0) / count
    for i_l in range(0, length, BLOCK_L):
        o_cl, m_cl, b_x = _load(hidden_ptr + start, i_l, o_c, m_c, length, BLOCK_L)
        o_l = i_l + tl.arange(0, BLOCK_L)
        b_dlogits = tl.load(dlogits_ptr + i_n * length + o_l, mask=o_l < length, other=0.0)[None, :]
        b_dtotal = b_direction[:, None] * b_dlogits
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + start + o_cl, round_to(b_dtotal, dresidual_ptr.dtype.element_ty), mask=m_cl)
        if dhidden_ptr is not None:
            b_xh = (b_x - mean) * rstd
            b_z = b_xh * b_weight[:, None] + b_bias[:, None]
            b_dz = tl.where(b_z > 0.0, b_dtotal, b_dtotal * _SLOPE)
            b_dx = rstd * (b_weight[:, None] * b_dz - s1 - b_xh * s2)
            tl.store(dhidden_ptr + start + o_cl, round_to(b_dx, dhidden_ptr.dtype.element_ty), mask=m_cl)


def _cut(group_channels: int, length: int) -> dict[str, int | bool]:
    """Constants and options of the kernels that own a group."""
    block_c = next_power_of_2(group_channels)
    block_l = min(next_power_of_2(length), max(1, _TILE // block_c))
    return {"BLOCK_C": block_c, "BLOCK_L": block_l, "num_warps": 4, "enable_fp_fusion": True, "maxnreg": 168}


def token_head_fwd(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    direction: torch.Tensor,
    offset: torch.Tensor,
    num_groups: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits (N, L), mean and rstd (N, G)), fp32.

    hidden, residual: (N, C, L) of fp32, bf16 or fp16, contiguous, at most 1024 channels a group; weight and bias (C,),
    direction (N, C) and offset (N,) of that dtype or fp32.
    """
    n, channels, length = hidden.shape
    logits, mean = (hidden.new_empty((n, size), dtype=torch.float32) for size in (length, num_groups))
    rstd = torch.empty_like(mean)
    if n == 0:
        return logits, mean, rstd
    shares = hidden.new_empty((n, num_groups, length), dtype=torch.float32)
    group_channels = channels // num_groups
    token_head_fwd_kernel[(num_groups, n)](
        hidden, residual, weight, bias, direction, shares, mean, rstd, group_channels, length, eps,
        **_cut(group_channels, length),
    )  # fmt: skip
    token_head_merge_kernel[(triton.cdiv(length, 64), n)](
        shares, offset, logits, num_groups, length, BLOCK_G=16, BLOCK_L=64, num_warps=4, enable_fp_fusion=True
    )
    return logits, mean, rstd


def token_head_bwd(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    direction: torch.Tensor,
    offset: torch.Tensor,
    dlogits: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients like the first six arguments, None where `needs` is False; dlogits: (N, L) fp32, contiguous."""
    n, channels, length = hidden.shape
    dhidden, dresidual, ddirection = (
        torch.empty_like(t) if need else None
        for t, need in ((hidden, needs[0]), (residual, needs[1]), (direction, needs[4]))
    )
    # Sums of a few rows each, which PyTorch makes in a fixed order too.
    doffset = dlogits.sum(1).to(offset.dtype) if needs[5] else None
    partials = hidden.new_empty((2, n, channels), dtype=torch.float32) if needs[2] or needs[3] else None
    if n > 0 and (any(needs[:2]) or ddirection is not None or partials is not None):
        group_channels = channels // num_groups
        token_head_bwd_kernel[(num_groups, n)](
            hidden, residual, weight, bias, direction, dlogits, mean, rstd, dhidden, dresidual, ddirection, partials,
            group_channels, length, **_cut(group_channels, length),
        )  # fmt: skip
    dweight = partials[0].sum(0).to(weight.dtype) if partials is not None and needs[2] else None
    dbias = partials[1].sum(0).to(bias.dtype) if partials is not None and needs[3] else None
    return dhidden, dresidual, dweight, dbias, ddirection, doffset
