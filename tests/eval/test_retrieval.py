# SPDX-License-Identifier: Apache-2.0
"""Ranks by hand, ties, and what the whitening is for."""

import pytest
import torch

from sdxl_fast.eval.retrieval import Whitening, accuracy, ranks


def test_ranks_by_hand() -> None:
    database = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    queries = torch.tensor([[2.0, 0.1], [2.0, 0.1], [2.0, 0.1], [2.0, 0.1], [0.0, 5.0]])
    found = ranks(queries, database, torch.tensor([0, 1, 2, 3, 2]))
    assert found.tolist() == [0, 1, 2, 3, 0]
    assert accuracy(found, 1) == pytest.approx(0.4)
    assert accuracy(found, 2) == pytest.approx(0.6)
    assert accuracy(found, 4) == 1.0


def test_identical_features_hit() -> None:
    database = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    assert accuracy(ranks(database * 3.0, database, torch.arange(30)), 1) == 1.0


def test_features_without_content_score_nothing() -> None:
    """Ties count against the query, also where rounding would break them."""
    same = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(20, 64)
    scaled = same * torch.rand(20, 1, generator=torch.Generator().manual_seed(1)).add(0.5)
    assert ranks(same, scaled, torch.arange(20)).tolist() == [19] * 20
    assert ranks(torch.zeros(3, 64), torch.randn(20, 64), torch.arange(3)).tolist() == [19] * 3


def test_unrelated_features_score_by_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    found = ranks(torch.randn(4000, 8, generator=draw), torch.randn(20, 8, generator=draw), torch.arange(4000) % 20)
    assert accuracy(found, 5) == pytest.approx(5 / 20, abs=0.04)


def _named_views(names: int, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Identity in 6 dimensions, drowned by what placement does in 2 others: [K, 8] upright and [K, V, 8] placed."""
    draw = torch.Generator().manual_seed(0)
    identity = torch.cat([torch.randn(names, 6, generator=draw), torch.zeros(names, 2)], dim=1)
    placement = torch.randn(names, views + 1, 8, generator=draw) * torch.tensor([0.05] * 6 + [6.0] * 2)
    seen = identity[:, None] + placement
    return seen[:, 0], seen[:, 1:]


def test_whitening_removes_what_varies_within_a_name() -> None:
    upright, placed = _named_views(40, 8)
    whitening = Whitening.fit(placed[:, :6], shrinkage=1e-4)
    queries = placed[:, 6:].reshape(-1, 8)
    targets = torch.arange(40).repeat_interleave(2)
    plain = accuracy(ranks(queries, upright, targets), 1)
    white = accuracy(ranks(whitening.queries(queries), whitening.database(upright), targets), 1)
    assert plain < 0.5
    assert white > 0.95


def test_whitened_views_have_unit_covariance_within_names() -> None:
    _, placed = _named_views(40, 8)
    whitening = Whitening.fit(placed, shrinkage=1e-9)
    white = whitening.queries(placed.reshape(-1, 8)).reshape(40, 8, 8).double()
    within = (white - white.mean(1, keepdim=True)).reshape(-1, 8)
    covariance = within.T @ within / (40 * 7)
    assert torch.allclose(covariance, torch.eye(8, dtype=torch.float64), atol=1e-4)
    assert white.mean((0, 1)).abs().max() < 1e-3


def test_refusals() -> None:
    with pytest.raises(ValueError, match="V >= 2"):
        Whitening.fit(torch.randn(4, 1, 8))
    with pytest.raises(ValueError, match="shrinkage is 0"):
        Whitening.fit(torch.randn(4, 2, 8), shrinkage=0.0)
    with pytest.raises(ValueError, match="below 4"):
        ranks(torch.randn(2, 8), torch.randn(4, 8), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"\[2, 8\] and \[4, 7\]"):
        ranks(torch.randn(2, 8), torch.randn(4, 7), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="not finite"):
        ranks(torch.full((1, 8), torch.nan), torch.randn(4, 8), torch.tensor([0]))
