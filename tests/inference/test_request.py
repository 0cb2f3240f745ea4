"""What callers may ask for, and the noise they get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from sdxl_fast.inference.request import (
    MAX_SIDE,
    check_latents,
    check_noise,
    check_output,
    check_prompts,
    check_seeds,
    check_size,
)

CPU = torch.device("cpu")


def _noise(seed: Any, prompts: int, per_prompt: int = 1, size: int = 8) -> torch.Tensor:
    noise = check_noise(seed, None, None, num_prompts=prompts, per_prompt=per_prompt)
    return noise.initial((prompts * per_prompt, 4, size, size), dtype=torch.float32, device=CPU)


def test_noise_is_bitwise_the_same_alone_and_in_a_batch() -> None:
    batch = _noise([7, 3, 7, 123456789012345], 4)
    for row, seed in zip(batch, [7, 3, 7, 123456789012345], strict=True):
        assert torch.equal(row, _noise(seed, 1)[0])
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])


def test_seeds_of_further_pictures_count_up() -> None:
    assert check_seeds(5, 2, 1).tolist() == [5, 5]
    assert check_seeds(5, 2, 3).tolist() == [5, 6, 7, 5, 6, 7]
    assert check_seeds([5, 9], 2, 2).tolist() == [5, 6, 9, 10]
    assert check_seeds([1, 2, 3, 4], 2, 2).tolist() == [1, 2, 3, 4]


def test_no_seed_draws_from_the_default_generator() -> None:
    torch.manual_seed(1)
    first = check_seeds(None, 3, 1)
    torch.manual_seed(1)
    assert torch.equal(check_seeds(None, 3, 1), first)
    assert len(set(first.tolist())) == 3


def test_fresh_draws_differ_from_the_initial_noise_and_from_each_other() -> None:
    noise = check_noise(1, None, None, num_prompts=1, per_prompt=1)
    shape = (1, 4, 16, 16)
    draws = [noise.draw(shape, stream=k, dtype=torch.float32, device=CPU).flatten() for k in (None, 16, 17)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(3)
    assert correlation.abs().max() < 5 / 1024**0.5


def test_a_generator_draws_as_diffusers_does() -> None:
    shape = (2, 4, 8, 8)
    for make in (lambda: torch.Generator().manual_seed(3), lambda: [torch.Generator().manual_seed(k) for k in (3, 4)]):
        noise = check_noise(None, make(), None, num_prompts=2, per_prompt=1)
        got = noise.initial(shape, dtype=torch.float32, device=CPU)
        assert torch.equal(got, randn_tensor(shape, generator=make(), device=CPU, dtype=torch.float32))


def test_given_latents_are_the_noise() -> None:
    latents = torch.randn(1, 4, 8, 8)
    noise = check_noise(None, None, latents, num_prompts=1, per_prompt=1)
    assert noise.initial((1, 4, 8, 8), dtype=torch.float32, device=CPU) is latents


EMBEDS, POOLED = torch.zeros(2, 77, 8), torch.zeros(2, 8)
BAD: dict[str, tuple[Any, str]] = {
    "empty list": (lambda: check_prompts([], None, None), "empty list"),
    "nothing": (lambda: check_prompts(None, None, None), "neither came"),
    "both": (lambda: check_prompts("a", EMBEDS, POOLED), "both came"),
    "not text": (lambda: check_prompts(["a", 3], None, None), "int"),  # type: ignore[list-item]
    "no pooled": (lambda: check_prompts(None, EMBEDS, None), "pooled_prompt_embeds is missing"),
    "pooled alone": (lambda: check_prompts("a", None, POOLED), "prompt_embeds is missing"),
    "rank": (lambda: check_prompts(None, EMBEDS[0], POOLED), r"\[B, L, D\]"),
    "no embeddings": (lambda: check_prompts(None, EMBEDS[:0], POOLED[:0]), r"\[B, L, D\]"),
    "not a multiple": (lambda: check_size(100, None, 64, 8), "height is 100.*multiples of 8.*nearest is 96"),
    "zero": (lambda: check_size(None, 0, 64, 8), "width is 0.*nearest is 8"),
    "too large": (lambda: check_size(None, MAX_SIDE * 2, 64, 8), f"nearest is {MAX_SIDE}"),
    "fraction": (lambda: check_size(64.0, None, 64, 8), "whole number"),  # type: ignore[arg-type]
    "latents of another batch": (lambda: check_latents(torch.zeros(1, 4, 8, 8), 2, 4, (None, None), 8), r"\[2, 4"),
    "latents of another size": (lambda: check_latents(torch.zeros(2, 4, 8, 8), 2, 4, (64, 32), 8), "width is 32"),
    "seed count": (lambda: check_seeds([1, 2, 3], 2, 2), "3 entries.*2 prompts.*4 pictures; give 2 or 4"),
    "negative seed": (lambda: check_seeds(-1, 1, 1), "seed is -1"),
    "seed too large": (lambda: check_seeds(2**63, 1, 1), "2\\^63-1"),
    "seed that is no integer": (lambda: check_seeds([1.5], 1, 1), "1.5"),  # type: ignore[list-item]
    "seed and generator": (lambda: check_noise(1, torch.Generator(), None, num_prompts=1, per_prompt=1), "not both"),
    "generators": (lambda: check_noise(None, [torch.Generator()], None, num_prompts=2, per_prompt=1), "1 entries"),
    "output type": (lambda: check_output("jpg", (), 1), "'jpg'; allowed: pil, np, pt, latent"),
    "callback tensor": (lambda: check_output("pil", ("noise",), 1), "'noise'; allowed: latents"),
    "no pictures": (lambda: check_output("pil", (), 0), "num_images_per_prompt is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_is_refused_with_what_is_allowed(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_default_to_the_native_one() -> None:
    assert check_size(None, None, 64, 8) == (64, 64)
    assert check_size(128, None, 64, 8) == (128, 64)
    assert check_latents(torch.zeros(2, 4, 8, 12), 2, 4, (None, 96), 8) == (64, 96)
