# SPDX-License-Identifier: Apache-2.0
"""forward_diffusion: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, one timestep and one seed per sample.

Formula   noise is given, or drawn from Philox4x32-10 keyed by the sample's seed at the counter (element >> 2, stream),
          where `element` is the logical index (c*H + h)*W + w: neither batch nor memory format changes it. Four words
          make two Box-Muller pairs. Where t equals `pure_noise_at`, x_t is the noise itself. Backward: dx0 = sqrt(ab_t)
          dx_t, zero at `pure_noise_at`.
Grid      (blocks of elements, samples); with seeds a program owns BLOCK_Q groups of four consecutive logical elements.
Registers the four words of each group; coefficients are scalars of the program.
Bytes     with seeds reads 1 and writes 2 elements per element; with noise reads 2 and writes 1; backward 1 and 1.
Wrong     for wide channels-last tensors with seeds: a group of four neighbours in W is then four scattered stores.
          Latents (4 to 16 channels) are what it is for.

A timestep outside the schedule yields NaN instead of reading out of bounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._config import pick_config
from ._math import box_muller, philox4x32, round_to


@triton.jit
def _coefficients(alphas_cumprod_ptr, t, num_timesteps, pure_noise_at):
    """sqrt(ab_t) and sqrt(1 - ab_t) in fp32; (0, 1) at pure_noise_at, NaN outside the schedule."""
    valid = (t >= 0) & (t < num_timesteps)
    ab = tl.load(alphas_cumprod_ptr + t, mask=valid, other=float("nan")).to(tl.float32)
    pure = valid & (t == pure_noise_at)
    signal = tl.where(pure, 0.0, tl.sqrt_rn(ab))
    sigma = tl.where(pure, 1.0, tl.sqrt_rn(1.0 - ab))
    return signal, sigma, pure


@triton.jit
def _normals(seed, o_q, stream):
    """[BLOCK_Q, 4] standard normals in fp32 of the groups o_q (int64)."""
    mask_32 = 0xFFFFFFFF
    zero = tl.zeros(o_q.shape, tl.int64)
    r0, r1, r2, r3 = philox4x32(
        (o_q & mask_32).to(tl.uint32),
        ((o_q >> 32) & mask_32).to(tl.uint32),
        ((zero + stream) & mask_32).to(tl.uint32),
        (((zero + stream) >> 32) & mask_32).to(tl.uint32),
        ((zero + seed) & mask_32).to(tl.uint32),
        (((zero + seed) >> 32) & mask_32).to(tl.uint32),
    )
    n0, n1 = box_muller(r0, r1)
    n2, n3 = box_muller(r2, r3)
    # join() appends the new axis last, so this order makes the flattened pair (k, l) lane 2k + l.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [o_q.shape[0], 4])


@triton.jit(do_not_specialize=["stream", "pure_noise_at", "num_timesteps"])
def forward_diffusion_seeded_kernel(
    x0_ptr, alphas_cumprod_ptr, timesteps_ptr, seeds_ptr, x_t_ptr, noise_ptr,
    channels, hw, num_timesteps, stream, pure_noise_at,
    CHANNELS_LAST: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(1).to(tl.int64)
    elements = tl.cast(channels, tl.int64) * hw
    t = tl.load(timesteps_ptr + i_n)
    signal, sigma, pure = _coefficients(alphas_cumprod_ptr, t, num_timesteps, pure_noise_at)
    o_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    element_ty = noise_ptr.dtype.element_ty
    b_noise = round_to(_normals(tl.load(seeds_ptr + i_n), o_q, tl.cast(stream, tl.int64)), element_ty)

    o_e = o_q[:, None] * 4 + tl.arange(0, 4)[None, :]
    m_e = o_e < elements
    if CHANNELS_LAST:
        o_mem = (o_e % hw) * channels + o_e // hw
    else:
        o_mem = o_e
    o_mem += i_n * elements
    b_x0 = tl.load(x0_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    b_mix = signal * b_x0 + sigma * b_noise.to(tl.float32)
    b_mix = tl.where(pure, b_noise.to(tl.float32), b_mix)  # 0 * x0 would let an inf or NaN of x0 through
    tl.store(noise_ptr + o_mem, b_noise, mask=m_e)
    tl.store(x_t_ptr + o_mem, round_to(b_mix, element_ty), mask=m_e)


@triton.jit(do_not_specialize=["pure_noise_at", "num_timesteps"])
def forward_diffusion_mix_kernel(
    x0_ptr, alphas_cumprod_ptr, timesteps_ptr, noise_ptr, x_t_ptr, elements, num_timesteps, pure_noise_at,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(1).to(tl.int64)
    t = tl.load(timesteps_ptr + i_n)
    signal, sigma, pure = _coefficients(alphas_cumprod_ptr, t, num_timesteps, pure_noise_at)
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_mem = i_n * elements + o_e
    b_x0 = tl.load(x0_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    b_noise = tl.load(noise_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    b_mix = tl.where(pure, b_noise, signal * b_x0 + sigma * b_noise)
    tl.store(x_t_ptr + o_mem, round_to(b_mix, x_t_ptr.dtype.element_ty), mask=m_e)


@triton.jit(do_not_specialize=["pure_noise_at", "num_timesteps"])
def forward_diffusion_bwd_kernel(
    dx_t_ptr, alphas_cumprod_ptr, timesteps_ptr, dx0_ptr, elements, num_timesteps, pure_noise_at, BLOCK: tl.constexpr
):
    i_n = tl.program_id(1).to(tl.int64)
    t = tl.load(timesteps_ptr + i_n)
    signal, _, pure = _coefficients(alphas_cumprod_ptr, t, num_timesteps, pure_noise_at)
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_mem = i_n * elements + o_e
    b_dx_t = tl.load(dx_t_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    b_dx0 = tl.where(pure, 0.0, signal * b_dx_t)
    tl.store(dx0_ptr + o_mem, round_to(b_dx0, dx0_ptr.dtype.element_ty), mask=m_e)


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last


def forward_diffusion_fwd(
    x0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    seeds: torch.Tensor | None,
    stream: int,
    noise: torch.Tensor | None,
    pure_noise_at: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, noise), both of x0's shape, dtype and memory format.

    x0: (N, C, H, W), fp32, bf16 or fp16; alphas_cumprod: (T,) fp32; timesteps and seeds: (N,) int64; exactly one of
    seeds and noise is given.
    """
    n, channels, height, width = x0.shape
    hw = height * width
    memory_format = _memory_format(x0)
    x0 = x0.contiguous(memory_format=memory_format)
    x_t = torch.empty_like(x0)
    pure = -1 if pure_noise_at is None else pure_noise_at
    num_timesteps = alphas_cumprod.numel()
    config = pick_config("forward_diffusion", (n, channels * hw), x0.dtype)
    if noise is not None:
        noise = noise.contiguous(memory_format=memory_format)
        if x0.numel():
            block = 4 * config.block_cols
            forward_diffusion_mix_kernel[(triton.cdiv(channels * hw, block), n)](
                x0, alphas_cumprod, timesteps, noise, x_t, channels * hw, num_timesteps, pure,
                BLOCK=block, **config.options(),
            )  # fmt: skip
        return x_t, noise
    noise = torch.empty_like(x0)
    if x0.numel():
        groups = triton.cdiv(channels * hw, 4)
        forward_diffusion_seeded_kernel[(triton.cdiv(groups, config.block_cols), n)](
            x0, alphas_cumprod, timesteps, seeds, x_t, noise, channels, hw, num_timesteps, stream, pure,
            CHANNELS_LAST=memory_format == torch.channels_last, BLOCK_Q=config.block_cols, **config.options(),
        )  # fmt: skip
    return x_t, noise


def forward_diffusion_bwd(
    dx_t: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, pure_noise_at: int | None
) -> torch.Tensor:
    """dx0 = sqrt(ab_t) dx_t per sample, zero where t equals pure_noise_at; dx_t's shape, dtype and memory format."""
    n = dx_t.shape[0]
    dx_t = dx_t.contiguous(memory_format=_memory_format(dx_t))
    dx0 = torch.empty_like(dx_t)
    if dx_t.numel() == 0:
        return dx0
    elements = dx_t.numel() // n
    config = pick_config("forward_diffusion", (n, elements), dx_t.dtype)
    block = 4 * config.block_cols
    forward_diffusion_bwd_kernel[(triton.cdiv(elements, block), n)](
        dx_t, alphas_cumprod, timesteps, dx0, elements, alphas_cumprod.numel(),
        -1 if pure_noise_at is None else pure_noise_at, BLOCK=block, **config.options(),
    )  # fmt: skip
    return dx0
