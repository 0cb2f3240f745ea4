# SPDX-License-Identifier: Apache-2.0
"""The last stage of a discriminator's head in plain PyTorch: from the last strided convolution to the loss.

With GroupNorm's xhat over each (sample n, group g) of the map x, and P = H * W positions::

    z = xhat * weight[c] + bias[c],      y = z * sigmoid(z)
    pooled[n, c] = sum over positions of y / P
    logit[n] = sum over c of projection[c] * pooled[n, c] + offset

and, with s = +1 for a picture that is to be judged real, -1 for one that is to be judged fake::

    non_saturating   loss = softplus(-s logit)        dloss/dlogit = -s sigmoid(-s logit)
    hinge            loss = max(0, 1 - s logit)       dloss/dlogit = -s where s logit < 1
    hinge_student    loss = -logit                    dloss/dlogit = -1

Sources: the head, SDXL-Lightning section 3.3 (Lin et al. 2024, arXiv:2402.13929); its loss, Goodfellow et al. 2014
(arXiv:1406.2661); the hinge loss, Lim & Ye 2017 (arXiv:1705.02894).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from sdxl_fast.reference import group_norm_silu
from sdxl_fast.reference._common import accumulation_dtype, itemsize, wrong_variants

# Name to kind and sign: what the logit is to become.
LOSSES = {
    "non_saturating_real": ("non_saturating", 1.0),
    "non_saturating_fake": ("non_saturating", -1.0),
    "hinge_real": ("hinge", 1.0),
    "hinge_fake": ("hinge", -1.0),
    "hinge_student": ("linear", 1.0),
}

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor | None, ...]


def losses_of(logits: torch.Tensor, loss: str) -> torch.Tensor:
    """Returns the loss of each logit, of any shape; ``loss`` is one of :data:`LOSSES`."""
    kind, sign = LOSSES[loss]
    if kind == "non_saturating":
        return F.softplus(-sign * logits)
    return F.relu(1.0 - sign * logits) if kind == "hinge" else -sign * logits


def slopes_of(logits: torch.Tensor, loss: str) -> torch.Tensor:
    """Returns the derivative of each loss by its logit."""
    kind, sign = LOSSES[loss]
    if kind == "non_saturating":
        return -sign * torch.sigmoid(-sign * logits)
    if kind == "hinge":
        return -sign * (sign * logits < 1.0).to(logits.dtype)
    return torch.full_like(logits, -sign)


def arriving(
    dlogits: torch.Tensor | None, dlosses: torch.Tensor | None, logits: torch.Tensor, loss: str
) -> torch.Tensor:
    """Returns what flows back into the logits, by themselves and through their losses; one of the two is given."""
    if dlosses is None:
        return cast(torch.Tensor, dlogits)
    through = dlosses * slopes_of(logits, loss)
    return through if dlogits is None else dlogits + through


def fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
    offset: torch.Tensor,
    num_groups: int,
    eps: float,
    loss: str,
    *,
    pool: str = "mean",
    activation: str = "silu",
) -> Outputs:
    """Differentiable forward.

    Args:
        x: [N,C,H,W], any float dtype.
        weight, bias: [C], of the normalisation.
        projection: [C].
        offset: [1].
        num_groups: G, divides C.
        eps: added to the variance.
        loss: one of :data:`LOSSES`.
        pool: over positions, ``"mean"``; anything else makes a wrong variant, as does another activation.

    Returns:
        logits [N], losses [N], pooled [N,C], and mean, rstd [N,G], all in float32 (float64 for float64 x).
    """
    acc = accumulation_dtype(x.dtype)
    y, mean, rstd = group_norm_silu.fwd(x.to(acc), weight, bias, None, num_groups, eps, activation)
    positions = max(x.shape[2] * x.shape[3], 1)
    pooled = y.sum((2, 3)) / (positions if pool == "mean" else 1)
    logits = (pooled * projection.to(acc)).sum(1) + offset.to(acc)  # no matrix product: autocast would round it
    return logits, losses_of(logits, loss), pooled, mean, rstd


def bwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
    offset: torch.Tensor,
    dlogits: torch.Tensor | None,
    dlosses: torch.Tensor | None,
    logits: torch.Tensor,
    pooled: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    loss: str,
    needs: Sequence[bool],
    *,
    drop_loss: bool = False,
    drop_pool: bool = False,
    drop_mean_term: bool = False,
) -> Gradients:
    """Closed-form gradient of :func:`fwd`.

    Args:
        x, weight, bias, projection, offset: as given to :func:`fwd`, like ``num_groups`` and ``loss``.
        dlogits, dlosses: [N], gradients of the first two outputs, one of them possibly None.
        logits, pooled, mean, rstd: what it returned.
        needs: which of (dx, dweight, dbias, dprojection, doffset) to compute.
        drop_loss, drop_pool, drop_mean_term: for wrong variants.

    Returns:
        the five gradients, each like its tensor, None where not needed.
    """
    acc = logits.dtype
    if drop_loss and dlosses is not None:
        arrived = dlosses if dlogits is None else dlogits + dlosses
    else:
        arrived = arriving(dlogits, dlosses, logits, loss)
    arrived = arrived.to(acc)
    dx = dweight = dbias = None
    if any(needs[:3]):
        positions = 1 if drop_pool else max(x.shape[2] * x.shape[3], 1)
        dy = (arrived[:, None] * projection.to(acc) / positions)[..., None, None].expand(x.shape)
        wanted = (needs[0], needs[1], needs[2], False)
        dx, dweight, dbias, _ = group_norm_silu._backward(
            *(dy, x, weight, bias, None, mean, rstd, num_groups, "silu", wanted), drop_mean_term=drop_mean_term
        )
    dprojection = (arrived[:, None] * pooled).sum(0).to(projection.dtype) if needs[3] else None
    doffset = arrived.sum(0, keepdim=True).to(offset.dtype) if needs[4] else None
    return dx, dweight, dbias, dprojection, doffset


def flops(shape: Sequence[int], *, backward: bool = False) -> int:
    """Floating-point operations for x of ``shape`` [N,C,H,W], a transcendental counted as one."""
    n, c, h, w = shape
    return n * c * (h * w * (20 if backward else 11) + 2)


def bytes(shape: Sequence[int], dtype: torch.dtype, *, backward: bool = False) -> int:
    """Least memory traffic: x read, which is small; backward x read and dx written. Parameters are left out."""
    n, c, h, w = shape
    return n * c * h * w * itemsize(dtype) * (2 if backward else 1)


def _other_sign(*args: Any) -> Outputs:
    family, _, role = args[-1].rpartition("_")
    other = {"real": "fake", "fake": "real", "student": "fake"}[role]
    return fwd(*args[:-1], f"{family}_{other}")  # type: ignore[call-arg]


def _without_offset(x, weight, bias, projection, offset, *rest):  # type: ignore[no-untyped-def]
    return fwd(x, weight, bias, projection, torch.zeros_like(offset), *rest)


WRONG = wrong_variants(
    fwd={
        "sum_for_mean": functools.partial(fwd, pool="sum"),
        "without_activation": functools.partial(fwd, activation="none"),
        "other_sign": _other_sign,
        "offset_ignored": _without_offset,
    },
    bwd={
        "loss_without_slope": functools.partial(bwd, drop_loss=True),
        "gradient_of_a_sum": functools.partial(bwd, drop_pool=True),
        "without_mean_term": functools.partial(bwd, drop_mean_term=True),
    },
)
