# SPDX-License-Identifier: Apache-2.0
"""Distances within a prompt, by hand and at the extremes."""

import pytest
import torch

from sdxl_fast.eval.diversity import Diversity, within_prompt_diversity


def _flat(*levels: float) -> torch.Tensor:
    return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()


def test_by_hand() -> None:
    images = _flat(0.0, 0.5, 1.0, 0.2, 0.2, 0.9)
    features = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 1.0], [1.0, 0], [-1.0, 0], [1.0, 0]])
    found = within_prompt_diversity(images, features, torch.tensor([7, 7, 7, 3, 3, 5]))
    # Prompt 7, layout: (0.5 + 0.5 + 1) / 3, content: (1 + 2 (1 - sqrt 1/2)) / 3. Prompt 3: 0 and 2. Prompt 5: no pair.
    assert found.prompts == 2
    assert found.layout == pytest.approx((2 / 3 + 0.0) / 2)
    assert found.content == pytest.approx(((3 - 2**0.5) / 3 + 2.0) / 2)


def test_copies_have_none() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    features = torch.rand(1, 9, generator=torch.Generator().manual_seed(1)).expand(6, -1)
    found = within_prompt_diversity(image, features, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert found.layout == 0.0
    assert found.content == pytest.approx(0.0, abs=1e-12)


def test_difference_between_prompts_does_not_count() -> None:
    images, features = _flat(0.0, 0.0, 1.0, 1.0), torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]])
    apart = within_prompt_diversity(images, features, torch.tensor([0, 0, 1, 1]))
    mixed = within_prompt_diversity(images, features, torch.tensor([0, 1, 0, 1]))
    assert (apart.layout, apart.content) == (0.0, 0.0)
    assert (mixed.layout, mixed.content) == (1.0, 1.0)


def test_grain_is_no_layout() -> None:
    draw = torch.Generator().manual_seed(0)
    grain = (0.5 + 0.1 * torch.randn(4, 3, 256, 256, generator=draw)).clamp(0, 1)
    found = within_prompt_diversity(grain, torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    assert found.layout < 0.1 * 0.1 * 2**0.5  # a tenth of the pixels' own distance


def test_relative_is_the_geometric_mean() -> None:
    teacher = Diversity(content=0.4, layout=0.2, prompts=3)
    assert Diversity(content=0.2, layout=0.1, prompts=3).relative_to(teacher) == pytest.approx(0.5)
    assert Diversity(content=0.4, layout=0.05, prompts=3).relative_to(teacher) == pytest.approx(0.5)
    assert Diversity(content=0.4, layout=0.0, prompts=3).relative_to(teacher) == 0.0
    with pytest.raises(ValueError, match="nothing can be relative"):
        teacher.relative_to(Diversity(content=0.4, layout=0.0, prompts=3))


def test_refusals() -> None:
    images, features = _flat(0.0, 1.0), torch.ones(2, 4)
    with pytest.raises(ValueError, match="no prompt has two pictures"):
        within_prompt_diversity(images, features, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="do not fit 2 images"):
        within_prompt_diversity(images, features[:1], torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="at least 16 px"):
        within_prompt_diversity(images[..., :8], features, torch.tensor([0, 0]))
