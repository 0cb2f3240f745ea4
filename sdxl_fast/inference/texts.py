"""The text encoders: run through a CUDA graph where there is one, and watched, because their results are kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.conditioning import tokenize
from .graphs import GraphCache, through
from .text_program import penultimate
from .watch import Change, Watch


def encode_texts(
    texts: Sequence[str],
    tokenizers: tuple[Any, Any],
    encoders: tuple[nn.Module, nn.Module],
    graphs: GraphCache | None,
    weights: Hashable,
) -> tuple[Tensor, Tensor]:
    """prompt_embeds [B, L, D] and pooled_prompt_embeds [B, P], as `models.conditioning.encode_prompts` makes them.

    Args:
        texts: for both encoders.
        tokenizers, encoders: of the pipeline.
        graphs: where the encoders are captured, one graph for each number of texts; None runs them as they are.
        weights: identity of the encoders' weights, as `TextWatch.identity`.
    """
    device = next(encoders[0].parameters()).device
    ids = tuple(tokenize(tokenizer, texts).to(device) for tokenizer in tokenizers)

    def towers(*tokens: Tensor) -> tuple[Tensor, Tensor]:
        (first, _), (second, pooled) = (penultimate(t, ids) for t, ids in zip(encoders, tokens, strict=True))
        if pooled is None:
            raise ModelError(f"the second text encoder, a {type(encoders[1]).__name__}, has no projection")
        return torch.cat((first, second), -1), pooled

    def joined(*tokens: Tensor) -> Tensor:
        embeds, pooled = towers(*tokens)
        return torch.cat((embeds.flatten(1), pooled), 1)  # a graph gives back one tensor

    if graphs is None:
        return towers(*ids)
    both = through(graphs, "text", joined, ids, weights)
    pooled = pooled_width(encoders[1])
    return both[:, :-pooled].unflatten(1, (ids[0].shape[1], -1)), both[:, -pooled:]


def pooled_width(encoder: Any) -> int:
    """Width of the pooled embedding of the second text encoder."""
    return int(encoder.config.projection_dim)


class TextWatch:
    """Looks at text encoders before their cached results are used."""

    def __init__(self) -> None:
        self._watches: dict[int, Watch] = {}

    def changed(self, encoders: Sequence[nn.Module | None]) -> bool:
        """Whether any of them, or its weights, is another one than at the last look."""
        present = [encoder for encoder in encoders if encoder is not None]
        found = False
        for index, encoder in enumerate(present):
            watch = self._watches.get(index)
            if watch is None or watch.network is not encoder:
                found = found or watch is not None
                self._watches[index] = Watch(encoder)
            elif watch.look() is not Change.NONE:
                found = True
        return found

    @property
    def identity(self) -> Hashable:
        """Stands for the addresses of all weights."""
        return tuple(watch.identity for watch in self._watches.values())

    def settle(self) -> None:
        """Take the present state for the one to compare with: transformers installs hooks while it first encodes."""
        for watch in self._watches.values():
            watch.look()

    def touch(self) -> None:
        """Say that weights changed without leaving a trace."""
        for watch in self._watches.values():
            watch.touch()


def adapted(encoder: Any) -> bool:
    """Whether peft's layers are in it, whose strength can change from call to call."""
    return encoder is not None and any(type(module).__module__.startswith("peft.") for module in encoder.modules())
