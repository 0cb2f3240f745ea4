"""The order of samples: complete, shuffled, shared out over ranks, and a function of the images seen alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from sdxl_fast.data.order import Order

COUNTS = (37, 8, 3, 50)
SIZE = 8


def _batches(order: Order, count: int, first: int, last: int, world_size: int = 1) -> list[tuple[int, list[int]]]:
    """Global batches number first..last-1, put together from all ranks."""
    found = []
    for step in range(first, last):
        images = step * count * world_size
        parts = [order.batch(count, images=images, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({bucket for bucket, _ in parts}) == 1
        found.append((parts[0][0], [position for _, rows in parts for position in rows.tolist()]))
    return found


def test_every_sample_comes_once_in_every_pass() -> None:
    """Each bucket's batches, put end to end, are permutation after permutation of its samples."""
    batches = _batches(Order(COUNTS, 0), SIZE, 0, 200)
    passes = 0
    for bucket, count in enumerate(COUNTS):
        stream = [position for b, rows in batches if b == bucket for position in rows]
        whole = [stream[first : first + count] for first in range(0, len(stream) - count + 1, count)]
        assert all(sorted(one) == list(range(count)) for one in whole)
        assert len({tuple(one) for one in whole}) > min(4, len(whole) - 1)  # and they differ
        passes += len(whole)
    assert passes > 60


def test_an_epoch_leaves_less_than_a_batch_of_each_bucket() -> None:
    order = Order(COUNTS, 0)
    for epoch in (1, 2, 7):
        seen = Counter(bucket for bucket, _ in _batches(order, SIZE, 0, order.epoch_start(epoch, SIZE)))
        for bucket, count in enumerate(COUNTS):
            assert 0 <= count * epoch - seen[bucket] * SIZE < SIZE


def test_buckets_come_in_random_order_within_an_epoch() -> None:
    order = Order((80, 80), 0)
    epochs = [[bucket for bucket, _ in _batches(order, SIZE, 20 * e, 20 * e + 20)] for e in range(3)]
    assert all(sorted(epoch) == [0] * 10 + [1] * 10 for epoch in epochs)
    assert sorted(epochs[0]) != epochs[0] and epochs[0] != epochs[1] != epochs[2]


def test_a_batch_is_a_function_of_its_arguments_alone() -> None:
    """Whatever was asked before: the position is found from the number of images seen."""
    one, other = Order(COUNTS, 3), Order(COUNTS, 3)
    forwards = _batches(one, SIZE, 0, 120)
    backwards = [_batches(other, SIZE, step, step + 1)[0] for step in reversed(range(120))][::-1]
    assert forwards == backwards
    assert _batches(Order(COUNTS, 3), SIZE, 77, 120) == forwards[77:]
    assert _batches(Order(COUNTS, 4), SIZE, 0, 120) != forwards


def test_another_process_finds_the_same() -> None:
    code = (
        "from sdxl_fast.data.order import Order\n"
        f"bucket, rows = Order({COUNTS}, 3).batch({SIZE}, images={SIZE} * 55)\n"
        "print(bucket, rows.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bucket, rows = Order(COUNTS, 3).batch(SIZE, images=SIZE * 55)
    assert done.stdout.strip() == f"{bucket} {rows.tolist()}"


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_batches_of_one(world_size: int) -> None:
    order = Order(COUNTS, 0)
    assert _batches(order, SIZE // world_size, 0, 60, world_size) == _batches(order, SIZE, 0, 60)


def test_buckets_smaller_than_a_batch_take_their_turn() -> None:
    order = Order((3, 1), 0)
    batches = _batches(order, SIZE, 0, 12)
    assert Counter(bucket for bucket, _ in batches) == {0: 9, 1: 3}
    assert Counter(position for bucket, rows in batches if bucket == 0 for position in rows) == {0: 24, 1: 24, 2: 24}


def test_far_into_a_large_set() -> None:
    """Found by bisection, not by counting."""
    order = Order([1_000_003, 99_991], 1)
    step = 10**12
    epoch = order.epoch_of(step, 512)
    assert order.epoch_start(epoch, 512) <= step < order.epoch_start(epoch + 1, 512)
    bucket, rows = order.batch(64, images=step * 512, rank=7, world_size=8)
    assert len(set(rows.tolist())) == 64 and rows.max() < order.counts[bucket]


def test_impossible_arguments() -> None:
    order = Order(COUNTS, 0)
    for arguments, message in (
        ({"count": 4, "images": 3}, "multiples of the global batch, 4 x 1"),
        ({"count": 4, "images": 4, "world_size": 2}, "4 x 2"),
        ({"count": 4, "images": -4}, "images is -4"),
        ({"count": 0, "images": 0}, "count is 0"),
        ({"count": 4, "images": 0, "rank": 2, "world_size": 2}, "rank 2 of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            order.batch(**arguments)  # type: ignore[arg-type]
    for counts in ((), (3, 0)):
        with pytest.raises(ValueError, match="at least one bucket"):
            Order(counts, 0)
