# SPDX-License-Identifier: Apache-2.0
"""disc_head: logit = mean over positions of projection . SiLU(GroupNorm(x)) + offset, and the loss of the logit.

Formula   pooled[c] = sum of y over the P positions / P with y = SiLU(xh w + b); logit = projection . pooled + offset.
          Backward with d = dlogit + dloss * slope of the loss at the logit: dy = d projection / P, then as GroupNorm's,
          dprojection = sum over samples of d pooled, doffset = sum of d.
Grid      one program a sample, in both directions: of the map that the convolutions leave (1280 channels of one
          position), a program holds all. A last small launch of the backward adds up the samples' shares of the
          parameters' gradients, in order.
Registers a tile of groups x channels of a group x positions; a larger map passes in several, three times.
Bytes     x once from memory, and from L1 twice more; backward x and dx. It is the launches that cost: one for the nine
          of PyTorch, backward two.
Wrong     for large maps of few samples, whose programs leave most of the GPU idle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._config import next_power_of_2
from ._math import round_to, sigmoid, silu_grad

# Elements of a tile: 8 floats for each thread of 8 warps, which hold all of 32 groups of 40 channels.
_TILE = 2048
# Name of the loss to its kind (0 non-saturating, 1 hinge, 2 linear) and what the logit is multiplied with first.
_LOSSES = {
    "non_saturating_real": (0, 1),
    "non_saturating_fake": (0, -1),
    "hinge_real": (1, 1),
    "hinge_fake": (1, -1),
    "hinge_student": (2, 1),
}


@triton.jit
def _softplus(v):
    """log(1 + e^v) to its last bits, also where e^v is small: the quotient takes back the rounding of 1 + e."""
    e = tl.exp(-tl.abs(v))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(v, 0.0) + log1p


@triton.jit
def _tile(
    x_ptr, i_p, o_gc, m_gc, channels, positions, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Offsets of the tile [groups, channels of a group, positions] from position i_p on, its mask, and it in fp32."""
    o_p = i_p + tl.arange(0, BLOCK_P)
    m_gcp = m_gc[:, :, None] & (o_p < positions)[None, None, :]
    if CHANNELS_LAST:
        o_gcp = o_gc[:, :, None] + o_p.to(tl.int64)[None, None, :] * channels
    else:
        o_gcp = o_gc.to(tl.int64)[:, :, None] * positions + o_p[None, None, :]
    return o_gcp, m_gcp, tl.load(x_ptr + o_gcp, mask=m_gcp, other=0.0).to(tl.float32)


@triton.jit
def _parameter(ptr, o_gc, m_gc):
    return tl.load(ptr + o_gc, mask=m_gc, other=0.0).to(tl.float32)


@triton.jit
def disc_head_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, projection_ptr, offset_ptr, logits_ptr, losses_ptr, pooled_ptr, mean_ptr, rstd_ptr,
    groups, group_channels, positions, eps, KIND: tl.constexpr, SIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    channels = groups * group_channels
    o_c = tl.arange(0, BLOCK_C)
    x_ptr += i_n * channels * positions
    count = tl.cast(group_channels, tl.float32) * positions
    b_logit = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, groups, BLOCK_G):
        o_g = first + tl.arange(0, BLOCK_G)
        m_g = o_g < groups
        o_gc = o_g[:, None] * group_channels + o_c[None, :]
        m_gc = m_g[:, None] & (o_c < group_channels)[None, :]
        b_sum = tl.zeros([BLOCK_G], tl.float32)
        for i_p in range(0, positions, BLOCK_P):
            _, _, b_x = _tile(x_ptr, i_p, o_gc, m_gc, channels, positions, CHANNELS_LAST, BLOCK_P)
            b_sum += tl.sum(tl.sum(b_x, 2), 1)
        b_mean = b_sum / count
        b_rest = tl.zeros([BLOCK_G], tl.float32)
        b_m2 = tl.zeros([BLOCK_G], tl.float32)
        for i_p in range(0, positions, BLOCK_P):
            _, m_gcp, b_x = _tile(x_ptr, i_p, o_gc, m_gc, channels, positions, CHANNELS_LAST, BLOCK_P)
            b_d = tl.where(m_gcp, b_x - b_mean[:, None, None], 0.0)
            b_rest += tl.sum(tl.sum(b_d, 2), 1)
            b_m2 += tl.sum(tl.sum(b_d * b_d, 2), 1)
        b_rest = b_rest / count  # what the rounding of the mean left over
        b_rstd = 1.0 / tl.sqrt_rn(tl.maximum(b_m2 / count - b_rest * b_rest, 0.0) + eps)
        b_mean += b_rest
        tl.store(mean_ptr + i_n * groups + o_g, b_mean, mask=m_g)
        tl.store(rstd_ptr + i_n * groups + o_g, b_rstd, mask=m_g)
        b_scale = b_rstd[:, None] * _parameter(weight_ptr, o_gc, m_gc)
        b_bias = _parameter(bias_ptr, o_gc, m_gc)
        b_pooled = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
        for i_p in range(0, positions, BLOCK_P):
            _, m_gcp, b_x = _tile(x_ptr, i_p, o_gc, m_gc, channels, positions, CHANNELS_LAST, BLOCK_P)
            b_z = (b_x - b_mean[:, None, None]) * b_scale[:, :, None] + b_bias[:, :, None]
            b_pooled += tl.sum(tl.where(m_gcp, b_z * sigmoid(b_z), 0.0), 2)
        b_pooled = b_pooled / positions
        tl.store(pooled_ptr + i_n * channels + o_gc, b_pooled, mask=m_gc)
        b_logit += tl.sum(b_pooled * _parameter(projection_ptr, o_gc, m_gc), 1)
    logit = tl.sum(b_logit, 0) + tl.load(offset_ptr).to(tl.float32)
    if KIND == 0:
        loss = _softplus(-SIGN * logit)
    elif KIND == 1:
        loss = tl.maximum(1.0 - SIGN * logit, 0.0)
    else:
        loss = -SIGN * logit
    tl.store(logits_ptr + i_n, logit)
    tl.store(losses_ptr + i_n, loss)


@triton.jit
def _arrived(logits_ptr, dlogits_ptr, dlosses_ptr, i_n, KIND: tl.constexpr, SIGN: tl.constexpr):
    """What flows back into the logit of sample i_n, by itself and through its loss."""
    total = 0.0
    if dlogits_ptr is not None:
        total += tl.load(dlogits_ptr + i_n)
    if dlosses_ptr is not None:
        signed = SIGN * tl.load(logits_ptr + i_n)
        if KIND == 0:
            slope = sigmoid(-signed)
        elif KIND == 1:
            slope = tl.where(signed < 1.0, 1.0, 0.0)
        else:
            slope = 1.0
        total -= SIGN * slope * tl.load(dlosses_ptr + i_n)
    return total


@triton.jit
def disc_head_bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, projection_ptr, mean_ptr, rstd_ptr, logits_ptr, dlogits_ptr, dlosses_ptr, dx_ptr,
    partials_ptr, arrived_ptr, groups, group_channels, positions, KIND: tl.constexpr, SIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx of a sample, what arrived at its logit, and its sums of dz xh and dz: partials[sample, 2, channels]."""
    i_n = tl.program_id(0).to(tl.int64)
    arrived = _arrived(logits_ptr, dlogits_ptr, dlosses_ptr, i_n, KIND, SIGN)
    tl.store(arrived_ptr + i_n, arrived)
    channels = groups * group_channels
    o_c = tl.arange(0, BLOCK_C)
    x_ptr += i_n * channels * positions
    count = tl.cast(group_channels, tl.float32) * positions
    for first in range(0, groups, BLOCK_G):
        o_g = first + tl.arange(0, BLOCK_G)
        m_g = o_g < groups
        o_gc = o_g[:, None] * group_channels + o_c[None, :]
        m_gc = m_g[:, None] & (o_c < group_channels)[None, :]
        b_mean = tl.load(mean_ptr + i_n * groups + o_g, mask=m_g, other=0.0)
        b_rstd = tl.load(rstd_ptr + i_n * groups + o_g, mask=m_g, other=0.0)
        b_weight = _parameter(weight_ptr, o_gc, m_gc)
        b_bias = _parameter(bias_ptr, o_gc, m_gc)
        b_dy = arrived / positions * _parameter(projection_ptr, o_gc, m_gc)
        b_dweight = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
        b_dbias = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
        for i_p in range(0, positions, BLOCK_P):
            _, m_gcp, b_x = _tile(x_ptr, i_p, o_gc, m_gc, channels, positions, CHANNELS_LAST, BLOCK_P)
            b_xh = (b_x - b_mean[:, None, None]) * b_rstd[:, None, None]
            b_dz = b_dy[:, :, None] * silu_grad(b_xh * b_weight[:, :, None] + b_bias[:, :, None])
            b_dz = tl.where(m_gcp, b_dz, 0.0)
            b_dweight += tl.sum(b_dz * b_xh, 2)
            b_dbias += tl.sum(b_dz, 2)
        if partials_ptr is not None:
            p_partials = partials_ptr + 2 * i_n * channels + o_gc
            tl.store(p_partials, b_dweight, mask=m_gc)
            tl.store(p_partials + channels, b_dbias, mask=m_gc)
        if dx_ptr is not None:
            b_s1 = tl.sum(b_weight * b_dbias, 1) / count
            b_s2 = tl.sum(b_weight * b_dweight, 1) / count
            for i_p in range(0, positions, BLOCK_P):
                o_gcp, m_gcp, b_x = _tile(x_ptr, i_p, o_gc, m_gc, channels, positions, CHANNELS_LAST, BLOCK_P)
                b_xh = (b_x - b_mean[:, None, None]) * b_rstd[:, None, None]
                b_dz = b_dy[:, :, None] * silu_grad(b_xh * b_weight[:, :, None] + b_bias[:, :, None])
                b_dx = b_weight[:, :, None] * b_dz - b_s1[:, None, None] - b_xh * b_s2[:, None, None]
                b_dx = round_to(b_rstd[:, None, None] * b_dx, dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + i_n * channels * positions + o_gcp, b_dx, mask=m_gcp)


@triton.jit
def disc_head_bwd_merge_kernel(
    partials_ptr, pooled_ptr, arrived_ptr, dweight_ptr, dbias_ptr, dprojection_ptr, doffset_ptr, samples, channels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients: the samples' shares added up, in order."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    b_dweight = tl.zeros([BLOCK], tl.float32)
    b_dbias = tl.zeros([BLOCK], tl.float32)
    b_dprojection = tl.zeros([BLOCK], tl.float32)
    total = 0.0
    for i_n in range(0, samples):
        row = tl.cast(i_n, tl.int64) * channels
        arrived = tl.load(arrived_ptr + i_n)
        total += arrived
        if partials_ptr is not None:
            b_dweight += tl.load(partials_ptr + 2 * row + o_c, mask=m_c, other=0.0)
            b_dbias += tl.load(partials_ptr + 2 * row + channels + o_c, mask=m_c, other=0.0)
        if dprojection_ptr is not None:
            b_dprojection += arrived * tl.load(pooled_ptr + row + o_c, mask=m_c, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + o_c, round_to(b_dweight, dweight_ptr.dtype.element_ty), mask=m_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_c, round_to(b_dbias, dbias_ptr.dtype.element_ty), mask=m_c)
    if dprojection_ptr is not None:
        tl.store(dprojection_ptr + o_c, round_to(b_dprojection, dprojection_ptr.dtype.element_ty), mask=m_c)
    if doffset_ptr is not None:
        o_one = tl.arange(0, 1)  # rounding wants a block
        b_total = tl.zeros([1], tl.float32) + total
        first = tl.program_id(0) + o_one == 0
        tl.store(doffset_ptr + o_one, round_to(b_total, doffset_ptr.dtype.element_ty), mask=first)


def _cut(x: torch.Tensor, groups: int) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    """(groups, channels of a group, positions), and the constants and options that the kernels over x share."""
    group_channels, positions = x.shape[1] // groups, x.shape[2] * x.shape[3]
    block_c = next_power_of_2(group_channels)
    block_p = min(next_power_of_2(positions), max(1, _TILE // block_c))
    block_g = min(next_power_of_2(groups), max(1, _TILE // (block_c * block_p)))
    return (groups, group_channels, positions), {
        "CHANNELS_LAST": not x.is_contiguous(),
        "BLOCK_G": block_g,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "num_warps": 8,
        "enable_fp_fusion": True,
        "maxnreg": 168,  # left alone, ptxas would rather have 64 and spill
    }


def disc_head_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
    offset: torch.Tensor,
    num_groups: int,
    eps: float,
    loss: str,
) -> tuple[torch.Tensor, ...]:
    """(logits (N,), losses (N,), pooled (N, C), mean and rstd (N, G)), all fp32.

    x: (N, C, H, W) of fp32, bf16 or fp16, contiguous or channels_last, at most 1024 channels a group; weight, bias and
    projection: (C,), offset: (1,), of x's dtype or fp32.
    """
    n, channels = x.shape[:2]
    logits, pooled, mean = (x.new_empty(s, dtype=torch.float32) for s in ((n,), (n, channels), (n, num_groups)))
    losses, rstd = torch.empty_like(logits), torch.empty_like(mean)
    if n > 0:
        sizes, constants = _cut(x, num_groups)
        kind, sign = _LOSSES[loss]
        disc_head_fwd_kernel[(n,)](
            x, weight, bias, projection, offset, logits, losses, pooled, mean, rstd, *sizes, eps, KIND=kind, SIGN=sign,
            **constants,
        )  # fmt: skip
    return logits, losses, pooled, mean, rstd


def disc_head_bwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
    offset: torch.Tensor,
    dlogits: torch.Tensor | None,
    dlosses: torch.Tensor | None,
    logits: torch.Tensor,
    pooled: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    loss: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients like the first five arguments, None where `needs` is False; dlogits, dlosses: (N,) fp32 or None."""
    n, channels = x.shape[:2]
    found = tuple(
        torch.empty_like(t) if need else None
        for t, need in zip((x, weight, bias, projection, offset), needs, strict=True)
    )
    if n == 0:
        return found[0], *(None if t is None else t.zero_() for t in found[1:])
    sizes, constants = _cut(x, num_groups)
    kind, sign = _LOSSES[loss]
    arrived = torch.empty_like(logits)
    partials = x.new_empty((n, 2, channels), dtype=torch.float32) if needs[1] or needs[2] else None
    disc_head_bwd_kernel[(n,)](
        x, weight, bias, projection, mean, rstd, logits, dlogits, dlosses, found[0], partials, arrived, *sizes,
        KIND=kind, SIGN=sign, **constants,
    )  # fmt: skip
    if any(needs[1:]):
        disc_head_bwd_merge_kernel[(triton.cdiv(channels, 128),)](
            partials, pooled, arrived, *found[1:], n, channels, BLOCK=128, num_warps=4, enable_fp_fusion=True
        )
    return found
