"""`sdxl-fast data prepare`: pictures with captions to shards of latents and text embeddings.

Each part of the source (a tar, or so many rows) becomes one shard and one record of what happened, whichever process
makes it: rank r of n takes the parts r, r + n, ... and no process waits for another. A shard is written under a
temporary name and counts as done when its record is there, so a killed run is taken up where it was by the same
command, and the files come out the same bit for bit (on a CPU, or a GPU that computes deterministically). Whoever finds
all records there writes index and report.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..errors import DataError
from ..files import replacing
from . import report
from .buckets import Size, make_buckets
from .config import PrepareConfig
from .encoders import Encoders, facts_of
from .part import prepare_part
from .progress import Progress
from .rows import Source, Unavailable
from .shards import EMPTY_PROMPT, INDEX
from .sources import check_columns, open_source

SETTINGS = "settings.json"


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


_PARTS_LOCK = ".parts.lock"  # a byte of it for each part


@contextmanager
def _part_locks(out: Path) -> Iterator[Callable[[int], bool]]:
    """Gives a function that takes the lock of a part, and says whether no other process has it.

    All go with their process, at the latest. Where the file system has none, everyone gets them.
    """
    with open(out / _PARTS_LOCK, "wb") as file:

        def take(number: int) -> bool:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError as error:
                return error.errno not in (errno.EACCES, errno.EAGAIN)
            return True

        yield take


def _settings(config: PrepareConfig, buckets: tuple[Size, ...]) -> dict[str, Any]:
    """Everything that decides what the shards hold, the pictures and the encoders' weights aside.

    Each part has the identity of what it was made from, so the source may be spelled otherwise or grow.
    """
    left_out = {"source", "out", "model", "resolution", "buckets", "batch", "workers", "device"}
    if config.crop != "random":
        left_out.add("seed")
    return config.model_dump(mode="json", exclude=left_out) | {"buckets": [str(bucket) for bucket in buckets]}


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings into a new folder, or compares them with those it was begun with.

    Raises:
        DataError: it was begun with others, or they cannot be read.
    """
    path = out / SETTINGS
    if not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {out} and prepare it anew") from None
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


def _check_folder(config: PrepareConfig, source: Source, settings: dict[str, Any]) -> None:
    """Begins the output folder, or sees that the run goes on what is there."""
    held = [entry.name for entry in config.out.glob("*") if not entry.name.startswith(".")]
    if held and SETTINGS not in held:  # which is written first
        raise DataError(f"{config.out}: holds other files; name a new folder")
    if not held:
        check_columns(source, config.caption_column, config.filters.aesthetic_column)
    with _sole_writer(config.out):
        check_settings(config.out, settings)
    if surplus := [path.name for path in config.out.glob("[0-9]*.json") if int(path.stem) >= len(source)]:
        raise DataError(
            f"{config.out}: was made of more parts than {config.source} has now ({min(surplus)}); make it anew"
        )


def say(line: str) -> None:
    """Prints a line at once, also into a file."""
    print(line, flush=True)


def prepare(
    config: PrepareConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    retry: bool = False,
    log: Callable[[str], None] = say,
) -> report.Report | None:
    """Makes this rank's shards, and the index and report if they were the last.

    Args:
        config: what to make of which source.
        rank: which process this is.
        world_size: how many there are.
        retry: make this rank's parts with damaged files or missing pictures again.
        log: takes lines about the progress.

    Returns:
        The report; None while other ranks' shards are missing.

    Raises:
        DataError: the source or the output folder is not what it should be, or the file system failed to give an
            input; all parts but those are done then.
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
    _check_folder(config, source, settings)

    def done(number: int) -> bool:
        return report.is_done(config.out, number, source.identity(number))

    mine = range(rank, len(source), world_size)
    if retry:
        for number in mine:
            report.forget_broken(config.out, number)
    todo = [number for number in mine if not done(number)]
    left: list[str] = []
    if todo:
        encoders = Encoders(config.model, device=config.device, precision=config.precision)
        with _sole_writer(config.out):
            check_settings(config.out, settings | {"encoders": encoders.digest()})
            (config.out / INDEX).unlink(missing_ok=True)  # of the parts as they were
            _write_empty_prompt(config.out, encoders)
        progress = Progress(f"rank {rank}", len(mine), len(mine) - len(todo), log)
        make = partial(prepare_part, source=source, config=config, buckets=buckets, encoders=encoders)
        left = _make_parts(todo, config.out, make, done, progress)
    if left:
        raise DataError(
            f"{len(left)} parts were left, for their input could not be read now: {', '.join(left[:3])}; "
            "the same command tries them again, and counts as missing what was removed"
        )
    missing = sum(not done(number) for number in range(len(source)))
    if missing:
        log(f"rank {rank} is done; {missing} of {len(source)} shards are missing, index and report come with the last")
        return None
    with _sole_writer(config.out):
        return report.finish(config.out, len(source), deduplicate=config.filters.deduplicate)


def _make_parts(
    todo: Iterable[int],
    out: Path,
    make: Callable[[int], report.Record],
    done: Callable[[int], bool],
    progress: Progress,
) -> list[str]:
    """Makes parts one after the other; returns those whose input could not be read now, each with the reason."""
    left: list[str] = []
    with _part_locks(out) as take:
        for number in todo:
            free = take(number)
            if done(number):  # by now
                continue
            if not free:
                progress.log(f"part {number:06d} is left out: another process is making it; is RANK set?")
                continue
            for leftover in out.glob(f".{number:06d}-*"):  # of a killed run: the lock is ours
                leftover.unlink()
            try:
                progress.tell(number, make(number))
            except Unavailable as error:
                left.append(f"{number:06d} ({error})")
                progress.log(f"part {left[-1]} is left for another run")
    return left


def _write_empty_prompt(out: Path, encoders: Encoders) -> None:
    """The encoding of "": with it, training needs no text encoder for caption dropout and guidance."""
    if (out / EMPTY_PROMPT).is_file():
        return
    embeds, pooled = encoders.texts([""])
    with replacing(out / EMPTY_PROMPT) as temporary:
        save_file({"prompt_embeds": embeds[0].contiguous(), "pooled": pooled[0].contiguous()}, temporary)
