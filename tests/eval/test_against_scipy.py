# SPDX-License-Identifier: Apache-2.0
"""Every number of a report against a float64 computation by SciPy and NumPy that shares no code with it, to 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdxl_fast.eval.clip_score import clip_scores
from sdxl_fast.eval.frechet import frechet_distance
from sdxl_fast.eval.kid import kernel_distance
from sdxl_fast.eval.sharpness import laplacian_variance

linalg = pytest.importorskip("scipy.linalg", reason="SciPy is missing")
ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy is missing")


def _features(count: int, dimensions: int, seed: int) -> torch.Tensor:
    """Correlated, not centred, of unequal scales: as the features of a network."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(dimensions, dimensions)) * np.geomspace(0.05, 2.0, dimensions)
    return torch.from_numpy(draw.normal(size=(count, dimensions)) @ mix + draw.normal(size=dimensions)).float()


@pytest.mark.parametrize("dimensions", [3, 40])
def test_frechet_distance(dimensions: int) -> None:
    a, b = _features(200, dimensions, 0), _features(170, dimensions, 1)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * np.real(root))
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_singular_covariances() -> None:
    """As a network gives them: 512 features, many zero, 9 always, spread over six orders, hardly more pictures."""
    draw = np.random.default_rng(0)
    mix = draw.normal(size=(512, 512)) * np.geomspace(1e-3, 2, 512)
    x = np.maximum(draw.normal(size=(700, 512)) @ mix, 0)
    y = np.maximum(draw.normal(size=(600, 512)) @ mix + 0.1, 0)
    x[:, :9] = y[:, :9] = 0
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    assert max(np.linalg.matrix_rank(c) for c in covariances) <= 503
    # the trace of the root is the sum of the eigenvalues' roots; sqrtm warns of singular matrices
    root = np.sqrt(np.maximum(linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    shift = x.mean(0) - y.mean(0)
    expected = float(shift @ shift + np.trace(covariances[0] + covariances[1]) - 2 * root)
    found = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_the_u_statistic() -> None:
    a, b = _features(23, 5, 2), _features(31, 5, 3)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / 5 + 1.0) ** 3)

    within_x = np.mean([kernel(x[i], x[j]) for i in range(23) for j in range(23) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(31) for j in range(31) if i != j])
    across = np.mean([kernel(u, v) for u in x for v in y])
    assert kernel_distance(a, b, blocks=5).value == pytest.approx(within_x + within_y - 2 * across, rel=1e-6)


def test_kernel_distance_is_unbiased() -> None:
    """Two samples of one distribution: the mean over many draws is zero within its own error, as no FID's is."""
    values = [kernel_distance(_features(12, 3, 10), torch.randn(12, 3), blocks=2).value for _ in range(2)]
    assert values[0] != values[1]
    draw = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [
            kernel_distance(torch.randn(12, 3, generator=draw), torch.randn(12, 3, generator=draw), blocks=2).value
            for _ in range(400)
        ]
    )
    assert abs(found.mean()) < 3 * found.std() / 400**0.5


def test_clip_score() -> None:
    a, b = _features(9, 16, 4), _features(9, 16, 5)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    cosines = np.einsum("nd,nd->n", x, y) / (linalg.norm(x, axis=1) * linalg.norm(y, axis=1))
    assert (cosines < 0).any() and (cosines > 0).any()
    np.testing.assert_allclose(clip_scores(a, b).numpy(), 100 * np.maximum(cosines, 0), rtol=1e-6, atol=1e-9)


def test_sharpness() -> None:
    images = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(6))
    weights = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=np.float64)
    for image, found in zip(images, laplacian_variance(images), strict=True):
        luma = np.tensordot([0.299, 0.587, 0.114], image.numpy().astype(np.float64), axes=1)
        inner = ndimage.correlate(luma, weights)[1:-1, 1:-1]
        assert found.item() == pytest.approx(inner.var(), rel=1e-6)
