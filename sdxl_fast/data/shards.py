"""Shards of encoded pictures: webdataset tars, written once, read at random.

A sample is five uncompressed members of a tar under one key, which webdataset's own `decode()` understands:

    .latents.npy         float16 [C, h, w], scaled as the UNet sees them
    .prompt_embeds.npy   float16 [L, D], both text encoders side by side
    .pooled.npy          float16 [P]
    .txt                 the caption
    .json                source, hash, original_size, crop, target_size (height first), aesthetic, sharpness

`index.safetensors` says where each sample lies, so that any batch is read without the rest. What the index leaves out
(copies of a sample in an earlier shard) is never read.
"""

from __future__ import annotations

import collections
import io
import json
import os
import tarfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DataError
from ..files import replacing
from .order import Order

FORMAT = "sdxl_fast.shards/1"
INDEX, EMPTY_PROMPT = "index.safetensors", "empty_prompt.safetensors"
TENSORS = ("latents", "prompt_embeds", "pooled")
_MEMBERS = {*(f"{name}.npy" for name in TENSORS), "txt", "json"}
_OPEN_FILES = 64  # file descriptors kept; a process may have 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded picture: float16 latents [C, h, w], prompt_embeds [L, D], pooled [P]; caption; the .json's facts."""

    key: str
    latents: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    caption: str
    facts: dict[str, Any]

    @property
    def time_ids(self) -> list[int]:
        """SDXL's micro-conditioning: original size, crop, target size; height first."""
        return [*self.facts["original_size"], *self.facts["crop"], *self.facts["target_size"]]

    def members(self) -> dict[str, Any]:
        """The sample as webdataset's `TarWriter` takes it."""
        arrays = {f"{name}.npy": _npy(getattr(self, name)) for name in TENSORS}
        facts = json.dumps(self.facts, ensure_ascii=False, separators=(",", ":"))
        return {"__key__": self.key, "txt": self.caption.encode(), "json": facts.encode(), **arrays}


def _npy(tensor: Tensor) -> bytes:
    out = io.BytesIO()
    np.save(out, tensor.numpy(), allow_pickle=False)
    return out.getvalue()


def scan(path: Path) -> list[tuple[str, int, int]]:
    """Key, first byte and length of each sample in a tar, in order."""
    samples: list[tuple[str, int, int]] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key = member.name.partition(".")[0]
            if not samples or samples[-1][0] != key:
                samples.append((key, member.offset, 0))
            _, first, _ = samples[-1]
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            samples[-1] = (key, first, end - first)
    return samples


# NumPy reads a header through `ast`, which in CPython 3.11 counts its depth for all threads together and fails,
# rarely, with SystemError when several are at it (gh-106905, mended in 3.11.8).
_LOADING = threading.Lock()


def parse(content: bytes, where: str) -> Sample:
    """The sample in this piece of a tar.

    Raises:
        DataError: it is not exactly one sample.
    """
    files, keys = dict[str, bytes](), set[str]()
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                files[suffix] = content[member.offset_data : member.offset_data + member.size]
                keys.add(key)
        if len(keys) != 1 or files.keys() != _MEMBERS:
            raise ValueError(f"holds {sorted(files)} of {sorted(keys)}")
        with _LOADING:
            arrays = [np.load(io.BytesIO(files[f"{name}.npy"]), allow_pickle=False) for name in TENSORS]
        latents, prompt_embeds, pooled = (torch.from_numpy(array) for array in arrays)
        facts = json.loads(files["json"])
        return Sample(keys.pop(), latents, prompt_embeds, pooled, files["txt"].decode(), facts)
    except (tarfile.TarError, ValueError, TypeError, EOFError) as error:
        raise DataError(
            f"{where}: not a sample ({error}); the shard is damaged or was changed: make it anew"
        ) from error


@dataclass(frozen=True, slots=True)
class Index:
    """Where samples lie: shard number, first byte, length and number of the latent shape, int64 [N, 4]."""

    shards: list[tuple[str, int]]  # file name, bytes
    shapes: list[tuple[int, int, int]]  # C, h, w
    rows: Tensor

    def save(self, folder: Path) -> None:
        """Writes it, whole or not at all."""
        facts = json.dumps({"format": FORMAT, "shards": self.shards, "shapes": self.shapes})
        with replacing(folder / INDEX) as temporary:
            # one entry: safetensors writes several in no fixed order
            save_file({"rows": self.rows}, temporary, metadata={"facts": facts})

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Reads it and checks it against the sizes of the shards.

        Raises:
            DataError: no index, another format, or a shard that is missing or of another size.
        """
        path = folder / INDEX
        if not path.is_file():
            raise DataError(f"{path} is missing: `sdxl-fast data prepare` writes it when all shards are done")
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
                rows = file.get_tensor("rows")
        except SafetensorError as error:
            raise DataError(f"{path}: damaged ({error}); delete it and run `sdxl-fast data prepare` again") from error
        if facts.get("format") != FORMAT:
            raise DataError(f"{path}: its format is {facts.get('format')}, expected {FORMAT}; prepare the data again")
        shards = [(name, size) for name, size in facts["shards"]]
        for name, size in shards:
            shard = folder / name
            found = shard.stat().st_size if shard.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes"
                raise DataError(f"{shard} {what}, the index says {size}; run `sdxl-fast data prepare` again")
        return cls(shards, [tuple(shape) for shape in facts["shapes"]], rows)


class LatentShards:
    """Random access to a folder made by `sdxl-fast data prepare`.

    Safe to use from several threads and after a fork; it keeps no position.

    Raises:
        DataError: see `Index.load`; or no samples.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = Index.load(self.folder)
        if not len(self.index.rows):
            raise DataError(f"{self.folder}: no samples; its report.md says what was dropped and why")
        # positions of each bucket's samples, the buckets being the latent shapes that occur
        shapes = self.index.rows[:, 3]
        self.buckets = [torch.nonzero(shapes == number).flatten() for number in range(len(self.index.shapes))]
        counts = [len(bucket) for bucket in self.buckets]
        self._order = lru_cache(maxsize=4)(partial(Order, counts))  # each remembers permutations of the whole set
        self._files: collections.OrderedDict[str, BinaryIO] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._warned_for = set[int]()

    def __reduce__(self) -> tuple[type[LatentShards], tuple[Path]]:
        return LatentShards, (self.folder,)

    def __len__(self) -> int:
        return len(self.index.rows)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """C, h, w of each bucket's latents."""
        return self.index.shapes

    @cached_property
    def empty_prompt(self) -> dict[str, Tensor]:
        """The encoding of "", for caption dropout and guidance: float32 prompt_embeds [L, D] and pooled [P]."""
        return {name: tensor.float() for name, tensor in load_file(self.folder / EMPTY_PROMPT).items()}

    def __getitem__(self, position: int) -> Sample:
        """The sample at `position` of the index.

        Raises:
            IndexError: out of range.
            DataError: the shard does not hold it there.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        shard, first, length, shape = self.index.rows[position].tolist()
        name = self.index.shards[shard][0]
        file = self._open(name)
        sample = parse(os.pread(file.fileno(), length, first), f"{self.folder / name}, byte {first}")
        if tuple(sample.latents.shape) != self.index.shapes[shape]:
            found, known = list(sample.latents.shape), list(self.index.shapes[shape])
            raise DataError(f"{self.folder / name}, byte {first}: latents are {found}, the index says {known}")
        return sample

    def _open(self, name: str) -> BinaryIO:
        """The shard's file. One that falls out of the cache closes when its last reader has done with it."""
        with self._lock:
            file = self._files.pop(name, None) or open(self.folder / name, "rb", buffering=0)  # noqa: SIM115
            self._files[name] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def positions(self, count: int, *, seed: int, images: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """Which samples the batch consists of: `order.Order` says how. A pure function of its arguments."""
        if count * world_size not in self._warned_for:
            self._warned_for.add(count * world_size)
            self._warn_of_copies(count * world_size)
        bucket, chosen = self._order(seed).batch(count, images=images, rank=rank, world_size=world_size)
        return self.buckets[bucket][chosen].tolist()

    def _warn_of_copies(self, size: int) -> None:
        rare = [
            (shape, len(found)) for shape, found in zip(self.shapes, self.buckets, strict=True) if len(found) < size
        ]
        if rare:
            listed = ", ".join(f"{'x'.join(map(str, shape))} ({count})" for shape, count in rare)
            warnings.warn(
                f"{self.folder}: batches of {size} hold samples several times where a bucket has fewer: {listed}; "
                "prepare the data in fewer buckets (--buckets), or train with smaller batches",
                stacklevel=4,
            )

    def read(self, positions: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """These samples, of one bucket, as `batch` gives them."""
        samples = [self[position] for position in positions]
        condition = {
            "prompt_embeds": torch.stack([sample.prompt_embeds for sample in samples]).float(),
            "pooled": torch.stack([sample.pooled for sample in samples]).float(),
            "time_ids": torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
        }
        return torch.stack([sample.latents for sample in samples]).float(), condition

    def batch(
        self, count: int, *, seed: int, images: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch that comes after `images` images: a pure function of its arguments and the folder.

        Args:
            count: samples for this rank.
            seed: of the order.
            images: images that all ranks together have seen, a multiple of count * world_size.
            rank: which part of the global batch.
            world_size: parts of the global batch.

        Returns:
            Latents float32 [count, C, h, w], all of one bucket, and the conditions, float32: prompt_embeds
            [count, L, D], pooled [count, P], time_ids [count, 6]. All on the CPU.
        """
        return self.read(self.positions(count, seed=seed, images=images, rank=rank, world_size=world_size))
