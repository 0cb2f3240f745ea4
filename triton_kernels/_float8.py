# SPDX-License-Identifier: Apache-2.0
"""Writing float8_e4m3fn: rounding on the device, and what a launcher hands over to be written to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._attention_config import target_of
from ._math import INTERPRETED, round_to

_CONVERTS = 89  # the first architecture with an instruction for it, and the first that Triton has the type on


@triton.jit
def e4m3_bits(b_x):
    """b_x (fp32) as the bits of a float8_e4m3fn: to nearest even, at most 448 in magnitude, NaN as NaN."""
    bits = b_x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    capped = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = (capped + 0x7FFFF + ((capped >> 20) & 1) - (120 << 23)) >> 20
    # Adding 2^14 leaves a subnormal result in units of 2^-9, rounded to even by the addition itself.
    subnormal = (capped.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(capped < (121 << 23), subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def reciprocal_of(scale_ptr):
    """1 / scale, or 1 where there is none."""
    if scale_ptr is not None:
        return tl.div_rn(1.0, tl.load(scale_ptr))
    return 1.0


@triton.jit
def round_result(b_y, reciprocal, dtype: tl.constexpr, written: tl.constexpr):
    """b_y (fp32) rounded to `dtype`; if `written` is float8, or bytes that stand for it, that times `reciprocal`."""
    b_y = round_to(b_y, dtype)
    if written == tl.uint8:
        return e4m3_bits(b_y.to(tl.float32) * reciprocal)
    if written == tl.float8e4nv:
        b_y = tl.clamp(b_y.to(tl.float32) * reciprocal, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return b_y.to(written)


def written(y: torch.Tensor) -> torch.Tensor:
    """y as a kernel writes it: float8 as bytes where the GPU, or the interpreter, cannot convert to it."""
    if y.dtype != torch.float8_e4m3fn or (target_of(y).arch >= _CONVERTS and not INTERPRETED.value):
        return y
    return y.view(torch.uint8)
