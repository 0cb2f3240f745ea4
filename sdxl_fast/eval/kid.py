# SPDX-License-Identifier: Apache-2.0
"""Kernel distance between two sets of features, unbiased, with its standard error (Bińkowski et al. 2018, section 4).

The kernel is (x.y / d + 1)^3 and the estimate is the U-statistic of the squared maximum mean discrepancy over all
pairs. A Fréchet distance of a few thousand samples in 1280 dimensions is mostly its own bias; this one has none, so a
value near zero (it may be negative) says that the sets cannot be told apart at this size.

The standard error is a delete-a-block jackknife of the full estimate. Sets that share a part are compared by the
jackknife of the difference, in which the shared part's noise cancels: see `excess`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = 20


@dataclass(frozen=True, slots=True)
class KernelDistance:
    """`value` and `standard_error` of the squared distance; `replicates` [blocks], the estimate without each block."""

    value: float
    standard_error: float
    replicates: Tensor


def _kernel_sums(x: Tensor, y: Tensor, *, blocks: int, skip_diagonal: bool) -> Tensor:
    """[blocks, blocks] sums of the kernel over the pairs of a block of x and a block of y."""
    sums = torch.empty(blocks, blocks, dtype=torch.float64)
    columns = torch.tensor([len(part) for part in y.tensor_split(blocks)])
    column_of = torch.arange(blocks).repeat_interleave(columns).to(y.device)
    for i, x_block in enumerate(x.tensor_split(blocks)):
        values = ((x_block @ y.T / x.shape[1] + 1.0) ** 3).sum(0)
        sums[i] = torch.zeros(blocks, dtype=values.dtype, device=values.device).index_add(0, column_of, values).cpu()
        if skip_diagonal:
            sums[i, i] -= ((x_block.square().sum(1) / x.shape[1] + 1.0) ** 3).sum().cpu()
    return sums


def _without(sums: Tensor) -> Tensor:
    """[blocks + 1]: the whole sum, then the sums without block b on both sides."""
    total = sums.sum()
    return torch.cat([total[None], total - sums.sum(0) - sums.sum(1) + sums.diagonal()])


def _sizes(count: int, blocks: int) -> Tensor:
    block = torch.tensor([len(part) for part in torch.empty(count).tensor_split(blocks)], dtype=torch.float64)
    return torch.cat([torch.tensor([float(count)], dtype=torch.float64), count - block])


def jackknife_error(replicates: Tensor) -> float:
    """The standard error of an estimate from its replicates [blocks], each without one of equally large blocks."""
    blocks = len(replicates)
    return float(((replicates - replicates.mean()).square().sum() * (blocks - 1) / blocks).sqrt())


def kernel_distance(x: Tensor, y: Tensor, *, blocks: int = BLOCKS) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy of two independent samples.

    Args:
        x: features [N, D], any float dtype; drawn independently of y and in no particular order.
        y: features [M, D].
        blocks: number of jackknife blocks; at least 2 samples must remain without any of them.

    Raises:
        ValueError: shapes that do not fit, too few samples for the blocks, or values that are not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y are {list(x.shape)} and {list(y.shape)}; allowed: [N, D] and [M, D]")
    if blocks < 2 or min(len(x), len(y)) < max(blocks, 4):
        raise ValueError(
            f"{len(x)} and {len(y)} samples for {blocks} blocks; allowed: at least 2 blocks, 4 samples, 1 each"
        )
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("x or y holds values that are not finite")
    x, y = x.double(), y.double()
    n, m = _sizes(len(x), blocks), _sizes(len(y), blocks)
    within_x = _without(_kernel_sums(x, x, blocks=blocks, skip_diagonal=True)) / (n * (n - 1))
    within_y = _without(_kernel_sums(y, y, blocks=blocks, skip_diagonal=True)) / (m * (m - 1))
    across = _without(_kernel_sums(x, y, blocks=blocks, skip_diagonal=False)) / (n * m)
    estimates = within_x + within_y - 2.0 * across
    return KernelDistance(float(estimates[0]), jackknife_error(estimates[1:]), estimates[1:])


def excess(distance: KernelDistance, baseline: KernelDistance) -> tuple[float, float]:
    """How much farther than the baseline, and the standard error of that.

    Both must be measured against the same reference with the same blocks; where sample i of both sets answers the same
    prompt, what the prompts share cancels too.
    """
    if len(distance.replicates) != len(baseline.replicates):
        raise ValueError(
            f"distances with {len(distance.replicates)} and {len(baseline.replicates)} blocks; allowed: the same number"
        )
    error = jackknife_error(distance.replicates - baseline.replicates)
    return distance.value - baseline.value, error
