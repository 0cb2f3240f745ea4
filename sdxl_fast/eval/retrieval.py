# SPDX-License-Identifier: Apache-2.0
"""Retrieval: how often the real picture of the prompt is among the nearest of all to the generated one.

The database holds one real picture per name, upright on white; the query is a generated picture whose place, size,
turn and ground are its own. Similarity is the cosine of pooled features, which real pictures placed at random pass with
99.8 % in the five nearest of 420 (see `features`): what is missing from a score is missing from the pictures.

`Whitening` is a stricter look at identity and a more lenient one at quality: it divides by the covariance that random
placement causes within a name, estimated on real pictures only. Real pictures reach 100 %, and so nearly do pictures
blurred to half their size, so it is reported beside the plain score and not instead of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Whitening:
    """Features are projected by `projection` [D, D] after subtraction of their set's `mean` [D]."""

    mean: Tensor
    projection: Tensor

    @classmethod
    def fit(cls, views: Tensor, *, shrinkage: float = 0.1) -> Whitening:
        """From the within-class covariance of V views of each of K names.

        Args:
            views: features [K, V, D] of real pictures, V >= 2.
            shrinkage: weight of the mean variance times identity, in (0, 1]; the covariance itself has a rank of at
                most K (V - 1).

        Raises:
            ValueError: a single view per name, or `shrinkage` out of range.
        """
        if views.ndim != 3 or views.shape[1] < 2:
            raise ValueError(f"views has shape {list(views.shape)}; allowed: [K, V, D] with V >= 2")
        if not 0.0 < shrinkage <= 1.0:
            raise ValueError(f"shrinkage is {shrinkage}; allowed: above 0, at most 1")
        names, count, dimensions = views.shape
        exact = views.double()
        within = (exact - exact.mean(1, keepdim=True)).reshape(-1, dimensions)
        covariance = within.T @ within / (names * (count - 1))
        identity = torch.eye(dimensions, dtype=torch.float64)
        covariance = (1.0 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * identity
        values, vectors = torch.linalg.eigh(covariance)
        return cls(views.mean((0, 1)), (vectors * values.clamp_min(1e-12).rsqrt()).float())

    def queries(self, features: Tensor) -> Tensor:
        """Projects features [N, D] of placed pictures."""
        return (features - self.mean) @ self.projection

    def database(self, features: Tensor) -> Tensor:
        """Projects features [K, D] of upright pictures, which all differ from placed ones in the same way."""
        return (features - features.mean(0)) @ self.projection


def ranks(queries: Tensor, database: Tensor, targets: Tensor) -> Tensor:
    """How many database entries are at least as near as the right one, itself not counted.

    Args:
        queries: features [N, D].
        database: features [K, D].
        targets: int64 [N], index of each query's own entry.

    Returns:
        int64 [N]; 0 is a hit. Ties count against the query, so that features without content score nothing.

    Raises:
        ValueError: shapes that do not fit, a target outside the database, or features that are not finite.
    """
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"queries and database are {list(queries.shape)} and {list(database.shape)}; allowed: [N, D], [K, D]"
        )
    if targets.shape != queries.shape[:1] or targets.min() < 0 or targets.max() >= len(database):
        raise ValueError(
            f"targets {list(targets.shape)} must be one index below {len(database)} for each of {len(queries)}"
        )
    if not (torch.isfinite(queries).all() and torch.isfinite(database).all()):
        raise ValueError("queries or database holds values that are not finite")
    similarity = functional.normalize(queries.double(), dim=1) @ functional.normalize(database.double(), dim=1).T
    own = similarity.gather(1, targets[:, None])
    # Copies of one picture give dot products that differ in the last bits: a tie is what is within 1e-9.
    return (similarity >= own - 1e-9).sum(1) - 1


def accuracy(found: Tensor, k: int) -> float:
    """Share of `ranks` below k."""
    return (found < k).double().mean().item()
