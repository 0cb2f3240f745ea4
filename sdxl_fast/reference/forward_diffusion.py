# SPDX-License-Identifier: Apache-2.0
"""The forward process x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, with counter-based noise, in plain PyTorch.

The noise of element (c, h, w) of a sample depends on that sample's seed, the stream and the logical index
``i = (c H + h) W + w`` alone, never on the batch or the memory format: Philox4x32-10 (Salmon et al., SC'11) with
key = the two halves of the seed and counter = the two halves of ``i >> 2`` and of the stream gives four words; words
(0, 1) and (2, 3) each make two normals by Box-Muller, and ``i & 3`` picks one of the four. In float32::

    u1 = float32(a) 2^-32 + 2^-33,   u2 = float32(b) 2^-32
    even = sqrt(-2 ln u1) cos(2 pi u2),   odd = sqrt(-2 ln u1) sin(2 pi u2)

These float32 uniforms are the definition, in float64 too. The normal is rounded to x0's dtype before it is used, so
the returned noise is the noise x_t contains. Source of the process: Ho et al. 2020, eq. 4 (arXiv:2006.11239); pure
noise at the last timestep: Lin et al. 2024, section 3.3 (arXiv:2402.13929).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sdxl_fast.reference._common import accumulation_dtype, itemsize, wrong_variants

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _mul_hi_lo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a*b for uint32 values held in int64, by halves so that nothing overflows."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor], rounds: int = _ROUNDS) -> list[torch.Tensor]:
    """Philox4x32 on uint32 values held in int64 tensors.

    Args:
        counter: four tensors that broadcast together.
        key: two tensors that broadcast with them.
        rounds: 10 is Philox4x32-10.

    Returns:
        Four int64 tensors of uint32 values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def words(seeds: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """Returns the raw words of elements 0..count-1 for each seed: int64 [len(seeds), ceil(count/4), 4]."""
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=seeds.device)
    counter = [blocks & _MASK, blocks >> 32, torch.full_like(blocks, stream & _MASK)]
    counter.append(torch.full_like(blocks, (stream >> 32) & _MASK))
    key = [(seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]]
    return torch.stack(torch.broadcast_tensors(*philox([c[None] for c in counter], key)), -1)


def _normals(raw: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """[..., 4] words -> [..., 4] normals."""
    a, b = raw[..., 0::2].to(torch.float32), raw[..., 1::2].to(torch.float32)
    u1 = (a * 2.0**-32 + 2.0**-33).to(acc)
    u2 = (b * 2.0**-32).to(acc)
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(-2)


def draw(x0: torch.Tensor, seeds: torch.Tensor, stream: int, *, lane_offset: int = 0) -> torch.Tensor:
    """Returns the noise for x0 [N,C,H,W]: its shape, dtype and memory format."""
    acc = accumulation_dtype(x0.dtype)
    count = math.prod(x0.shape[1:])
    normals = _normals(words(seeds, stream, count + lane_offset), acc).flatten(1)[:, lane_offset : lane_offset + count]
    return torch.empty_like(x0).copy_(normals.reshape(x0.shape))


def _coefficients(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, acc: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    ab = alphas_cumprod.to(acc)[timesteps][:, None, None, None]
    return ab.sqrt(), (1 - ab).sqrt()


def _mix(
    x0: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    pure_noise_at: int | None,
) -> torch.Tensor:
    acc = accumulation_dtype(x0.dtype)
    signal, sigma = _coefficients(alphas_cumprod, timesteps, acc)
    x_t = (signal * x0.to(acc) + sigma * noise.to(acc)).to(x0.dtype)
    if pure_noise_at is None:
        return x_t
    return torch.where((timesteps == pure_noise_at)[:, None, None, None], noise, x_t)


def fwd(
    x0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    seeds: torch.Tensor | None,
    stream: int,
    noise: torch.Tensor | None,
    pure_noise_at: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, differentiable in x0.

    Args:
        x0: [N,C,H,W], any float dtype.
        alphas_cumprod: [T].
        timesteps: int64 [N], 0 <= t < T.
        seeds: int64 [N], or None when ``noise`` is given.
        stream: which draw of each seed.
        noise: like x0, or None when ``seeds`` are given.
        pure_noise_at: timestep at which x_t is the noise exactly, or None.

    Returns:
        x_t and the noise in it (the tensor given, when it was given), both like x0.
    """
    if noise is None:
        if seeds is None:
            raise ValueError("exactly one of seeds and noise must be given, got neither")
        noise = draw(x0.detach(), seeds, stream)
    return _mix(x0, noise, alphas_cumprod, timesteps, pure_noise_at), noise


def bwd(
    dx_t: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, pure_noise_at: int | None
) -> torch.Tensor:
    """Gradient of x_t with respect to x0, sqrt(ab_t) dx_t; zero where x_t is pure noise. Differentiable in dx_t."""
    acc = accumulation_dtype(dx_t.dtype)
    dx0 = (_coefficients(alphas_cumprod, timesteps, acc)[0] * dx_t.to(acc)).to(dx_t.dtype)
    if pure_noise_at is None:
        return dx0
    pure = (timesteps == pure_noise_at)[:, None, None, None]
    return torch.where(pure, torch.zeros((), dtype=dx0.dtype, device=dx0.device), dx0)


def flops(shape: Sequence[int], *, backward: bool = False, draws: bool = True) -> int:
    """Operations for x0 of ``shape``; an element of a draw costs a quarter of ten Philox rounds and a Box-Muller."""
    return math.prod(shape) * (1 if backward else 3 + (30 if draws else 0))


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False, draws: bool = True) -> int:
    """Least memory traffic: x0 read, x_t written, noise written or read; backward one read and one write."""
    del draws  # drawn noise is written, given noise is read: the same count
    return math.prod(shape) * itemsize(dtype) * (2 if backward else 3)


def _wrong_lane(
    x0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    seeds: torch.Tensor | None,
    stream: int,
    noise: torch.Tensor | None,
    pure_noise_at: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if noise is None and seeds is not None:
        noise = draw(x0, seeds, stream, lane_offset=1)
    return fwd(x0, alphas_cumprod, timesteps, None, stream, noise, pure_noise_at)


def _swapped_coefficients(
    x0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    seeds: torch.Tensor | None,
    stream: int,
    noise: torch.Tensor | None,
    pure_noise_at: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return fwd(x0, 1 - alphas_cumprod, timesteps, seeds, stream, noise, pure_noise_at)


WRONG = wrong_variants(
    fwd={
        "shifted_lane": _wrong_lane,
        "swapped_coefficients": _swapped_coefficients,
        "never_pure_noise": lambda x0, ab, t, seeds, stream, noise, pure: fwd(x0, ab, t, seeds, stream, noise, None),
        "stream_ignored": lambda x0, ab, t, seeds, stream, noise, pure: fwd(x0, ab, t, seeds, 0, noise, pure),
    },
    bwd={
        "never_pure_noise": lambda dx_t, ab, t, pure: bwd(dx_t, ab, t, None),
        "variance_for_deviation": lambda dx_t, ab, t, pure: bwd(dx_t, ab * ab, t, pure),
    },
)
