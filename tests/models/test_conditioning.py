"""Prompts are encoded, and sizes told, as diffusers' SDXL pipeline does."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_fast.models import loading
from sdxl_fast.models.conditioning import encode_prompts, time_ids, truncated


def test_encoding_equals_diffusers(toy_folder: Path) -> None:
    parts = loading.load(toy_folder, dtype=torch.float32, device="cpu")
    stock = StableDiffusionXLPipeline.from_pretrained(toy_folder)
    prompts = ["red apple", "a house with a garden, " * 30]
    got = encode_prompts(prompts, (parts.tokenizer, parts.tokenizer_2), (parts.text_encoder, parts.text_encoder_2))
    with torch.no_grad():
        embeds, _, pooled, _ = stock.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(got[0], embeds)
    assert torch.equal(got[1], pooled)


def test_time_ids_are_height_first() -> None:
    assert time_ids(512, 768, batch=2).tolist() == [[512.0, 768.0, 0.0, 0.0, 512.0, 768.0]] * 2


def test_only_prompts_beyond_the_limit_count_as_truncated(toy_folder: Path) -> None:
    tokenizer = loading.load(toy_folder, dtype=torch.float32, device="cpu").tokenizer
    fits, too_long = " ".join(["cat"] * 75), " ".join(["cat"] * 76)
    assert len(tokenizer(fits).input_ids) == 77
    assert truncated(tokenizer, ["cat", fits, too_long]) == [too_long]
