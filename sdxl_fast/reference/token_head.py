# SPDX-License-Identifier: Apache-2.0
"""The end of a discriminator's head over tokens in plain PyTorch: from its last wide convolution to the logits.

With GroupNorm's xhat over the channels of a group and all tokens of a sample (hidden [N,C,L], residual [N,C,L])::

    z = xhat * weight[c] + bias[c],      a = z where z > 0, else SLOPE * z
    logit[n, l] = sum over c of direction[n, c] * (residual + a)[n, c, l] + offset[n]

The head of StyleGAN-T ends in a convolution to 64 channels whose product with a map of the condition is the logit. Both
are linear, so the weight and the mapped condition make one direction per sample first: C products a token, not 64 C.

Source: ADD section 3.2 (Sauer et al. 2023, arXiv:2311.17042), after StyleGAN-T (Sauer et al. 2023, arXiv:2301.09515).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sdxl_fast.reference import group_norm_silu
from sdxl_fast.reference._common import accumulation_dtype, itemsize, without_autocast, wrong_variants

# Of the leaky ReLU, as in every StyleGAN.
SLOPE = 0.2

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor | None, ...]


def fwd(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    direction: torch.Tensor,
    offset: torch.Tensor,
    num_groups: int,
    eps: float,
    *,
    slope: float = SLOPE,
    norm_of_sum: bool = False,
) -> Outputs:
    """Differentiable forward.

    Args:
        hidden: [N,C,L], any float dtype, what is normalised.
        residual: [N,C,L], what it is added to.
        weight, bias: [C], of the normalisation.
        direction: [N,C].
        offset: [N].
        num_groups: G, divides C.
        eps: added to the variance.
        slope: of the leaky ReLU; another than :data:`SLOPE` makes a wrong variant, as does ``norm_of_sum``.

    Returns:
        logits [N,L] and mean, rstd [N,G], in float32 (float64 for float64).
    """
    acc = accumulation_dtype(hidden.dtype)
    hidden, residual = hidden.to(acc), residual.to(acc)
    normalised = hidden + residual if norm_of_sum else hidden
    z, mean, rstd = group_norm_silu.fwd(normalised.unsqueeze(-1), weight, bias, None, num_groups, eps, "none")
    total = residual + F.leaky_relu(z.squeeze(-1), slope)
    with without_autocast(hidden):
        logits = (direction.to(acc).unsqueeze(1) @ total).squeeze(1) + offset.to(acc)[:, None]
    return logits, mean, rstd


def bwd(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    direction: torch.Tensor,
    offset: torch.Tensor,
    dlogits: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    needs: Sequence[bool],
    *,
    slope: float = SLOPE,
    drop_mean_term: bool = False,
    drop_residual: bool = False,
) -> Gradients:
    """Closed-form gradient of :func:`fwd`.

    Args:
        hidden, residual, weight, bias, direction, offset: as given to :func:`fwd`, like ``num_groups``.
        dlogits: [N,L].
        mean, rstd: what it returned.
        needs: which of the six gradients to compute.
        slope, drop_mean_term, drop_residual: for wrong variants.

    Returns:
        the gradients of the first six arguments, each like its tensor, None where not needed.
    """
    acc = mean.dtype
    dlogits = dlogits.to(acc)
    group_channels = hidden.shape[1] // num_groups
    spread_mean, spread_rstd = (t.repeat_interleave(group_channels, 1).unsqueeze(-1) for t in (mean, rstd))
    z = (hidden.to(acc) - spread_mean) * spread_rstd * weight.to(acc)[:, None] + bias.to(acc)[:, None]
    dtotal = direction.to(acc).unsqueeze(2) * dlogits.unsqueeze(1)
    ddirection = None
    if needs[4]:
        total = F.leaky_relu(z, slope) + (0 if drop_residual else residual.to(acc))
        with without_autocast(hidden):
            ddirection = (total @ dlogits.unsqueeze(2)).squeeze(2).to(direction.dtype)
    dhidden = dweight = dbias = None
    if needs[0] or needs[2] or needs[3]:
        dz = torch.where(z > 0, dtotal, slope * dtotal)
        wanted = (needs[0], needs[2], needs[3], False)
        dx, dweight, dbias, _ = group_norm_silu._backward(
            *(dz.unsqueeze(-1), hidden.unsqueeze(-1), weight, bias, None, mean, rstd, num_groups, "none", wanted),
            drop_mean_term=drop_mean_term,
        )
        dhidden = None if dx is None else dx.squeeze(-1)
    dresidual = dtotal.to(residual.dtype) if needs[1] else None
    doffset = dlogits.sum(1).to(offset.dtype) if needs[5] else None
    return dhidden, dresidual, dweight, dbias, ddirection, doffset


def flops(shape: Sequence[int], *, backward: bool = False) -> int:
    """Floating-point operations for hidden of ``shape`` [N,C,L]."""
    n, c, length = shape
    return n * c * length * (22 if backward else 12)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False) -> int:
    """Least memory traffic: hidden, whose groups stay in cache, and residual read; backward also both gradients."""
    n, c, length = shape
    return n * c * length * itemsize(dtype) * (4 if backward else 2) + 4 * n * length


def _other_sample(hidden, residual, weight, bias, direction, *rest):  # type: ignore[no-untyped-def]
    return fwd(hidden, residual, weight, bias, direction.mean(0, keepdim=True).expand_as(direction), *rest)


WRONG = wrong_variants(
    fwd={
        "other_slope": functools.partial(fwd, slope=0.1),
        "normalises_the_sum": functools.partial(fwd, norm_of_sum=True),
        "one_direction_for_all": _other_sample,
    },
    bwd={
        "other_slope": functools.partial(bwd, slope=0.1),
        "without_mean_term": functools.partial(bwd, drop_mean_term=True),
        "direction_without_residual": functools.partial(bwd, drop_residual=True),
    },
)
