# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbour upsampling by two, then a 3x3 convolution with padding 1, in plain PyTorch.

    u[n, c, Y, X] = x[n, c, Y // 2, X // 2]
    y[n, o, Y, X] = bias[o] + sum over c, r, s of weight[o, c, r, s] u[n, c, Y + r - 1, X + s - 1]

The four outputs made from one input position, the phases (Y mod 2, X mod 2), see only 2 x 2 distinct inputs each, so
taps that meet the same input can be added up beforehand: four taps an output instead of nine. In one dimension::

    y[2p]     = w0 x[p - 1] + (w1 + w2) x[p]
    y[2p + 1] = (w0 + w1) x[p] + w2 x[p + 1]

which is the transposed convolution of stride 2 and padding 1 with the kernel (w2, w1 + w2, w0 + w1, w0). In two
dimensions both directions do so and the kernel is 4 x 4. `phase_weights` makes it, `fold_phases` takes its gradient
back to the 3 x 3 weight. The two forms are equal in real arithmetic. In floating point the kernel is rounded once:
summed in float32 and stored in the dtype to compute in, whose unit u (half an ulp of 1: 2^-9 in bfloat16) bounds
what that adds to the error of an output by u sum |kernel| |x|. For values of random sign this is as much again as the
rounding of the output itself, so the error grows by a factor of about sqrt 2.

Source: Shi et al. 2016 (arXiv:1609.07009), on phases. SDXL's U-Net upsamples twice, its VAE three times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sdxl_fast.reference._common import accumulation_dtype, itemsize, without_autocast, wrong_variants

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _spread(w: torch.Tensor, dim: int) -> torch.Tensor:
    """Three taps along ``dim`` to the four of the transposed convolution."""
    first, middle, last = w.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)


def _gather(k: torch.Tensor, dim: int) -> torch.Tensor:
    """Adjoint of :func:`_spread`."""
    k0, k1, k2, k3 = k.unbind(dim)
    return torch.stack((k2 + k3, k1 + k2, k0 + k1), dim)


def phase_weights(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns the kernel of the equal transposed convolution (stride 2, padding 1); differentiable.

    Args:
        weight: [C_out, C_in, 3, 3], any float dtype and strides.
        dtype: of the result, by default that of weight. The sums are taken in float32 (float64 for float64).

    Returns:
        [C_in, C_out, 4, 4]: phase (i, j) of the output takes its tap (a, b) from [:, :, 3 - i - 2a, 3 - j - 2b]. On a
        CPU it is channels_last, as oneDNN likes it; elsewhere C_in is innermost, as a matrix product on the GPU does.
    """
    acc = accumulation_dtype(weight.dtype)
    order = (1, 2, 3, 0) if weight.device.type == "cpu" else (0, 2, 3, 1)
    taps = weight.permute(order).to(acc).contiguous()
    kernel = _spread(_spread(taps, 1), 2).to(dtype or weight.dtype)
    return kernel.permute((0, 3, 1, 2) if weight.device.type == "cpu" else (3, 0, 1, 2))


def fold_phases(kernel: torch.Tensor) -> torch.Tensor:
    """Takes a gradient of :func:`phase_weights`' result [C_in, C_out, 4, 4] to the weight [C_out, C_in, 3, 3]."""
    return _gather(_gather(kernel.to(accumulation_dtype(kernel.dtype)), 2), 3).transpose(0, 1)


def _upsampled(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, phases: torch.Tensor | None) -> torch.Tensor:
    """Differentiable forward, as the definition has it.

    Args:
        x: [N, C_in, H, W], any float dtype.
        weight: [C_out, C_in, 3, 3].
        bias: [C_out] or None.
        phases: not used: the reference computes from the weight.

    Returns:
        [N, C_out, 2H, 2W] in x's dtype; channels_last if x is, else contiguous.
    """
    acc = accumulation_dtype(x.dtype)
    with without_autocast(x):
        y = F.conv2d(_upsampled(x.to(acc)), weight.to(acc), None if bias is None else bias.to(acc), padding=1)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Returns contiguous_format for a contiguous [N,C,H,W] tensor, channels_last for any other."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    phases: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Backward, through the upsampled map.

    Args:
        dy: [N, C_out, 2H, 2W].
        x, weight, bias, phases: as given to :func:`fwd`.
        needs: which of (dx, dweight, dbias) to compute.

    Returns:
        (dx, dweight, dbias), None where not needed; each like its argument.
    """
    acc = accumulation_dtype(x.dtype)
    n, c, h, w = x.shape
    mask = [needs[0], needs[1], needs[2] and bias is not None]
    with without_autocast(x):
        du, dweight, dbias = torch.ops.aten.convolution_backward(
            dy.to(acc), _upsampled(x.to(acc)), weight.to(acc), [weight.shape[0]],
            [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask,
        )  # fmt: skip
    dx = du.reshape(n, c, h, 2, w, 2).sum((3, 5)) if mask[0] else None
    return (
        torch.empty_like(x).copy_(dx) if dx is not None else None,
        torch.empty_like(weight).copy_(dweight) if mask[1] else None,
        dbias.to(bias.dtype) if mask[2] and bias is not None else None,
    )


def flops(shape: Sequence[int], *, out_channels: int | None = None, backward: bool = False) -> int:
    """Operations of the phases on x of ``shape`` [N, C_in, H, W]: 16 multiply-adds per input position and channel pair.

    Backward twice that. The definition takes 36.
    """
    n, c, h, w = shape
    return 2 * 16 * n * c * (out_channels or c) * h * w * (2 if backward else 1)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, out_channels: int | None = None, backward: bool = False) -> int:
    """Least memory traffic: x, 3 x 3 weight and y; backward x, dy, weight, dx and dweight."""
    n, c, h, w = shape
    out = out_channels or c
    maps, weights = n * h * w, 9 * c * out
    elements = maps * (2 * c + 4 * out) + 2 * weights if backward else maps * (c + 4 * out) + weights
    return elements * itemsize(dtype)


def _mixed_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    phases: torch.Tensor | None,
    *,
    dim: int,
    order: Sequence[int],
) -> torch.Tensor:
    """The transposed convolution with its kernel reordered along one direction."""
    acc = accumulation_dtype(x.dtype)
    kernel = phase_weights(weight, acc).index_select(dim, torch.tensor(order))
    return F.conv_transpose2d(x.to(acc), kernel, None if bias is None else bias.to(acc), stride=2, padding=1).to(
        x.dtype
    )


def _replicated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, phases: torch.Tensor | None
) -> torch.Tensor:
    """Continues the border instead of padding with zeros."""
    acc = accumulation_dtype(x.dtype)
    u = F.pad(_upsampled(x.to(acc)), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(u, weight.to(acc), None if bias is None else bias.to(acc)).to(x.dtype)


def _edited(dy: torch.Tensor, *args: Any, which: int, edit: Callable[[torch.Tensor], torch.Tensor]) -> Gradients:
    """The right gradients but for one."""
    found = list(bwd(dy, *args))
    right = found[which]
    found[which] = None if right is None else edit(right)
    return found[0], found[1], found[2]


def _from_even_rows(dy: torch.Tensor, *args: Any) -> Gradients:
    """Forgets two of the four phases."""
    return bwd(dy * torch.tensor([1.0, 0.0], dtype=dy.dtype).repeat(dy.shape[2] // 2)[:, None], *args)


WRONG = wrong_variants(
    fwd={
        "phases_swapped": functools.partial(_mixed_up, dim=2, order=(1, 0, 3, 2)),
        "taps_swapped": functools.partial(_mixed_up, dim=3, order=(2, 3, 0, 1)),
        "border_replicated": _replicated,
        "bias_dropped": lambda x, weight, bias, phases: fwd(x, weight, None, None),
    },
    bwd={
        "dx_is_a_mean": functools.partial(_edited, which=0, edit=lambda t: t / 4),
        "dweight_transposed": functools.partial(_edited, which=1, edit=lambda t: t.transpose(-1, -2)),
        "dbias_is_a_mean": functools.partial(_edited, which=2, edit=lambda t: t / 4),
        "two_phases_forgotten": _from_even_rows,
    },
)
