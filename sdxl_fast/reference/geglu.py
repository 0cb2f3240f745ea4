# SPDX-License-Identifier: Apache-2.0
"""value * GELU(gate) in plain PyTorch.

``x = [value, gate]`` along the last dimension (the order of diffusers' ``GEGLU``), and GELU is either the exact
``g/2 (1 + erf(g / sqrt 2))`` or the tanh approximation. Source: Shazeer 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sdxl_fast.reference._common import accumulation_dtype, itemsize, rounded, wrong_variants

APPROXIMATIONS = ("none", "tanh")


def _gelu(gate: torch.Tensor, approximate: str) -> torch.Tensor:
    return torch.nn.functional.gelu(gate, approximate=approximate)


def _gelu_derivative(gate: torch.Tensor, approximate: str) -> torch.Tensor:
    if approximate == "tanh":
        k = math.sqrt(2 / math.pi)
        t = torch.tanh(k * (gate + 0.044715 * gate**3))
        return 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * k * (1 + 3 * 0.044715 * gate * gate)
    cdf = 0.5 * torch.erfc(-gate / math.sqrt(2))
    pdf = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    return cdf + gate * pdf


def fwd(x: torch.Tensor, approximate: str, scale_y: torch.Tensor | None = None) -> torch.Tensor:
    """Differentiable forward.

    Args:
        x: [..., 2C], any float dtype.
        approximate: ``"none"`` (erf) or ``"tanh"``.
        scale_y: float32, one element: y is then rounded once more, to float8_e4m3fn after division by it.

    Returns:
        [..., C] in x's dtype, or float8.
    """
    value, gate = x.to(accumulation_dtype(x.dtype)).chunk(2, -1)
    return rounded((value * _gelu(gate, approximate)).to(x.dtype), scale_y)


def bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """Closed-form gradient of :func:`fwd`.

    Args:
        dy: [..., C].
        x: [..., 2C] as given to :func:`fwd`.
        approximate: as given to :func:`fwd`.

    Returns:
        dx like x.
    """
    acc = accumulation_dtype(x.dtype)
    value, gate = x.to(acc).chunk(2, -1)
    dy = dy.to(acc)
    dvalue = dy * _gelu(gate, approximate)
    dgate = dy * value * _gelu_derivative(gate, approximate)
    return torch.cat((dvalue, dgate), -1).to(x.dtype)


def flops(shape: Sequence[int], *, backward: bool = False) -> int:
    """Floating-point operations for x of ``shape`` [..., 2C], a transcendental counted as one."""
    return math.prod(shape) // 2 * (14 if backward else 5)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False) -> int:
    """Least memory traffic: 2C read and C written per row; backward C + 2C read and 2C written."""
    return math.prod(shape) // 2 * itemsize(dtype) * (5 if backward else 3)


def _swapped(x: torch.Tensor, approximate: str, scale_y: None) -> torch.Tensor:
    return fwd(torch.cat(tuple(reversed(x.chunk(2, -1))), -1), approximate)


def _other(approximate: str) -> str:
    return "tanh" if approximate == "none" else "none"


def _gate_without_density(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    value, gate = x.chunk(2, -1)
    dvalue = bwd(dy, x, approximate).chunk(2, -1)[0]
    return torch.cat((dvalue, dy * value * torch.special.ndtr(gate.float()).to(x.dtype)), -1)


WRONG = wrong_variants(
    fwd={
        "swapped_halves": _swapped,
        "other_approximation": lambda x, approximate, scale_y: fwd(x, _other(approximate)),
    },
    bwd={
        "swapped_halves": lambda dy, x, approximate: torch.cat(
            tuple(reversed(bwd(dy, x, approximate).chunk(2, -1))), -1
        ),
        "gate_without_density": _gate_without_density,
    },
)
