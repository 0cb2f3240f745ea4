# SPDX-License-Identifier: Apache-2.0
"""Pictures in -1..1 to bytes, channels last, in plain PyTorch: ``round(255 clamp(x / 2 + 1/2, 0, 1))``.

Every step is rounded to float32 (float64 for float64), ties go to even and NaN becomes 0: for float32 that is bit for
bit what diffusers' image processor makes of a decoded picture. From 16 bits it is better, since there the processor
rounds x / 2 + 1/2 to 16 bits too, which leaves a bfloat16 picture some hundred levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sdxl_fast.reference._common import accumulation_dtype, itemsize, wrong_variants


def _scaled(x: torch.Tensor) -> torch.Tensor:
    """Values in 0..255, not yet rounded, [N,H,W,C]."""
    unit = (x.to(accumulation_dtype(x.dtype)) * 0.5 + 0.5).clamp(0, 1)
    return torch.nan_to_num(unit).permute(0, 2, 3, 1).contiguous() * 255


def fwd(x: torch.Tensor) -> torch.Tensor:
    """uint8 [N,H,W,C] of x [N,C,H,W], any float dtype."""
    return _scaled(x.detach()).round().to(torch.uint8)


def flops(shape: Sequence[int], *, backward: bool = False) -> int:
    """Operations: two to scale, two to clamp, one to scale again, one to round. There is no backward."""
    return 0 if backward else 6 * math.prod(shape)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False) -> int:
    """Least memory traffic: an element read and a byte written. There is no backward."""
    return 0 if backward else math.prod(shape) * (itemsize(dtype) + 1)


WRONG = wrong_variants(
    fwd={
        "cut_off": lambda x: _scaled(x).to(torch.uint8),
        "half_up": lambda x: (_scaled(x) + 0.5).floor().to(torch.uint8),
        "times_256": lambda x: (_scaled(x) * (256 / 255)).clamp(max=255).floor().to(torch.uint8),
        "not_clamped": lambda x: (
            ((x.float() * 0.5 + 0.5) * 255).round().permute(0, 2, 3, 1).to(torch.int64).to(torch.uint8)
        ),
        "channels_reversed": lambda x: fwd(x.flip(1)),
        "halved_in_16_bits": lambda x: fwd((x * 0.5 + 0.5).to(x.dtype).float() * 2 - 1),
    },
)
