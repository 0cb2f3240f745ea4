# SPDX-License-Identifier: Apache-2.0
"""The gated projection of a feed-forward, value * GELU(gate) of x W^T + bias, in plain PyTorch.

    h = x W^T + bias,    value, gate = the halves of h,    y = value GELU(gate)

All of it in float32, rounded once: h is never stored. For float8_e4m3 operands h is the product of ``linear`` with its
scales; the result, which goes into another product, can be written in float8 too (``scale_y``).

h is not saved for the backward, which makes it again::

    dh = [dy GELU(gate), dy value GELU'(gate)],    dx = dh W,    dW = dh^T x,    dbias = sum over rows of dh

That is four products for forward and backward instead of three, and 2C elements a row less in memory: at 1024 px
1.3 GB a sample in the 60 wide blocks of SDXL's U-Net. Who has the memory takes `linear` and `geglu`.

Source: Shazeer 2020 (arXiv:2002.05202); order of the halves as in diffusers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from sdxl_fast.reference import geglu, linear
from sdxl_fast.reference._common import accumulation_dtype, itemsize, rounded, wrong_variants
from sdxl_fast.reference.linear import Gradients, MaybeTensor, output_dtype


def _projected(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    scale_x: MaybeTensor = None,
    scale_w: MaybeTensor = None,
) -> torch.Tensor:
    acc = accumulation_dtype(x.dtype)
    widened = None if bias is None else bias.to(acc)
    return linear.fwd(x.to(acc), weight.to(acc), widened, None, scale_x, scale_w)


def fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    approximate: str,
    scale_x: MaybeTensor = None,
    scale_w: MaybeTensor = None,
    scale_y: MaybeTensor = None,
) -> torch.Tensor:
    """Differentiable forward.

    Args:
        x: [..., K], any float dtype or float8_e4m3.
        weight: [2C, K], the rows of the value before those of the gate.
        bias: [2C] or None.
        approximate: of GELU, ``"none"`` (erf) or ``"tanh"``.
        scale_x, scale_w: float32 of one element, for float8, else None.
        scale_y: float32 of one element, for a result in float8, else None.

    Returns:
        [..., C] in x's dtype, bfloat16 for float8; that rounded to float8 where there is a scale_y.
    """
    y = geglu.fwd(_projected(x, weight, bias, scale_x, scale_w), approximate)
    return rounded(y.to(output_dtype(x.dtype)), scale_y)


def bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    approximate: str,
    needs: Sequence[bool],
    *,
    with_bias: bool = True,
) -> Gradients:
    """Backward.

    Args:
        dy: [..., C].
        x, weight, bias, approximate: as given to :func:`fwd`.
        needs: which of (dx, dweight, dbias) to compute.
        with_bias: whether h is made again with its bias; False is a wrong variant.

    Returns:
        (dx, dweight, dbias) in the dtype of x, None where not needed.
    """
    acc = accumulation_dtype(x.dtype)
    projected = _projected(x, weight, bias if with_bias else None)
    dprojected = geglu.bwd(dy.to(acc), projected, approximate)
    found = linear.bwd(dprojected, x.to(acc), weight.to(acc), needs)
    dx, dweight, dbias = (None if t is None else t.to(x.dtype) for t in found)
    return dx, dweight, dbias


def flops(shape: Sequence[int], *, out_features: int, backward: bool = False) -> int:
    """Operations for x of ``shape`` [..., K] and C = ``out_features``: the products; backward three of them."""
    return linear.flops(shape, out_features=2 * out_features) * (3 if backward else 1)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, out_features: int, backward: bool = False) -> int:
    """Least memory traffic: x, weight and y; backward x, weight, dy, dx and dweight. float8 gives bfloat16 here."""
    rows = math.prod(shape[:-1])
    x, weight, y = rows * shape[-1], 2 * shape[-1] * out_features, rows * out_features
    return (2 * (x + weight) if backward else x + weight) * itemsize(dtype) + y * itemsize(output_dtype(dtype))


def _halves_swapped(
    x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, approximate: str, *scales: MaybeTensor
) -> torch.Tensor:
    half = weight.shape[0] // 2
    return fwd(x, weight.roll(half, 0), None if bias is None else bias.roll(half, 0), approximate, *scales)


def _edited(k_dx: float, k_dweight: float, k_dbias: float, *args: torch.Tensor) -> Gradients:
    found = bwd(*args)  # type: ignore[arg-type]
    dx, dweight, dbias = (None if t is None else k * t for k, t in zip((k_dx, k_dweight, k_dbias), found, strict=True))
    return dx, dweight, dbias


WRONG = wrong_variants(
    fwd={
        "halves_swapped": _halves_swapped,
        "bias_dropped": lambda x, weight, bias, approximate, *scales: fwd(x, weight, None, approximate, *scales),
        "gate_not_activated": lambda x, weight, bias, approximate, *scales: torch.mul(
            *_projected(x, weight, bias).chunk(2, -1)
        ).to(x.dtype),
    },
    bwd={
        "bias_forgotten_in_recomputation": functools.partial(bwd, with_bias=False),
        "dweight_of_half_the_value": functools.partial(_edited, 1.0, 0.5, 1.0),
    },
)
