"""Where a distillation's clean latents and their texts come from: drawings of the embedded set, or prepared shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..data.captions import LatentSet
from ..data.shards import LatentShards
from ..random import derive_seed

Condition = dict[str, Tensor]


class Source(Protocol):
    """Batches as a function of what they are for, the same whatever the number of processes."""

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """C, h, w of the latents that occur; a batch has one of them."""
        ...

    def batch(
        self, count: int, share: slice, key: tuple[int | str, ...], images: int, *, text_of_next: bool
    ) -> tuple[Tensor, Condition]:
        """The `share` of the global batch of `count` samples that begins after `images` images.

        Args:
            count: samples of the global batch.
            share: which of them.
            key: seed, stage and use; another key is another order.
            images: images seen in this stage, a multiple of `count`.
            text_of_next: each latent with the text of the sample behind it in the global batch.

        Returns:
            latents [n, C, h, w]; prompt_embeds [n, L, D], pooled [n, P] and time_ids [n, 6].
        """
        ...


@dataclass
class Drawings:
    """The embedded set: latents of random drawings, and one row of text conditions per caption."""

    latents: LatentSet
    conditions: Condition
    category_share: float

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return [self.latents.shape]

    def batch(
        self, count: int, share: slice, key: tuple[int | str, ...], images: int, *, text_of_next: bool
    ) -> tuple[Tensor, Condition]:
        latents, captions = self.latents.batch(count, self.category_share, *key, images)
        captions = (captions.roll(-1) if text_of_next else captions)[share]
        return latents[share], {name: rows[captions] for name, rows in self.conditions.items()}


@dataclass
class Shards:
    """A folder made by `sdxl-fast data prepare`; a batch comes from one aspect-ratio bucket."""

    data: LatentShards

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return self.data.shapes

    def batch(
        self, count: int, share: slice, key: tuple[int | str, ...], images: int, *, text_of_next: bool
    ) -> tuple[Tensor, Condition]:
        positions = self.data.positions(count, seed=derive_seed(*key), images=images)
        latents, condition = self.data.read(positions[share])
        if text_of_next:
            _, other = self.data.read([*positions[1:], positions[0]][share])
            condition = {**other, "time_ids": condition["time_ids"]}
        return latents, condition
