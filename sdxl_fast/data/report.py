"""What became of every row: a record per shard, and the index and report of the whole once all are there."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import replacing
from ..text import printable
from .filters import CORRUPT, REASONS, Reason
from .shards import Index

REPORT, SUMMARY, DROPPED = "report.json", "report.md", "dropped.jsonl"
LISTED = 20  # corrupt inputs named in the summary; dropped.jsonl names all


class Entry(NamedTuple):
    """A sample in a shard: where it came from and where it lies."""

    name: str
    hash: str
    shape: tuple[int, int, int]
    first: int
    length: int
    scored: bool
    truncated: bool


@dataclass
class Record:
    """One part's outcome; `input` = len(samples) + len(dropped)."""

    identity: str = ""
    """Of the part it was made from, as the source gives it."""
    input: int = 0
    samples: list[Entry] = field(default_factory=list)
    dropped: list[tuple[str, Reason, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Input files that could not be read to their end, and why."""
    strays: int = 0
    """Files in tars that are part of no row: without an extension."""
    bytes: int = 0

    def drop(self, name: str, reason: Reason, detail: str) -> None:
        """Notes a picture that stays out."""
        self.dropped.append((name, reason, printable(detail)))

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all: a line that says whether the part is done, then everything."""
        content = _line(asdict(self)).encode()
        head = {"identity": self.identity, "bytes": self.bytes, "content": len(content)}
        with replacing(path) as temporary:
            temporary.write_bytes(_line(head).encode() + content)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Reads what `save` wrote."""
        fields = json.loads(path.read_bytes().partition(b"\n")[2])
        return cls(**fields | {"samples": [Entry(*entry) for entry in fields["samples"]]})


@dataclass
class Report:
    """The whole: `input` = `kept` + the sum of `dropped`."""

    input: int
    kept: int
    dropped: dict[str, int]
    damaged: list[tuple[str, str]]
    """Input files that could not be read to their end: what they held beyond is not in `input`."""
    buckets: dict[str, int]
    """Pictures by latent shape, C x h x w."""
    shards: int
    bytes: int
    truncated_captions: int
    """Kept captions of which the text encoders see only the beginning."""
    unscored: int
    """Kept pictures that came without an aesthetic score."""
    strays: int
    """Files in tars that were passed over, for they have no extension."""

    def text(self) -> str:
        """A Markdown summary."""
        lines = [
            f"# {self.kept} of {self.input} pictures kept",
            "",
            f"{self.shards} shards, {self.bytes / 1e9:.2f} GB. {self.unscored} kept pictures had no aesthetic score; "
            f"{self.truncated_captions} kept captions are longer than the text encoders read.",
            "",
            "| dropped | pictures | share |",
            "|---|---|---|",
        ]
        for reason, count in self.dropped.items():
            lines.append(f"| {reason} | {count} | {count / max(self.input, 1):.1%} |")
        lines += ["", "| latents | pictures |", "|---|---|"]
        lines += [f"| {shape} | {count} |" for shape, count in self.buckets.items()]
        if self.strays:
            lines += ["", f"{self.strays} files in the tars have no extension and were passed over."]
        if self.damaged:
            lines += ["", f"{len(self.damaged)} input files could not be read to their end:", ""]
            lines += [f"- {name}: {detail}" for name, detail in self.damaged]
        return "\n".join(lines) + "\n"


def record_path(out: Path, part: int) -> Path:
    """Where the record of a part lies."""
    return out / f"{part:06d}.json"


def is_done(out: Path, part: int, identity: str) -> bool:
    """Whether the record of this very part is there, whole, and its shard has the size that the record says."""
    try:
        with open(record_path(out, part), "rb") as file:
            line = file.readline()
            size = os.fstat(file.fileno()).st_size
        head, shard = json.loads(line), out / f"{part:06d}.tar"
        found = (head["identity"], head["bytes"], len(line) + head["content"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return False
    return found == (identity, shard.stat().st_size if shard.is_file() else 0, size)


def forget_broken(out: Path, part: int) -> None:
    """Deletes the record of a part whose input was damaged or lacked pictures, so that it counts as not done."""
    path = record_path(out, part)
    if path.is_file():
        try:
            record = Record.load(path)
        except (ValueError, TypeError, KeyError):
            return  # not done anyway
        if record.damaged or any(reason == "no picture" for _, reason, _ in record.dropped):
            path.unlink()


def _records(out: Path, parts: int) -> Iterator[tuple[str, Record]]:
    for part in range(parts):
        yield f"{part:06d}.tar", Record.load(record_path(out, part))


def finish(out: Path, parts: int, *, deduplicate: bool) -> Report:
    """Writes index and report from the records of all parts, and returns the report.

    Of pictures that are in several parts, the first counts; the others stay in their tars and out of the index. The
    same records give the same files, so it does no harm if two ranks come here at once.
    """
    counts: Counter[str] = Counter()
    whole = Report(0, 0, {}, [], {}, 0, 0, 0, 0, 0)
    shards: list[tuple[str, int]] = []
    shapes: dict[tuple[int, int, int], int] = {}
    rows: list[tuple[int, int, int, int]] = []
    first_of: dict[bytes, int] = {}
    buckets: Counter[str] = Counter()
    corrupt: list[str] = []
    with replacing(out / DROPPED) as temporary, open(temporary, "w", encoding="utf-8") as listing:
        for part, (shard, record) in enumerate(_records(out, parts)):
            dropped = list(record.dropped)
            for entry in record.samples:
                if deduplicate and (earlier := first_of.setdefault(bytes.fromhex(entry.hash), part)) != part:
                    dropped.append((entry.name, "duplicate", f"of a picture in {earlier:06d}.tar"))
                    continue
                channels, height, width = entry.shape
                number = shapes.setdefault((channels, height, width), len(shapes))
                rows.append((len(shards), entry.first, entry.length, number))
                buckets[f"{channels}x{height}x{width}"] += 1
                whole.unscored += not entry.scored
                whole.truncated_captions += entry.truncated
            if record.bytes:
                shards.append((shard, record.bytes))
            for name, reason, detail in dropped:
                listing.write(_line({"name": name, "reason": reason, "detail": detail}))
                if reason in CORRUPT:
                    corrupt.append(f"- {name}: {reason}, {detail}")
            counts.update(reason for _, reason, _ in dropped)
            whole.input += record.input
            whole.damaged += record.damaged
            whole.strays += record.strays
    whole.kept, whole.shards, whole.bytes = len(rows), len(shards), sum(size for _, size in shards)
    whole.dropped = {reason: counts[reason] for reason in REASONS}
    whole.buckets = dict(buckets.most_common())
    text = whole.text()
    if corrupt:
        text += f"\n{len(corrupt)} corrupt pictures, the first of them (all are in {DROPPED}):\n\n"
        text += "\n".join(corrupt[:LISTED]) + "\n"
    for name, content in ((REPORT, json.dumps(asdict(whole), indent=2, ensure_ascii=False) + "\n"), (SUMMARY, text)):
        with replacing(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    # last: what can be read is complete
    Index(shards, list(shapes), torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)).save(out)
    return whole


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
