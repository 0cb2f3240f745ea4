"""What diffusers' tests load from the hub's test accounts, made here: a CLIP tokenizer and a tiny text encoder.

Words become other tokens and weights are other random numbers than the hub's; classes, shapes and special tokens are
the same.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
import transformers

from ..models.tokenizer import save_tokenizer, train_tokenizer
from .toy import CAPTIONS

_ACCOUNTS = ("hf-internal-testing/", "peft-internal-testing/")
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "projection_dim": 32,
    "vocab_size": 1000,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_act": "gelu",
}
"""The text encoder that diffusers' SDXL tests describe themselves where they do not load one."""


def put_in_place() -> None:
    """From now on `from_pretrained` of a test account reads the stand-ins; of anything else, what it always did."""
    for kind in (transformers.CLIPTokenizer, transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection):
        _redirect(kind)


def _redirect(kind: Any) -> None:
    stock = kind.from_pretrained.__func__

    @functools.wraps(stock)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        here = _folder().name if str(name).startswith(_ACCOUNTS) else name
        return stock(cls, here, *args, **kwargs)

    kind.from_pretrained = classmethod(from_pretrained)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the stand-ins lie, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="sdxl_fast_stand_ins_")
    save_tokenizer(train_tokenizer(CAPTIONS, vocab_size=560), folder.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder: Any = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**_TEXT))
    encoder.save_pretrained(folder.name)
    return folder
