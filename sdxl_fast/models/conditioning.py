"""What SDXL's UNet is told about a picture: two text encodings, the pooled one, and six size numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids [B, L] padded and cut to the tokenizer's length, int64 on the CPU."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids


def truncated(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts that are longer than the tokenizer's length, of which the encoders see only the beginning."""
    limit = tokenizer.model_max_length
    # a token covers at least one byte of text, so short prompts need no second look
    suspects = [prompt for prompt in prompts if len(prompt.encode()) > limit - 2]
    # not verbose: its warning says that the encoders will fail, which cut what is too long
    return [prompt for prompt in suspects if len(tokenizer(prompt, verbose=False).input_ids) > limit]


def encode_prompts(
    prompts: Sequence[str],
    tokenizers: tuple[Any, Any],
    text_encoders: tuple[nn.Module, nn.Module],
) -> tuple[Tensor, Tensor]:
    """Encode prompts as diffusers' SDXL pipeline does (without its textual-inversion expansion).

    Args:
        prompts: texts for both encoders.
        tokenizers: CLIP tokenizers of the two encoders.
        text_encoders: `CLIPTextModel` and `CLIPTextModelWithProjection`.

    Returns:
        prompt_embeds [B, L, width1 + width2] and pooled_prompt_embeds [B, projection of encoder 2], on the encoders'
        device in their dtype.
    """
    outputs = []
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        device = next(encoder.parameters()).device
        outputs.append(encoder(tokenize(tokenizer, prompts).to(device), output_hidden_states=True))
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1][0]


def time_ids(
    height: int,
    width: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """SDXL's micro-conditioning [batch, 6] in pixels, height first: original size, crop at 0, 0, target size."""
    row = [height, width, 0, 0, height, width]
    return torch.tensor([row], dtype=dtype, device=device).expand(batch, -1)
