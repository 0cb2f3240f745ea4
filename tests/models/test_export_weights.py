"""Streaming safetensors: the library's own bytes, one tensor at a time, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_fast.errors import ModelError
from sdxl_fast.models.weights import (
    HASH_KEY,
    Lazy,
    converted,
    listing,
    open_network,
    open_weights,
    plan,
    write_weights,
)

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def _tensors() -> dict[str, torch.Tensor]:
    shapes = [(3,), (2, 5), (), (0, 4), (2, 3, 1, 1)]
    return {
        f"{'zyxwvu'[i % 6]}.{i}é": torch.randn(shapes[i % 5]).mul(10).to(DTYPES[i % len(DTYPES)]) for i in range(50)
    }


@pytest.mark.parametrize("metadata", [None, {"format": 'pt "quoted"\n∂'}])
def test_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    lazy = {name: Lazy.of(tensor) for name, tensor in tensors.items()}
    size = write_weights(tmp_path / "ours", lazy, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert size == plan(lazy, metadata).size == (tmp_path / "ours").stat().st_size


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    tensors = _tensors()
    write_weights(tmp_path / "f.safetensors", {name: Lazy.of(t) for name, t in tensors.items()}, {"b": "2", "a": "1"})
    found, metadata = open_weights(tmp_path / "f.safetensors")
    assert metadata == {"a": "1", "b": "2"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(found[name].read(), tensor)


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= 1  # the one before, at most
        tensor = torch.zeros(100, 100)
        alive.append(weakref.ref(tensor))
        return tensor

    write_weights(tmp_path / "f", {f"t{i}": Lazy(torch.float32, (100, 100), make) for i in range(20)})
    assert len(alive) == 20


def test_the_hash_is_that_of_everything_after_the_header(tmp_path: Path) -> None:
    lazy = {name: Lazy.of(tensor) for name, tensor in _tensors().items()}
    write_weights(tmp_path / "f.safetensors", lazy, {HASH_KEY: "", "title": "t"})
    content = (tmp_path / "f.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (
        open_weights(tmp_path / "f.safetensors")[1][HASH_KEY]
        == "0x" + hashlib.sha256(content[8 + length :]).hexdigest()
    )
    assert len(load_file(tmp_path / "f.safetensors")) == len(lazy)


@pytest.mark.parametrize("wrong", ["dtype", "shape", "error"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, wrong: str) -> None:
    def make() -> torch.Tensor:
        if wrong == "error":
            raise OSError("no space left on device")
        return torch.zeros(2, 2, dtype=torch.float16) if wrong == "dtype" else torch.zeros(4)

    path = tmp_path / "f.safetensors"
    path.write_bytes(b"old")
    good = Lazy.of(torch.zeros(5))
    with pytest.raises((ModelError, OSError), match="b came as" if wrong != "error" else "no space"):
        write_weights(path, {"a": good, "b": Lazy(torch.float32, (2, 2), make)})
    assert os.listdir(tmp_path) == ["f.safetensors"]
    assert path.read_bytes() == b"old"


def test_conversion_rounds_floats_and_leaves_integers() -> None:
    x = torch.randn(7)
    found = converted({"x": Lazy.of(x), "n": Lazy.of(torch.arange(3))}, torch.float16)
    assert torch.equal(found["x"].read(), x.half())
    assert found["x"].dtype == torch.float16
    assert found["n"].dtype == torch.int64
    assert converted(found, None) == found


def test_what_does_not_fit_the_dtype_is_named() -> None:
    found = converted({"big": Lazy.of(torch.tensor([7e4])), "inf": Lazy.of(torch.tensor([torch.inf]))}, torch.float16)
    with pytest.raises(ModelError, match=r"big reaches 7e\+04, more than float16 can hold"):
        found["big"].read()
    assert found["inf"].read().isinf()


def test_shards_are_one_network(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.zeros(2)}, tmp_path / "m-00002-of-00002.safetensors")
    save_file({"a": torch.full((2,), 3.0)}, tmp_path / "m.fp16.safetensors")
    tensors, metadata = open_network(tmp_path)
    assert {name: lazy.read().tolist() for name, lazy in tensors.items()} == {"a": [1.0, 1.0], "b": [0.0, 0.0]}
    assert metadata == {"format": "pt"}


def test_long_lists_are_cut() -> None:
    assert listing("ba") == "a, b"
    assert listing([f"k{i:02d}" for i in range(25)], 2) == "k00, k01 and 23 more"
