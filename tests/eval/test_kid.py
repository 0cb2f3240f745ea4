# SPDX-License-Identifier: Apache-2.0
"""The kernel distance against its definition, and its error against the spread it claims."""

import pytest
import torch

from sdxl_fast.eval.kid import excess, kernel_distance


def _by_definition(x: torch.Tensor, y: torch.Tensor) -> float:
    """Term by term over ordered pairs of different samples."""

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2.0 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_by_hand() -> None:
    # d = 1; x is all 0 (kernel 1 with anything), y all 1 (kernel 8 within): 1 + 8 - 2.
    assert kernel_distance(torch.zeros(4, 1), torch.ones(6, 1), blocks=2).value == pytest.approx(7.0)


@pytest.mark.parametrize("blocks", [2, 3, 7])
def test_definition_and_each_replicate(blocks: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, generator=draw, dtype=torch.float64)
    y = torch.randn(9, 3, generator=draw, dtype=torch.float64) + 0.5
    found = kernel_distance(x, y, blocks=blocks)
    assert found.value == pytest.approx(_by_definition(x, y), rel=1e-12)
    for b in range(blocks):
        rest_x = torch.cat([part for i, part in enumerate(x.tensor_split(blocks)) if i != b])
        rest_y = torch.cat([part for i, part in enumerate(y.tensor_split(blocks)) if i != b])
        assert found.replicates[b].item() == pytest.approx(_by_definition(rest_x, rest_y), rel=1e-11, abs=1e-12)


def test_unbiased_and_error_as_claimed() -> None:
    """300 pairs of samples of one distribution: the mean is 0, and the spread is what the errors say."""
    draw = torch.Generator().manual_seed(2)
    found = [
        kernel_distance(torch.randn(60, 8, generator=draw), torch.randn(60, 8, generator=draw), blocks=10)
        for _ in range(300)
    ]
    values = torch.tensor([result.value for result in found])
    errors = torch.tensor([result.standard_error for result in found])
    assert abs(values.mean()) < 3.5 * values.std() / len(values) ** 0.5
    # Between equal distributions the statistic is degenerate and the jackknife errs on the careful side.
    assert 0.8 < errors.square().mean().sqrt() / values.std() < 2.0
    # A biased estimate (diagonal kept) would sit this far off, well outside what is accepted above.
    diagonal = ((8 / 8 + 1.0) ** 3 - 1.0) * 2 / 60
    assert diagonal > 10 * values.std() / len(values) ** 0.5


def test_error_between_different_distributions() -> None:
    draw = torch.Generator().manual_seed(3)
    found = [
        kernel_distance(torch.randn(80, 8, generator=draw), torch.randn(80, 8, generator=draw) + 0.6, blocks=10)
        for _ in range(200)
    ]
    values = torch.tensor([result.value for result in found])
    errors = torch.tensor([result.standard_error for result in found])
    assert 0.8 < errors.square().mean().sqrt() / values.std() < 1.25
    assert values.min() > 0


def test_excess_cancels_what_is_shared() -> None:
    draw = torch.Generator().manual_seed(4)
    reference, base = torch.randn(200, 8, generator=draw), torch.randn(200, 8, generator=draw) + 0.5
    near, far = kernel_distance(base, reference), kernel_distance(base * 1.02, reference)
    difference, error = excess(far, near)
    assert difference == pytest.approx(far.value - near.value)
    assert error < 0.2 * (near.standard_error**2 + far.standard_error**2) ** 0.5
    assert excess(near, near) == (0.0, 0.0)


def test_refusals() -> None:
    x = torch.randn(40, 4)
    with pytest.raises(ValueError, match=r"allowed: \[N, D\] and \[M, D\]"):
        kernel_distance(x, torch.randn(40, 5))
    with pytest.raises(ValueError, match="3 and 40 samples"):
        kernel_distance(x[:3], x, blocks=2)
    with pytest.raises(ValueError, match="10 and 40 samples for 20 blocks"):
        kernel_distance(x[:10], x)
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(x * float("nan"), x)
    with pytest.raises(ValueError, match="20 and 10 blocks"):
        excess(kernel_distance(x, x), kernel_distance(x, x, blocks=10))
