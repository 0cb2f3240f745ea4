"""The learnt tokenizer is a CLIP tokenizer: any text in, special tokens at the ends, files that loaders read."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sdxl_fast.models.tokenizer import save_tokenizer, train_tokenizer

CAPTIONS = ["red apple", "green apple", "sailboat", "grinning face"] * 5


def test_words_of_the_captions_become_tokens() -> None:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Red APPLE").input_ids) == [
        "<|startoftext|>",
        "red</w>",
        "apple</w>",
        "<|endoftext|>",
    ]


def test_any_text_survives() -> None:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600)
    text = "ünïcode 🍎 and 123"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(
        " ", ""
    )
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]


def test_the_end_token_has_the_highest_id() -> None:
    """SDXL's towers with eos_token_id 2 in their config pool at the highest token id."""
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=530)
    assert len(tokenizer) == 530
    assert tokenizer.eos_token_id == 529


def test_the_order_of_captions_does_not_matter() -> None:
    forward, backward = (train_tokenizer(captions) for captions in (CAPTIONS, CAPTIONS[::-1]))
    assert forward.get_vocab() == backward.get_vocab()


@pytest.mark.parametrize("without", [[], ["tokenizer.json"]], ids=["all files", "vocab and merges only"])
def test_saved_files_load(tmp_path: Path, without: list[str]) -> None:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600, max_tokens=16)
    save_tokenizer(tokenizer, tmp_path)
    for name in without:
        (tmp_path / name).unlink()
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 16
    assert loaded("green apples!").input_ids == tokenizer("green apples!").input_ids


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="514"):
        train_tokenizer(CAPTIONS, vocab_size=500)
