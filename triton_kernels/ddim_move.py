# SPDX-License-Identifier: Apache-2.0
"""ddim_move: x_next = alpha' x0 + sigma' epsilon, and x_next noised anew, one pair of noise levels per sample.

Formula   linear in both inputs: x_next = a x_t + b output with a and b of the sample's two levels; a step from t to t
          is the identity, and an input whose coefficient is 0 is left out. x_renoised = sqrt(ab_r) x_next +
          sqrt(1 - ab_r) noise, with the noise of forward_diffusion. Backward: dx_t = a g, doutput = b g with
          g = dx_next + sqrt(ab_r) dx_renoised.
Grid      (blocks of elements, samples); with noise a program owns BLOCK_Q groups of four consecutive logical elements.
Registers one vector of each operand, the words and normals; coefficients are scalars of the program.
Bytes     reads 2 and writes 1 element per element, 2 with the noised copy; backward reads 1 (2) and writes 2.
Wrong     for wide channels-last tensors with noise: a group of four neighbours in W is then four scattered accesses.

A timestep outside the schedule yields NaN instead of reading out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl

from ._config import pick_config
from ._math import round_to
from .forward_diffusion import _coefficients, _memory_format, _normals

_PREDICTION = {"epsilon": 0, "sample": 1, "v_prediction": 2}


@triton.jit
def _root(x):
    """The square root of an fp64 scalar: a step of Newton's from the fp32 one is cheaper than an fp64 one."""
    r = tl.sqrt_rn(x.to(tl.float32))
    half = tl.where(r == 0.0, 0.0, 0.5 / r).to(tl.float64)
    r = r.to(tl.float64)
    return r + (x - r * r) * half


@triton.jit
def _level(alphas_cumprod_ptr, t, num_timesteps):
    """sqrt(ab_t) and sqrt(1 - ab_t) in fp64; (1, 0) at the clean latent, t = -1; NaN outside the schedule."""
    valid = (t >= 0) & (t < num_timesteps)
    ab = tl.load(alphas_cumprod_ptr + t, mask=valid, other=float("nan"))
    ab = tl.where(t == -1, 1.0, ab).to(tl.float64)
    return _root(ab), _root(1.0 - ab)


@triton.jit
def _move(alphas_cumprod_ptr, timesteps_ptr, next_timesteps_ptr, i_n, num_timesteps, PREDICTION: tl.constexpr):
    """The coefficients a of x_t and b of the model's output; (1, 0) for a step from t to t.

    In fp64 and rounded once: an error here is shared by every element of the sample, and b is a difference.
    """
    now = tl.load(timesteps_ptr + i_n)
    then = tl.load(next_timesteps_ptr + i_n)
    from_signal, from_sigma = _level(alphas_cumprod_ptr, now, num_timesteps)
    to_signal, to_sigma = _level(alphas_cumprod_ptr, then, num_timesteps)
    if PREDICTION == 0:
        a = to_signal / from_signal
        b = to_sigma - a * from_sigma
    elif PREDICTION == 1:
        # Without noise there is none to carry over: the undefined epsilon counts as 0. NaN stays NaN.
        clean = from_sigma == 0.0
        a = tl.where(clean, 0.0, to_sigma / tl.where(clean, 1.0, from_sigma))
        b = to_signal - a * from_signal
    else:
        a = to_signal * from_signal + to_sigma * from_sigma
        b = to_sigma * from_signal - to_signal * from_sigma
    stays = (now == then) & (now >= -1) & (now < num_timesteps)
    return tl.where(stays, 1.0, a).to(tl.float32), tl.where(stays, 0.0, b).to(tl.float32)


@triton.jit
def _scaled(factor, b_x):
    """factor * b_x, and 0 for a factor of 0 whatever b_x holds."""
    return tl.where(factor == 0.0, 0.0, factor * b_x)


@triton.jit(do_not_specialize=["num_timesteps"])
def ddim_move_kernel(
    x_t_ptr, output_ptr, alphas_cumprod_ptr, timesteps_ptr, next_timesteps_ptr, x_next_ptr, elements, num_timesteps,
    PREDICTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(1).to(tl.int64)
    a, b = _move(alphas_cumprod_ptr, timesteps_ptr, next_timesteps_ptr, i_n, num_timesteps, PREDICTION)
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_mem = i_n * elements + o_e
    b_x = tl.load(x_t_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    b_output = tl.load(output_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    tl.store(
        x_next_ptr + o_mem, round_to(_scaled(a, b_x) + _scaled(b, b_output), x_next_ptr.dtype.element_ty), mask=m_e
    )


@triton.jit(do_not_specialize=["stream", "num_timesteps"])
def ddim_move_renoise_kernel(
    x_t_ptr, output_ptr, alphas_cumprod_ptr, timesteps_ptr, next_timesteps_ptr, renoise_timesteps_ptr, seeds_ptr,
    x_next_ptr, x_renoised_ptr, channels, hw, num_timesteps, stream,
    PREDICTION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(1).to(tl.int64)
    elements = tl.cast(channels, tl.int64) * hw
    a, b = _move(alphas_cumprod_ptr, timesteps_ptr, next_timesteps_ptr, i_n, num_timesteps, PREDICTION)
    t_again = tl.load(renoise_timesteps_ptr + i_n)
    signal, sigma, _ = _coefficients(alphas_cumprod_ptr, t_again, num_timesteps, -1)
    o_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    element_ty = x_next_ptr.dtype.element_ty
    b_noise = round_to(_normals(tl.load(seeds_ptr + i_n), o_q, tl.cast(stream, tl.int64)), element_ty)

    o_e = o_q[:, None] * 4 + tl.arange(0, 4)[None, :]
    m_e = o_e < elements
    if CHANNELS_LAST:
        o_mem = (o_e % hw) * channels + o_e // hw
    else:
        o_mem = o_e
    o_mem += i_n * elements
    b_x = tl.load(x_t_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    b_output = tl.load(output_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    b_next = round_to(_scaled(a, b_x) + _scaled(b, b_output), element_ty)
    b_renoised = signal * b_next.to(tl.float32) + sigma * b_noise.to(tl.float32)
    tl.store(x_next_ptr + o_mem, b_next, mask=m_e)
    tl.store(x_renoised_ptr + o_mem, round_to(b_renoised, element_ty), mask=m_e)


@triton.jit(do_not_specialize=["num_timesteps"])
def ddim_move_bwd_kernel(
    dx_next_ptr, dx_renoised_ptr, alphas_cumprod_ptr, timesteps_ptr, next_timesteps_ptr, renoise_timesteps_ptr,
    dx_t_ptr, doutput_ptr, elements, num_timesteps,
    PREDICTION: tl.constexpr, DIRECT: tl.constexpr, NOISED: tl.constexpr, TO_X: tl.constexpr, TO_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(1).to(tl.int64)
    a, b = _move(alphas_cumprod_ptr, timesteps_ptr, next_timesteps_ptr, i_n, num_timesteps, PREDICTION)
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_mem = i_n * elements + o_e
    b_sum = tl.zeros([BLOCK], tl.float32)
    if DIRECT:
        b_sum += tl.load(dx_next_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    if NOISED:
        t_again = tl.load(renoise_timesteps_ptr + i_n)
        signal, _, _ = _coefficients(alphas_cumprod_ptr, t_again, num_timesteps, -1)
        b_sum += signal * tl.load(dx_renoised_ptr + o_mem, mask=m_e, other=0.0).to(tl.float32)
    if TO_X:
        tl.store(dx_t_ptr + o_mem, round_to(_scaled(a, b_sum), dx_t_ptr.dtype.element_ty), mask=m_e)
    if TO_OUTPUT:
        tl.store(doutput_ptr + o_mem, round_to(_scaled(b, b_sum), doutput_ptr.dtype.element_ty), mask=m_e)


def ddim_move_fwd(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
    prediction_type: str,
    renoise_timesteps: torch.Tensor | None,
    seeds: torch.Tensor | None,
    stream: int,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x_next, or (x_next, x_renoised) when renoise_timesteps and seeds are given: x_t's shape, dtype, memory format.

    x_t: (N, C, H, W), fp32, bf16 or fp16; model_output: the same shape, x_t's dtype, or bf16 or fp16 beside fp32;
    alphas_cumprod: (T,) fp32; timesteps and seeds: (N,) int64.
    """
    n, channels, height, width = x_t.shape
    hw = height * width
    memory_format = _memory_format(x_t)
    x_t = x_t.contiguous(memory_format=memory_format)
    model_output = model_output.contiguous(memory_format=memory_format)
    x_next = torch.empty_like(x_t)
    schedule = (alphas_cumprod, timesteps, next_timesteps)
    prediction, num_timesteps = _PREDICTION[prediction_type], alphas_cumprod.numel()
    config = pick_config("ddim_move", (n, channels * hw), x_t.dtype)
    if renoise_timesteps is None:
        if x_t.numel():
            block = 4 * config.block_cols
            ddim_move_kernel[(triton.cdiv(channels * hw, block), n)](
                x_t, model_output, *schedule, x_next, channels * hw, num_timesteps,
                PREDICTION=prediction, BLOCK=block, **config.options(),
            )  # fmt: skip
        return x_next
    x_renoised = torch.empty_like(x_t)
    if x_t.numel():
        groups = triton.cdiv(channels * hw, 4)
        ddim_move_renoise_kernel[(triton.cdiv(groups, config.block_cols), n)](
            x_t, model_output, *schedule, renoise_timesteps, seeds, x_next, x_renoised, channels, hw, num_timesteps,
            stream, PREDICTION=prediction, CHANNELS_LAST=memory_format == torch.channels_last,
            BLOCK_Q=config.block_cols, **config.options(),
        )  # fmt: skip
    return x_next, x_renoised


def ddim_move_bwd(
    output_like: torch.Tensor,
    dx_next: torch.Tensor | None,
    dx_renoised: torch.Tensor | None,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
    prediction_type: str,
    renoise_timesteps: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx_t, dmodel_output), None where not needed; output_like says by its dtype what dmodel_output is.

    At least one of dx_next and dx_renoised is given; both have the memory format that the results get.
    """
    given = cast(torch.Tensor, dx_next if dx_next is not None else dx_renoised)
    n = given.shape[0]
    dx_t = torch.empty_like(given) if needs[0] else None
    doutput = torch.empty_like(given, dtype=output_like.dtype) if needs[1] else None
    if given.numel() == 0 or not any(needs):
        return dx_t, doutput
    elements = given.numel() // n
    config = pick_config("ddim_move", (n, elements), given.dtype)
    block = 4 * config.block_cols
    # A pointer that the flags exclude is never used; it must only be one.
    ddim_move_bwd_kernel[(triton.cdiv(elements, block), n)](
        given if dx_next is None else dx_next, given if dx_renoised is None else dx_renoised,
        alphas_cumprod, timesteps, next_timesteps, timesteps if renoise_timesteps is None else renoise_timesteps,
        given if dx_t is None else dx_t, given if doutput is None else doutput, elements, alphas_cumprod.numel(),
        PREDICTION=_PREDICTION[prediction_type], DIRECT=dx_next is not None, NOISED=dx_renoised is not None,
        TO_X=needs[0], TO_OUTPUT=needs[1], BLOCK=block, **config.options(),
    )  # fmt: skip
    return dx_t, doutput
