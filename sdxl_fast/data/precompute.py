"""`sdxl-fast data prepare`: pictures with captions to shards of latents and text embeddings.

Each part of the source (a tar, or so many rows) becomes one shard and one record of what happened, whichever process
makes it: rank r of n takes the parts r, r + n, ... and no process waits for another. A shard is written under a
temporary name and counts as done when its record is there, so a killed run is taken up where it was by the same
command, and the files come out the same bit for bit (on a CPU, or a GPU that computes deterministically). Whoever finds
all records there writes index and report.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from tqdm import tqdm

from ..errors import DataError
from ..files import replacing
from ..random import derive_seed
from . import report
from .buckets import Fit, Size, fit, make_buckets, nearest_bucket
from .encoders import Encoders, facts_of, finite
from .filters import (
    Dropped,
    Filters,
    check_aesthetic,
    check_caption,
    check_sharpness,
    content_hash,
    open_picture,
)
from .shards import EMPTY_PROMPT, INDEX, Sample, scan
from .sources import Damage, Row, Source, open_source

SETTINGS = "settings.json"
PENDING_BATCHES = 8  # pictures waiting for their bucket to fill, in batches: 40 buckets must not hold 40 batches
T = TypeVar("T")
U = TypeVar("U")


class PrepareConfig(BaseModel):
    """What to make of which source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    out: Path
    model: str | None = None
    resolution: int | None = Field(None, ge=8, description="side of the square bucket; None: the model's native side")
    buckets: str = "sdxl"
    crop: Literal["center", "random"] = "center"
    seed: int = Field(0, description="of random crops")
    filters: Filters = Filters()
    caption_column: str = "text"
    image_column: str = "image"
    split: str = "train"
    rows_per_shard: int = Field(2048, ge=1, description="where the source is not divided into tars")
    batch: int = Field(4, ge=1, description="pictures through the encoders at a time")
    workers: int = Field(4, ge=1, description="threads that read, decode and resize")
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"


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
    """Everything that can be said of a picture by itself: the filters, then its bucket."""
    try:
        if row.problem is not None or row.read is None:
            raise Dropped(*(row.problem or ("no picture", "")))
        caption = check_caption(row.facts.get(config.caption_column))
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
    hashes: set[str] = field(default_factory=set)
    written: dict[str, report.Entry] = field(default_factory=dict)  # by key; where they lie comes at the end

    def add(self, candidate: Candidate) -> None:
        """Takes a picture; encodes a bucket when it is full, or the fullest when too many wait."""
        if self.config.filters.deduplicate:
            if candidate.hash in self.hashes:
                self.record.drop(candidate.name, "duplicate", "of an earlier picture in this part")
                return
            self.hashes.add(candidate.hash)
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
    """Makes one shard and its record; nothing of it is there before it is whole."""
    from webdataset import TarWriter

    record = report.Record(source.identity(number))
    shard = config.out / f"{number:06d}.tar"

    def rows() -> Iterator[tuple[int, Row]]:
        for row in source.rows(number):
            if isinstance(row, Damage):
                record.damaged.append((row.name, row.detail))
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


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Holds the lock for the files that belong to no part, and clears away what killed runs left of them.

    The lock goes with its process. Where the file system has none, the files are still replaced whole; then two ranks
    may write the same content twice, and leftovers stay.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        else:
            for name in (SETTINGS, EMPTY_PROMPT, INDEX, report.REPORT, report.DROPPED):
                for leftover in out.glob(f".{Path(name).stem}-*"):
                    leftover.unlink()
        yield


def _settings(config: PrepareConfig, buckets: tuple[Size, ...]) -> dict[str, Any]:
    """Everything that decides what the shards hold, the pictures and the encoders' weights aside."""
    left_out = {"out", "model", "resolution", "buckets", "workers", "device"}
    return config.model_dump(mode="json", exclude=left_out) | {"buckets": [str(bucket) for bucket in buckets]}


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings into a new folder, or compares them with those it was begun with.

    Raises:
        DataError: it was begun with others.
    """
    path = out / SETTINGS
    if not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    different = [
        f"{key} ({before[key]} there, {value} now)"
        for key, value in settings.items()
        if before.get(key, value) != value
    ]
    if different:
        raise DataError(f"{out}: was begun with another {', '.join(different)}; name a new folder, or remove this one")
    if before.keys() != (merged := before | settings).keys():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(merged, indent=2) + "\n")


def prepare(
    config: PrepareConfig, *, rank: int = 0, world_size: int = 1, log: Callable[[str], None] = print
) -> report.Report | None:
    """Makes this rank's shards, and the index and report if they were the last.

    Returns:
        The report; None while other ranks' shards are missing.

    Raises:
        DataError: the source or the output folder is not what it should be.
        ModelError: the pipeline cannot be loaded.
    """
    if importlib.util.find_spec("webdataset") is None:
        raise DataError("writing shards needs webdataset: pip install 'sdxl-fast[data]'")
    native, multiple = facts_of(config.model)
    buckets = make_buckets(config.buckets, config.resolution or native, multiple)
    source = open_source(
        config.source,
        caption_column=config.caption_column,
        image_column=config.image_column,
        split=config.split,
        rows_per_part=config.rows_per_shard,
    )
    settings = _settings(config, buckets)
    held = [entry.name for entry in config.out.glob("*") if not entry.name.startswith(".")]
    if held and SETTINGS not in held:  # which is written first
        raise DataError(f"{config.out}: holds other files; name a new folder")
    with _sole_writer(config.out):
        check_settings(config.out, settings)
    if surplus := [path.name for path in config.out.glob("[0-9]*.json") if int(path.stem) >= len(source)]:
        raise DataError(
            f"{config.out}: was made of more parts than {config.source} has now ({min(surplus)}); make it anew"
        )
    mine = range(rank, len(source), world_size)
    todo = [number for number in mine if not report.is_done(config.out, number, source.identity(number))]
    if todo:
        encoders = Encoders(config.model, device=config.device, precision=config.precision)
        with _sole_writer(config.out):
            check_settings(config.out, settings | {"encoders": encoders.digest()})
            (config.out / INDEX).unlink(missing_ok=True)  # of the parts as they were
            _write_empty_prompt(config.out, encoders)
        for number in tqdm(
            todo, desc=f"shards of rank {rank}", initial=len(mine) - len(todo), total=len(mine), disable=None
        ):
            for leftover in config.out.glob(f".{number:06d}-*"):  # of a killed run; no other rank makes this part
                leftover.unlink()
            prepare_part(number, source, config, buckets, encoders)
    missing = sum(not report.is_done(config.out, number, source.identity(number)) for number in range(len(source)))
    if missing:
        log(f"rank {rank} is done; {missing} of {len(source)} shards are missing, index and report come with the last")
        return None
    with _sole_writer(config.out):
        return report.finish(config.out, len(source), deduplicate=config.filters.deduplicate)


def _write_empty_prompt(out: Path, encoders: Encoders) -> None:
    """The encoding of "": with it, training needs no text encoder for caption dropout and guidance."""
    if (out / EMPTY_PROMPT).is_file():
        return
    embeds, pooled = encoders.texts([""])
    with replacing(out / EMPTY_PROMPT) as temporary:
        save_file({"prompt_embeds": embeds[0].contiguous(), "pooled": pooled[0].contiguous()}, temporary)
