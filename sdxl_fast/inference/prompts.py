"""Prompts encoded once: text and pooled embeddings in an LRU of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .lru import ByteLru

DEFAULT_BUDGET = 64 << 20
"""Bytes: some 200 prompts of SDXL in bf16, 0.3 MB each."""

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]
Row = tuple[Tensor | None, ...]


class PromptCache:
    """Embeddings of prompts, alone and as the batches they were asked for.

    A batch that comes again is the same pair of tensors, by which the UNet's keys and values for it are found again.
    Prompts that are new are encoded together, so the last bits of an embedding depend on what it was first encoded
    with, as they do in every batched encoder. Whoever writes into a tensor from here makes the cache forget it.
    """

    def __init__(self, *, budget: int = DEFAULT_BUDGET) -> None:
        self._held: ByteLru[tuple[Row, tuple[int, ...]]] = ByteLru(budget)
        self.hits = 0
        self.misses = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._held.used

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> Row | None:
        """The tensors put there, unless somebody has written into them."""
        found = self._held.get(key)
        if found is None:
            return None
        row, versions = found
        if _versions(row) != versions:
            self._held.drop(key)
            return None
        return row

    def put(self, key: Hashable, value: Row) -> Row:
        """Hold tensors, unless they alone exceed the budget; returns them."""
        # a view keeps the whole of what it shows
        nbytes = sum(t.untyped_storage().nbytes() for t in value if t is not None)
        self._held.put(key, (value, _versions(value)), nbytes)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()

    def encode(self, prompts: Sequence[str], repeats: int, encode: Encode) -> tuple[Tensor, Tensor]:
        """prompt_embeds [B·repeats, L, D] and pooled_prompt_embeds [B·repeats, P] of prompts.

        Args:
            prompts: texts.
            repeats: rows of each, side by side.
            encode: makes the two tensors of texts that are not held.
        """
        batch: Any = (tuple(prompts), repeats)
        found: Any = self.get(batch)
        if found is not None:
            self.hits += 1
            return found[0], found[1]
        rows: dict[str, Any] = {text: self.get(text) for text in prompts}
        new = [text for text, row in rows.items() if row is None]
        if new:
            self.misses += 1
            embeds, pooled = encode(new)
            for index, text in enumerate(new):
                row = (embeds[index : index + 1], pooled[index : index + 1])
                # a view would keep the rows of all of them
                rows[text] = self.put(text, row if len(new) == 1 else tuple(part.clone() for part in row))
        else:
            self.hits += 1
        if len(prompts) == repeats == 1:
            return rows[prompts[0]]  # type: ignore[no-any-return]
        listed = [rows[text] for text in prompts for _ in range(repeats)]
        embeds, pooled = (torch.cat([row[part] for row in listed]) for part in (0, 1))
        self.put(batch, (embeds, pooled))
        return embeds, pooled


def _versions(row: Row) -> tuple[int, ...]:
    return tuple(-1 if t is None else t._version for t in row)
