# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance against closed forms."""

import pytest
import torch

from sdxl_fast.eval.frechet import frechet_distance, frechet_distance_of_moments


def test_commuting_covariances_by_hand() -> None:
    # |(1, 2)|^2 = 5, and (sqrt 4 - sqrt 9)^2 + (sqrt 16 - sqrt 1)^2 = 1 + 9.
    a, b = torch.diag(torch.tensor([4.0, 16.0])), torch.diag(torch.tensor([9.0, 1.0]))
    assert frechet_distance_of_moments(torch.zeros(2), a, torch.tensor([1.0, 2.0]), b) == pytest.approx(15.0)


def test_covariances_that_do_not_commute() -> None:
    """In two dimensions tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det AB))."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)
    product = a @ b
    cross = (product.trace() + 2.0 * product.det().sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2.0 * cross).item()
    zero = torch.zeros(2, dtype=torch.float64)
    assert frechet_distance_of_moments(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)


def test_singular_covariance() -> None:
    one = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    zero = torch.zeros(2)
    assert frechet_distance_of_moments(zero, one, zero, one) == pytest.approx(0.0, abs=1e-9)


def test_shift_of_a_sample() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x, x + torch.tensor([3.0, 0.0, 0.0, 0.0])) == pytest.approx(9.0, rel=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="more samples than dimensions"):
        frechet_distance(torch.randn(8, 8), torch.randn(50, 8))
    with pytest.raises(ValueError, match=r"\[50, 8\] and \[50, 7\]"):
        frechet_distance(torch.randn(50, 8), torch.randn(50, 7))
