"""Which samples make up a batch, as a pure function of the seed and the number of images seen.

Samples fall into buckets, one per latent shape, and a batch comes from one bucket. A bucket of n samples is read as an
endless stream: all n in a random order, then all n in another, and so on; consecutive global batches of B are
consecutive pieces of it. After e epochs floor(n e / B) pieces have been used, so what is left of a pass, fewer than B
samples, opens the bucket's next epoch: nothing is dropped, nothing padded, and every sample comes once in every pass.
A batch that spans the end of a pass can hold a sample twice; a bucket of fewer than B samples fills every batch with
copies, which `LatentShards` warns of. Within an epoch the pieces come in random order.

So the position in all of this follows from the number of images seen, and nothing else has to be saved.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..random import generator


class Order:
    """The order of a data set with `counts[b]` samples in bucket b, for one seed; permutations in use are remembered.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        if not counts or min(counts) < 1:
            raise ValueError(f"counts is {list(counts)}; allowed: at least one bucket, and no empty ones")
        self.counts, self.seed = tuple(counts), seed
        self._kept: dict[tuple[int | str, int], Tensor] = {}

    def epoch_start(self, epoch: int, global_batch: int) -> int:
        """Global batches before `epoch`."""
        return sum(count * epoch // global_batch for count in self.counts)

    def batch(self, count: int, *, images: int, rank: int = 0, world_size: int = 1) -> tuple[int, Tensor]:
        """The batch that comes after `images` images have been seen.

        Args:
            count: samples for this rank.
            images: images that all ranks together have seen, a multiple of count * world_size.
            rank: which part of the global batch.
            world_size: parts of the global batch; as long as count * world_size stays, so do the global batches.

        Returns:
            The bucket, and int64 [count] positions within it.

        Raises:
            ValueError: `images` falls inside a batch, or a number is out of range.
        """
        size = count * world_size
        if count < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"count is {count}, rank {rank} of {world_size}; allowed: count > 0, 0 <= rank < world size"
            )
        if images < 0 or images % size:
            raise ValueError(f"images is {images}; allowed: multiples of the global batch, {count} x {world_size}")
        step = images // size
        epoch = self.epoch_of(step, size)
        schedule = self._schedule(epoch, size)
        place = step - self.epoch_start(epoch, size)
        bucket = int(schedule[place])
        piece = self.counts[bucket] * epoch // size + int((schedule[:place] == bucket).sum())
        stream = torch.arange(piece * size + rank * count, piece * size + (rank + 1) * count)
        return bucket, self._stream(bucket, stream)

    def epoch_of(self, step: int, global_batch: int) -> int:
        """The epoch that global batch number `step` belongs to."""
        # epoch_start(e) >= samples * e / B - buckets, so this epoch starts after `step`
        bound = (step + len(self.counts) + 1) * global_batch // sum(self.counts) + 1
        return bisect.bisect_right(range(bound + 1), step, key=lambda e: self.epoch_start(e, global_batch)) - 1

    def _schedule(self, epoch: int, global_batch: int) -> Tensor:
        """Buckets of the epoch's batches, in order."""

        def make() -> Tensor:
            pieces = [n * (epoch + 1) // global_batch - n * epoch // global_batch for n in self.counts]
            buckets = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(pieces))
            return buckets[torch.randperm(len(buckets), generator=generator(self.seed, epoch, "buckets"))]

        return self._remembered((f"schedule {global_batch}", epoch), make)

    def _stream(self, bucket: int, positions: Tensor) -> Tensor:
        count = self.counts[bucket]
        passes = positions // count
        chosen = torch.empty_like(positions)
        for number in passes.unique().tolist():
            here = passes == number

            def make(number: int = number) -> Tensor:
                return torch.randperm(count, generator=generator(self.seed, bucket, number, "samples"))

            chosen[here] = self._remembered((bucket, number), make)[positions[here] % count]
        return chosen

    def _remembered(self, key: tuple[int | str, int], make: Callable[[], Tensor]) -> Tensor:
        """The value of `key`; of each bucket, the last two passes asked for are kept."""
        found = self._kept.get(key)
        if found is None:
            found = make()
            kept = dict(self._kept)  # replaced, not changed: other threads may be reading
            for old in [other for other in kept if other[0] == key[0]][:-1]:
                del kept[old]
            kept[key] = found
            self._kept = kept
        return found
