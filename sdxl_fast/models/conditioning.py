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


def encode_prompts(
    prompts: Sequence[str],
    tokenizers: tuple[Any, Any],
    text_encoders: tuple[nn.Module, nn.Module],
    *,
    prompts_2: Sequence[str] | None = None,
    clip_skip: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode prompts as diffusers' SDXL pipeline does (without its textual-inversion expansion).

    Args:
        prompts: texts for both encoders.
        tokenizers: CLIP tokenizers of the two encoders.
        text_encoders: `CLIPTextModel` and `CLIPTextModelWithProjection`.
        prompts_2: other texts for the second encoder.
        clip_skip: skip this many more layers than SDXL does, which reads the penultimate one.

    Returns:
        prompt_embeds [B, L, width1 + width2] and pooled_prompt_embeds [B, projection of encoder 2], on the encoders'
        device in their dtype.
    """
    layer = -2 - (clip_skip or 0)
    outputs = []
    for texts, tokenizer, encoder in zip((prompts, prompts_2 or prompts), tokenizers, text_encoders, strict=True):
        device = next(encoder.parameters()).device
        outputs.append(encoder(tokenize(tokenizer, texts).to(device), output_hidden_states=True))
    return torch.cat([output.hidden_states[layer] for output in outputs], dim=-1), outputs[1][0]


def time_ids(
    height: int,
    width: int,
    *,
    batch: int = 1,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """SDXL's micro-conditioning [batch, 6] in pixels: original size, crop top and left, target size (height first)."""
    row = [*(original_size or (height, width)), *crop, height, width]
    return torch.tensor([row], dtype=dtype, device=device).expand(batch, -1)
