# SPDX-License-Identifier: Apache-2.0
"""act(GroupNorm(x [+ shift])) in plain PyTorch, x perhaps in two pieces.

With the statistics over the ``C/G * H * W`` elements of each (sample n, group g)::

    s = x + shift[n, c]          (shift optional; with a skip, x stands for the channels of x and then those of skip)
    xhat = (s - mean[n, g]) * rstd[n, g],    rstd = 1 / sqrt(var + eps), var biased
    z = xhat * weight[c] + bias[c]
    y = z * sigmoid(z)           (activation "silu")   or   y = z   (activation "none")

Source: Wu & He 2018 (arXiv:1803.08494); the fused form is what every residual block of SDXL applies twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from sdxl_fast.reference._common import accumulation_dtype, itemsize, rounded, wrong_variants

ACTIVATIONS = ("none", "silu")


def _normalise(
    s: torch.Tensor, num_groups: int, eps: float, correction: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns xhat [N,C,H,W] and mean, rstd [N,G], by the two-pass formula.

    The mean is taken twice: PyTorch adds up a channels_last group one element after the other, which costs a group of
    1,024 elements around 30 four digits of seven. What is left after the first mean is small and so is its error.
    """
    grouped = s.unflatten(1, (num_groups, s.shape[1] // num_groups))  # N, G, C/G, H, W: a view of any layout
    count = grouped[0, 0].numel() if s.shape[0] else 1
    mean = grouped.sum((2, 3, 4), keepdim=True) / max(count, 1)
    mean = mean + (grouped - mean).sum((2, 3, 4), keepdim=True) / max(count, 1)
    centred = grouped - mean
    var = (centred * centred).sum((2, 3, 4), keepdim=True) / max(count - correction, 1)
    rstd = torch.rsqrt(var + eps)
    return (centred * rstd).flatten(1, 2), mean.flatten(1), rstd.flatten(1)


def joined(x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Returns the channels of x and then those of skip, if there is one."""
    return x if skip is None else torch.cat((x, skip), 1)


def _per_channel(v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[C] or [N,C] -> broadcastable against [N,C,H,W]."""
    return v.to(dtype)[..., None, None]


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
    correction: int = 0,
    statistics_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    acc = accumulation_dtype(x.dtype)
    s = x.to(statistics_dtype or acc)
    if shift is not None:
        s = s + _per_channel(shift, s.dtype)
    z, mean, rstd = _normalise(s, num_groups, eps, correction)
    z, mean, rstd = z.to(acc), mean.to(acc), rstd.to(acc)
    if weight is not None and bias is not None:
        z = z * _per_channel(weight, acc) + _per_channel(bias, acc)
    y = torch.nn.functional.silu(z) if activation == "silu" else z
    return y.to(x.dtype), mean, rstd


def fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
    scale_y: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiable forward.

    Args:
        x: [N,C,H,W], any float dtype.
        weight, bias: [C] or both None.
        shift: [N,C], added to x before the statistics, or None.
        num_groups: G, divides C.
        eps: added to the variance.
        activation: ``"none"`` or ``"silu"``.
        scale_y: float32, one element: y is then rounded once more, to float8_e4m3fn after division by it.
        skip: [N,C2,H,W] like x, or None; x is then [N,C-C2,H,W].

    Returns:
        y [N,C,H,W] like x, and mean, rstd [N,G] in float32 (float64 for float64 x).
    """
    y, mean, rstd = _forward(joined(x, skip), weight, bias, shift, num_groups, eps, activation)
    return rounded(y, scale_y), mean, rstd


def bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Closed-form gradient of :func:`fwd`.

    Args:
        dy: gradient of y, [N,C,H,W].
        mean, rstd: [N,G] as :func:`fwd` returned them; the other tensors as given to it.
        needs: which of dx, dweight, dbias, dshift are wanted; the rest come back as None.

    Returns:
        dx like x, dweight and dbias like weight and bias, dshift [N,C] like shift.
    """
    return _backward(dy, x, weight, bias, shift, mean, rstd, num_groups, activation, needs)


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
    drop_mean_term: bool = False,
    drop_projection_term: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    acc = accumulation_dtype(x.dtype)
    channels_per_group = x.shape[1] // num_groups
    per_group = (num_groups, channels_per_group)
    s = x.to(acc)
    if shift is not None:
        s = s + _per_channel(shift, acc)
    spread_mean = _per_channel(mean.to(acc).repeat_interleave(channels_per_group, 1), acc)
    spread_rstd = _per_channel(rstd.to(acc).repeat_interleave(channels_per_group, 1), acc)
    xhat = (s - spread_mean) * spread_rstd
    dz = dy.to(acc)
    scale = None if weight is None else _per_channel(weight, acc)
    if activation == "silu":
        z = xhat if scale is None or bias is None else xhat * scale + _per_channel(bias, acc)
        sigmoid = torch.sigmoid(z)
        dz = dz * (sigmoid * (1 + z * (1 - sigmoid)))
    dweight = (dz * xhat).sum((0, 2, 3)).to(weight.dtype) if needs[1] and weight is not None else None
    dbias = dz.sum((0, 2, 3)).to(bias.dtype) if needs[2] and bias is not None else None
    if not (needs[0] or needs[3]):
        return None, dweight, dbias, None
    dxhat = dz if scale is None else dz * scale
    count = max(channels_per_group * x.shape[2] * x.shape[3], 1)

    def group_mean(t: torch.Tensor) -> torch.Tensor:
        total = t.unflatten(1, per_group).sum((2, 3, 4)) / count
        return _per_channel(total.repeat_interleave(channels_per_group, 1), acc)

    dx = dxhat
    if not drop_mean_term:
        dx = dx - group_mean(dxhat)
    if not drop_projection_term:
        dx = dx - xhat * group_mean(dxhat * xhat)
    dx = spread_rstd * dx
    dshift = dx.sum((2, 3)).to(x.dtype) if needs[3] and shift is not None else None
    return dx.to(x.dtype) if needs[0] else None, dweight, dbias, dshift


def flops(shape: Sequence[int], *, backward: bool = False) -> int:
    """Floating-point operations for x of ``shape`` [N,C,H,W], a transcendental counted as one."""
    n, c, h, w = shape
    return n * c * h * w * (20 if backward else 10)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False) -> int:
    """Least memory traffic for a group that does not fit in cache.

    Forward: x read for the statistics and again to be normalised, y written. Backward: dy and x read twice, dx
    written. Parameters and statistics are left out, being smaller by the size of a picture.
    """
    n, c, h, w = shape
    return n * c * h * w * itemsize(dtype) * (5 if backward else 3)


WRONG = wrong_variants(
    fwd={
        "missing_eps": lambda x, w, b, s, g, eps, act, *_: _forward(x, w, b, s, g, 0.0, act),
        "unbiased_variance": lambda x, w, b, s, g, eps, act, *_: _forward(x, w, b, s, g, eps, act, correction=1),
        "statistics_in_bfloat16": lambda x, w, b, s, g, eps, act, *_: _forward(
            x, w, b, s, g, eps, act, statistics_dtype=torch.bfloat16
        ),
        "shift_ignored": lambda x, w, b, s, g, eps, act, *_: _forward(x, w, b, None, g, eps, act),
        "skip_before_x": lambda x, w, b, s, g, eps, act, _, skip: _forward(
            x if skip is None else joined(skip, x), w, b, s, g, eps, act
        ),
    },
    bwd={
        "without_mean_term": functools.partial(_backward, drop_mean_term=True),
        "without_projection_term": functools.partial(_backward, drop_projection_term=True),
    },
)
