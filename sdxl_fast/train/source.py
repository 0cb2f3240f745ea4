"""Where a distillation's clean latents and their texts come from: drawings of the embedded set, or prepared shards."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..data.captions import LatentSet
from ..data.shards import LatentShards
from ..random import derive_seed

Condition = dict[str, Tensor]
Batch = tuple[Tensor, Condition]
THREADS = 4  # that read ahead, each on one core


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


class Prefetch:
    """A source whose next batches threads are reading: what comes, and in which order, is the source's alone.

    Whoever asks for a share of a batch, for one use, is expected to ask for the same of the next batch, so each use
    and each micro-batch is read a step ahead, and a batch is kept until its step is over. What is asked for out of turn
    (by a resumed run, or where inputs repeat) is read then. Threads suffice: a sample of SDXL's takes 1.2 to 1.6 ms to
    read and copy (one Zen 4 core, warm file cache).

    Args:
        source: one that is safe to use from several threads.
        pin: put batches into pinned memory, from which copies to a GPU need not wait.
    """

    def __init__(self, source: Source, *, pin: bool = False) -> None:
        self.source, self.pin = source, pin
        self._coming: dict[tuple[object, ...], dict[int, Future[Batch]]] = {}
        # else each has a team of threads of its own, on the cores that the training computes on
        self._threads = ThreadPoolExecutor(THREADS, "batches", initializer=torch.set_num_threads, initargs=(1,))

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return self.source.shapes

    def _read(self, count: int, share: slice, key: tuple[int | str, ...], images: int, text_of_next: bool) -> Batch:
        latents, condition = self.source.batch(count, share, key, images, text_of_next=text_of_next)
        if self.pin:
            latents, condition = latents.pin_memory(), {name: rows.pin_memory() for name, rows in condition.items()}
        return latents, condition

    def batch(self, count: int, share: slice, key: tuple[int | str, ...], images: int, *, text_of_next: bool) -> Batch:
        """As the source gives it, and not to be written to; raises what the source raises."""
        coming = self._coming.setdefault((count, share.start, share.stop, key, text_of_next), {})
        wanted = (images, images + count)
        for other in coming.keys() - set(wanted):
            coming.pop(other).cancel()
        for one in wanted:
            if one not in coming:
                coming[one] = self._threads.submit(self._read, count, share, key, one, text_of_next)
        return coming[images].result()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
