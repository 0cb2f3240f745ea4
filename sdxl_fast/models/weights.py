"""Weight files larger than memory: safetensors read lazily, transformed on the way and written tensor by tensor.

A `Lazy` tensor knows its dtype and shape and how to make itself. A file's whole header follows from those, so `plan`
answers how large a file would be without a byte of it existing, and `write_weights` holds one tensor at a time. The
bytes are those of `safetensors.torch.save_file` for the same tensors, except that metadata are sorted by key, so that
the same input always gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..files import replacing
from .safetensors_check import PICKLE_SUFFIXES, check_safetensors

HASH_KEY = "modelspec.hash_sha256"
"""ModelSpec: "0x" and the SHA-256 of everything after the header. `write_weights` fills it in where it is present."""

_NO_HASH = "0x" + 64 * "0"
# In the order in which safetensors lays dtypes out, widest first, which keeps every tensor aligned.
_NAMES: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor that is made when it is needed: `read()` gives one of this dtype and shape, afresh every time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """A tensor that exists already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    def map(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Lazy:
        """`function` of this tensor, which keeps its dtype; `shape` where it does not keep the shape."""
        return Lazy(self.dtype, self.shape if shape is None else shape, lambda: function(self.read()))


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything goes: the header with its length, the tensors' order, the size of the whole file in bytes."""

    header: bytes
    names: tuple[str, ...]
    size: int


def open_weights(path: str | Path) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The tensors of a safetensors file, to be read later, and its metadata.

    Raises:
        ModelError: missing, unsafe, truncated or corrupt (see `check_safetensors`), or of a dtype torch does not have.
    """
    from safetensors import safe_open

    header = check_safetensors(path)
    metadata = header.pop("__metadata__", {})
    file = safe_open(path, framework="pt")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ModelError(f"{path}: {name} is stored as {entry['dtype']}; a quantised file cannot be converted")
        tensors[name] = Lazy(_DTYPES[entry["dtype"]], tuple(entry["shape"]), partial(file.get_tensor, name))
    return tensors, metadata


def dtype_of(entry: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of a tensor's entry in a safetensors header; None where torch has none like it."""
    return _DTYPES.get(str(entry.get("dtype")))


def read_tensor(path: Path, entry: Mapping[str, Any], start: int) -> Tensor:
    """A tensor of a safetensors file in memory of its own, contiguous; the file is not mapped.

    Args:
        path: the file.
        entry: the tensor's in the header, of a dtype that torch has.
        start: `start_of` the file.
    """
    found = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
    with path.open("rb") as file:
        file.seek(start + entry["data_offsets"][0])
        count = file.readinto(found.view(-1).view(torch.uint8).numpy().data)
    if count != found.nbytes:
        raise ModelError(f"{path}: ends in the middle of a tensor; it has changed since it was checked")
    return found


def start_of(path: Path, header: Mapping[str, Any]) -> int:
    """Where the tensors of a safetensors file begin: they are its end."""
    ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return path.stat().st_size - max(ends, default=0)


def open_network(folder: Path) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The tensors of a network saved in one or several files in `folder`, and the metadata of the first.

    Where both precisions lie side by side the full one is taken.
    """
    tensors: dict[str, Lazy] = {}
    metadata: dict[str, str] | None = None
    for path in weight_files(folder)[0]:
        found, facts = open_weights(path)
        metadata = facts if metadata is None else metadata
        tensors |= found
    return tensors, metadata or {}


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The weight files of a network's folder and diffusers' name of their variant.

    Raises:
        ModelError: no such folder, nothing in it, or only pickles.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: this part of the pipeline is missing")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise ModelError(f"{pickles[0]}: a pickled weight file, which could run code; convert it to safetensors")
        raise ModelError(f"{folder}: no .safetensors file")
    plain = [path for path in files if ".fp16." not in path.name]
    return plain or files, None if plain else "fp16"


def converted(tensors: Mapping[str, Lazy], dtype: torch.dtype | None) -> dict[str, Lazy]:
    """The floating-point tensors in `dtype`, rounded to nearest; None leaves them alone.

    Reading one that would overflow to infinity raises ModelError, which names it.
    """
    if dtype is None:
        return dict(tensors)
    return {
        name: Lazy(dtype, tensor.shape, partial(_cast, name, tensor, dtype))
        if tensor.dtype.is_floating_point and tensor.dtype != dtype
        else tensor
        for name, tensor in tensors.items()
    }


def _cast(name: str, tensor: Lazy, dtype: torch.dtype) -> Tensor:
    before = tensor.read()
    after = before.to(dtype)
    if not after.isfinite().all() and before.isfinite().all():
        raise ModelError(
            f"{name} reaches {before.abs().max():.4g}, more than {str(dtype)[6:]} can hold; choose another"
        )
    return after


def plan(tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> Plan:
    """The layout of a safetensors file: an 8-byte length, JSON padded with spaces to a multiple of 8, the tensors."""
    names = tuple(sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name)))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in names:
        tensor = tensors[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Plan(len(text).to_bytes(8, "little") + text, names, 8 + len(text) + offset)


def write_weights(path: str | Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> int:
    """Write a safetensors file, whole or not at all, holding one tensor at a time; returns its size in bytes.

    Args:
        path: the file; an earlier one is replaced when the new one is complete.
        tensors: by the names they get.
        metadata: written sorted; None or nothing leaves the field out. `HASH_KEY`, with any value, is filled in.
    """
    facts = dict(metadata or {})
    if HASH_KEY in facts:
        facts[HASH_KEY] = _NO_HASH
    layout = plan(tensors, facts)
    with replacing(path) as temporary, temporary.open("r+b") as file:
        file.write(layout.header)
        digest = _write_tensors(file, layout.names, tensors, hashed=HASH_KEY in facts)
        if digest is not None:
            file.seek(layout.header.index(_NO_HASH.encode()))
            file.write(digest.encode())
    return layout.size


def _write_tensors(file: IO[bytes], names: Iterable[str], tensors: Mapping[str, Lazy], *, hashed: bool) -> str | None:
    sha = hashlib.sha256()
    for name in names:
        promised = tensors[name]
        tensor = promised.read().detach().cpu()
        if tensor.dtype != promised.dtype or tuple(tensor.shape) != promised.shape:
            raise ModelError(
                f"{name} came as {tuple(tensor.shape)} {tensor.dtype}, expected {promised.shape} {promised.dtype}"
            )
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        if hashed:
            sha.update(data)
    return "0x" + sha.hexdigest() if hashed else None


def listing(names: Iterable[str], limit: int = 10) -> str:
    """The names for an error message: all of them, or the first `limit` and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
