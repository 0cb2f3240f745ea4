# SPDX-License-Identifier: Apache-2.0
"""Device helpers shared by the kernels: activations with derivatives, and the Philox generator. All in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

# Whether `triton.jit` makes interpreted functions of the kernels (TRITON_INTERPRET=1); like there, decided at import.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(b_x, dtype: tl.constexpr):
    """b_x (fp32) rounded to nearest even in `dtype`; every store of a kernel goes through here.

    On a GPU that is what `.to` does. Triton's interpreter cuts fp32 off to bf16 instead (twice the error, and a bias),
    so there the bits are rounded first and the cut is exact.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = b_x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits = (bits >> 16) << 16  # a zero must not go in as a subnormal, which the interpreter makes 2^-126
        b_x = bits.to(tl.float32, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z); tends to 0 and 1 without NaN for any finite z."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def silu_grad(z):
    """d silu / dz = s (1 + z (1 - s)) with s = sigmoid(z)."""
    s = sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def normal_cdf_fast(z, gaussian):
    """Phi(z) from gaussian = exp(-z^2 / 2), to 5e-6 of its own size at any z: for results kept in 16 bits.

    Phi(-|z|) / gaussian is a polynomial in t = 1 / (1 + 0.31 |z|), a minimax fit of the relative error on |z| <= 14.
    Half the instructions of erf, whose 1 + erf(z) also cancels for z < -2.
    """
    t = 1.0 / (1.0 + 0.31 * tl.abs(z))
    p = -0.07392895 * t + 0.18044958
    p = p * t + 0.01574603
    p = p * t + 0.13342868
    p = p * t + 0.12044170
    p = p * t + 0.12386064
    tail = p * t * gaussian
    return tl.where(z < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_and_grad(z, TANH: tl.constexpr, FAST: tl.constexpr):
    """GELU(z) and its derivative, exact (erf) or by the tanh formula; FAST where the results are kept in 16 bits.

    tanh(u) is written through the sigmoid, (1 + tanh u) / 2 = sigmoid(2u), which has no cancellation and no overflow.
    """
    if TANH:
        # 2u = 2 sqrt(2/pi) (z + 0.044715 z^3); its derivative is 2 sqrt(2/pi) (1 + 3 * 0.044715 z^2). From |z| = 20 the
        # sigmoid is exactly 0 or 1: cutting z^2 there keeps 0 * inf out of the derivative.
        z2 = tl.minimum(z * z, 400.0)
        u2 = 1.5957691216057308 * z * (1.0 + 0.044715 * z2)
        e = tl.exp(-tl.abs(u2))
        s = 1.0 / (1.0 + e)  # sigmoid(|2u|); e s is its complement, without cancellation
        cdf = tl.where(z < 0.0, e * s, s)
        value = z * cdf
        grad = cdf + z * (e * s * s) * 1.5957691216057308 * (1.0 + 0.134145 * z2)
    else:
        gaussian = tl.exp(-0.5 * z * z)
        if FAST:
            cdf = normal_cdf_fast(z, gaussian)
        else:
            cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * cdf
        grad = cdf + z * 0.3989422804014327 * gaussian
    return value, grad


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011): four uint32 words from a 128-bit counter and a 64-bit key.

    Written out rather than taken from `tl.philox`, because the counter layout is part of this package's contract:
    every backend draws the same words for the same (seed, stream, element).
    """
    for _ in tl.static_range(10):
        hi0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        hi1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        lo0 = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        lo1 = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0 = hi1 ^ c1 ^ k0
        c2 = hi0 ^ c3 ^ k1
        c1 = lo1
        c3 = lo0
        k0 = k0 + tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def cos_sin_turns(u):
    """cos(2 pi u) and sin(2 pi u) for 0 <= u <= 1.

    `tl.cos` and `tl.sin` carry a slow path for huge angles, with an array in local memory. In turns the reduction is
    exact: u = (quadrant + f) / 4 with |f| <= 1/2, then polynomials on |angle| <= pi / 4 (Cephes, single precision).
    """
    quadrant = tl.floor(4.0 * u + 0.5)
    angle = (4.0 * u - quadrant) * 1.5707963267948966
    a2 = angle * angle
    b_sin = angle + angle * a2 * (-1.6666654611e-1 + a2 * (8.3321608736e-3 - a2 * 1.9515295891e-4))
    b_cos = 1.0 - 0.5 * a2 + a2 * a2 * (4.166664568298827e-2 + a2 * (-1.388731625493765e-3 + a2 * 2.443315711809948e-5))
    q = quadrant.to(tl.int32)
    odd = (q & 1) == 1
    cos = tl.where(odd, b_sin, b_cos)
    sin = tl.where(odd, b_cos, b_sin)
    return tl.where(((q + 1) & 2) == 2, -cos, cos), tl.where((q & 2) == 2, -sin, sin)


@triton.jit
def box_muller(r0, r1):
    """Two standard normals from two uint32 words; u1 is in (0, 1], so the logarithm is finite."""
    u1 = r0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u2 = r1.to(tl.float32) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(u1))
    cos, sin = cos_sin_turns(u2)
    return radius * cos, radius * sin
