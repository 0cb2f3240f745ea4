"""A CLIP tokenizer of one's own: byte-level BPE learnt from captions, in the file format every CLIP loader reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], *, vocab_size: int = 4096, max_tokens: int = 77) -> Any:
    """Learn a `CLIPTokenizer` from captions.

    The vocabulary holds the 256 bytes, alone and as the end of a word, the merges, and at its very end the two special
    tokens, as in OpenAI's: SDXL's text towers find the end of a prompt by its highest token id. Any text can be
    encoded. The order of captions does not matter; merges that occur equally often come in another order in each
    process, so keep the files.

    Args:
        captions: the texts to learn merges from; lower-cased by CLIP's own normaliser.
        vocab_size: upper bound, at least 514; fewer merges are learnt when the captions do not support more.
        max_tokens: length that prompts are padded and cut to, special tokens included.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    alphabet = _byte_alphabet()
    base = alphabet + [letter + "</w>" for letter in alphabet]
    if vocab_size < len(base) + 2:
        raise ValueError(f"vocab_size is {vocab_size}; the bytes and two special tokens alone need {len(base) + 2}")
    clip = CLIPTokenizer().backend_tokenizer  # its normaliser and pre-tokeniser define CLIP's splitting of text
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(sorted(captions), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: vocab_size - len(base) - 2]
    words = base + ["".join(merge) for merge in merges] + [BOS, EOS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    pairs: Any = merges  # pairs are what the class takes, whatever its annotation says
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=max_tokens)


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write `tokenizer` as `save_pretrained` does, with vocab.json and merges.txt for the loaders that want them."""
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes as, in a fixed order."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
