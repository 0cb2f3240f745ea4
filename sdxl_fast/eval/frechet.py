# SPDX-License-Identifier: Apache-2.0
"""Fréchet distance between two sets of features (Heusel et al. 2017), for sets large enough to have a covariance.

The estimate is biased upwards, the more so the fewer samples there are per dimension; `kid.kernel_distance` is the
measure for a few thousand pictures. On EfficientNet features it is not "FID" and compares with no published value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T


def frechet_distance_of_moments(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Wasserstein-2 distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Args:
        mean_a, mean_b: [D].
        covariance_a, covariance_b: [D, D], symmetric, positive semi-definite (rank may be deficient).
    """
    mean_a, mean_b = mean_a.double(), mean_b.double()
    covariance_a, covariance_b = covariance_a.double(), covariance_b.double()
    root = _square_root(covariance_a)
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0.0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2.0 * cross)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features [N, D] and [M, D].

    Raises:
        ValueError: shapes that do not fit, or no more samples than dimensions: the covariance is then singular.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b are {list(a.shape)} and {list(b.shape)}; allowed: [N, D] and [M, D]")
    if min(len(a), len(b)) <= a.shape[1]:
        raise ValueError(
            f"{min(len(a), len(b))} samples for {a.shape[1]} dimensions; allowed: more samples than dimensions "
            "(with fewer, use kid.kernel_distance, which is unbiased)"
        )
    a, b = a.double(), b.double()
    return frechet_distance_of_moments(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
