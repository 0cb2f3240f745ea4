"""Prompts are encoded once, found again as the same tensors, and forgotten when somebody wrote into them."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxl_fast.inference.prompts import PromptCache


class _Encoder:
    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        self.calls.append(texts)
        values = torch.tensor([float(len(text)) for text in texts])
        return values.view(-1, 1, 1).expand(-1, 2, 3).clone(), values.view(-1, 1).clone()


def test_a_batch_that_comes_again_is_the_same_tensors() -> None:
    cache, encode = PromptCache(), _Encoder()
    first = cache.encode(["a", "bb", "a"], 1, encode)
    assert first[1].flatten().tolist() == [1.0, 2.0, 1.0]
    assert encode.calls == [["a", "bb"]]
    again = cache.encode(["a", "bb", "a"], 1, encode)
    assert again[0] is first[0]
    assert (cache.hits, cache.misses) == (1, 1)


def test_prompts_are_shared_between_batches_and_repeated() -> None:
    cache, encode = PromptCache(), _Encoder()
    cache.encode(["a", "bb"], 1, encode)
    embeds, pooled = cache.encode(["bb", "ccc"], 2, encode)
    assert encode.calls == [["a", "bb"], ["ccc"]]
    assert pooled.flatten().tolist() == [2.0, 2.0, 3.0, 3.0]
    assert embeds.shape == (4, 2, 3)


def test_one_prompt_is_held_once() -> None:
    cache, encode = PromptCache(), _Encoder()
    first = cache.encode(["a"], 1, encode)
    assert cache.encode(["a"], 1, encode)[0] is first[0]
    assert (len(cache), cache.hits) == (1, 1)
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in first)


def test_written_tensors_are_forgotten() -> None:
    cache, encode = PromptCache(), _Encoder()
    embeds, _ = cache.encode(["a"], 1, encode)
    embeds.mul_(2)
    assert cache.encode(["a"], 1, encode)[0].max() == 1.0


def test_it_stays_within_its_bytes() -> None:
    cache, encode = PromptCache(budget=1000), _Encoder()
    for number in range(200):
        text = "x" * (number % 37)
        assert cache.encode([text], 1, encode)[1].item() == len(text)
        assert cache.nbytes <= 1000
    cache.clear()
    assert cache.nbytes == 0


def test_a_batch_larger_than_the_cache_is_still_encoded() -> None:
    cache, encode = PromptCache(budget=10), _Encoder()
    assert cache.encode(["a", "bb"], 1, encode)[1].flatten().tolist() == [1.0, 2.0]
    assert len(cache) == 0
