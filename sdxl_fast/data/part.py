"""One part of a source made into one shard and one record: judged picture by picture, encoded bucket by bucket."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from ..files import replacing
from ..random import derive_seed
from ..text import one_line
from . import report
from .buckets import Fit, Size, fit, nearest_bucket
from .config import PrepareConfig
from .encoders import Encoders, finite
from .filters import Dropped, check_aesthetic, check_caption, check_sharpness, content_hash, open_picture
from .rows import Damage, Row, Source, Stray, Unavailable
from .shards import Sample, scan

PENDING_BATCHES = 8  # pictures waiting for their bucket to fill, in batches: 40 buckets must not hold 40 batches
T = TypeVar("T")
U = TypeVar("U")


@dataclass(slots=True)
class Candidate:
    """A picture that passed the filters, in the size it is trained at."""

    row: int
    name: str
    caption: str
    picture: Image.Image
    fit: Fit
    hash: str
    aesthetic: float | None
    sharpness: float

    def facts(self) -> dict[str, Any]:
        """What goes into the sample's .json."""
        return {
            "source": self.name,
            "hash": self.hash,
            "original_size": self.fit.original,
            "crop": self.fit.crop,
            "target_size": self.fit.target,
            "aesthetic": self.aesthetic,
            "sharpness": round(self.sharpness, 2),
        }


def examine(number: int, row: Row, config: PrepareConfig, buckets: tuple[Size, ...]) -> Candidate | Dropped:
    """Everything that can be said of a picture by itself: the filters, then its bucket.

    Raises:
        Unavailable: the file system fails; nothing that the row holds makes it raise.
    """
    try:
        if row.problem is not None or row.read is None:
            raise Dropped(*(row.problem or ("no picture", "")))
        caption = check_caption(row.caption(config.caption_column))
        aesthetic = check_aesthetic(row.facts, config.filters)
        picture = open_picture(row.read(), config.filters)
        original = Size(picture.height, picture.width)
        digest = content_hash(picture)
        position = (0.5, 0.5)
        if config.crop == "random":
            position = tuple(derive_seed(config.seed, digest, side) / 2**63 for side in ("top", "left"))  # type: ignore[assignment]
        chosen = fit(original, nearest_bucket(original, buckets), position)
        top, left = chosen.crop
        height, width = chosen.target
        resized = picture.resize(chosen.resized[::-1], Image.Resampling.LANCZOS, reducing_gap=3.0)
        picture = resized.crop((left, top, left + width, top + height))
        sharp = check_sharpness(picture, config.filters)
    except Dropped as dropped:
        return dropped
    except (MemoryError, Unavailable):
        raise
    except Exception as error:  # one row of millions must not end the run
        return Dropped("bad record", one_line(error, named=True))
    return Candidate(number, row.name, caption, picture, chosen, digest, aesthetic, sharp)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, U]]:
    """Each item with its result, in the items' order; at most `ahead` items are drawn beyond the one given."""
    waiting: deque[tuple[T, Future[U]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()


@dataclass
class Part:
    """One shard in the making."""

    number: int
    config: PrepareConfig
    encoders: Encoders
    writer: Any
    record: report.Record
    pending: dict[Size, list[Candidate]] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)  # of what was written
    written: dict[str, report.Entry] = field(default_factory=dict)  # by key; where they lie comes at the end

    def add(self, candidate: Candidate) -> None:
        """Takes a picture; encodes a bucket when it is full, or the fullest when too many wait."""
        if self.config.filters.deduplicate:
            bucket = candidate.fit.target  # equal pictures have the same
            if any(earlier.hash == candidate.hash for earlier in self.pending.get(bucket, ())):
                self.encode(bucket)  # a copy is one only if the earlier picture is kept
            if candidate.hash in self.hashes:
                self.record.drop(candidate.name, "duplicate", "of an earlier picture in this part")
                return
        waiting = self.pending.setdefault(candidate.fit.target, [])
        waiting.append(candidate)
        if len(waiting) == self.config.batch:
            self.encode(candidate.fit.target)
        elif sum(map(len, self.pending.values())) >= PENDING_BATCHES * self.config.batch:
            self.encode(max(self.pending, key=lambda bucket: len(self.pending[bucket])))

    def encode(self, bucket: Size) -> None:
        """Writes what waits in a bucket."""
        batch = self.pending.pop(bucket)
        captions = [candidate.caption for candidate in batch]
        latents = self.encoders.latents([candidate.picture for candidate in batch])
        embeds, pooled = self.encoders.texts(captions)
        good_latents, good_text = finite(latents).tolist(), (finite(embeds) & finite(pooled)).tolist()
        for row, candidate in enumerate(batch):
            if not (good_latents[row] and good_text[row]):
                wrong = "latents" if not good_latents[row] else "text embeddings"
                self.record.drop(candidate.name, "not finite", f"NaN or infinity in the {wrong}, in float32 too")
                continue
            key = f"{self.number:06d}-{candidate.row:06d}"
            sample = Sample(key, latents[row], embeds[row], pooled[row], candidate.caption, candidate.facts())
            self.writer.write(sample.members())
            self.hashes.add(candidate.hash)
            channels, height, width = sample.latents.shape
            self.written[key] = report.Entry(
                candidate.name,
                candidate.hash,
                (channels, height, width),
                first=0,
                length=0,
                scored=candidate.aesthetic is not None,
                truncated=self.encoders.truncated([candidate.caption]) > 0,
            )


def prepare_part(
    number: int, source: Source, config: PrepareConfig, buckets: tuple[Size, ...], encoders: Encoders
) -> report.Record:
    """Makes one shard and its record; nothing of it is there before it is whole.

    Raises:
        Unavailable: the file system fails to give an input.
    """
    from webdataset import TarWriter

    record = report.Record(source.identity(number))
    shard = config.out / f"{number:06d}.tar"

    def rows() -> Iterator[tuple[int, Row]]:
        for row in source.rows(number):
            if isinstance(row, Damage):
                record.damaged.append((row.name, row.detail))
            elif isinstance(row, Stray):
                record.strays += 1
            else:
                record.input += 1
                yield record.input - 1, row

    with (
        replacing(shard) as temporary,
        ThreadPoolExecutor(config.workers) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata, one or more per picture
        with open(temporary, "wb") as file:
            # a fixed time: the same input gives the same file
            writer = TarWriter(file, encoder=False, compress=False, mtime=0.0)
            part = Part(number, config, encoders, writer, record)
            judged = in_order(pool, lambda item: examine(*item, config, buckets), rows(), 2 * config.workers)
            for (_, row), result in judged:
                if isinstance(result, Dropped):
                    record.drop(row.name, result.reason, result.detail)
                else:
                    part.add(result)
            for bucket in list(part.pending):
                part.encode(bucket)
            writer.close()
        for key, first, length in scan(temporary):
            record.samples.append(part.written[key]._replace(first=first, length=length))
        record.bytes = temporary.stat().st_size
    if not record.samples:
        shard.unlink()  # webdataset complains of tars without samples
        record.bytes = 0
    record.save(report.record_path(config.out, number))
    return record
