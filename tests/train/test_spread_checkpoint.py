"""Checkpoints of spread networks (FSDP2), by a group of one process: saved, resumed, and when the disk is full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sdxl_fast.train import checkpoint, distributed


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """This very process as the only one of a group."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _parts(*, spread: bool = True, steps: int = 0, seed: int = 0) -> dict[str, checkpoint.Stateful]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    if spread:
        distributed.spread(module, [module[0]])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    _move(module, optimizer, steps)
    return {"module": module, "optimizer": optimizer, "average": checkpoint.Average(module, 1.0)}


def _move(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _tensors(parts: dict[str, checkpoint.Stateful]) -> dict[str, torch.Tensor]:
    flat = {name: checkpoint.flatten(part.state_dict())[0] for name, part in parts.items()}
    return {f"{name}/{key}": distributed.whole(value) for name, part in flat.items() for key, value in part.items()}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("saved", "resumed"), [(True, True), (False, True), (True, False)])
def test_networks_resume_spread_or_whole(tmp_path: Path, steps: int, saved: bool, resumed: bool) -> None:
    """Also before the optimiser's first step: it has no state then, in the file and after."""
    before = _parts(spread=saved, steps=steps)
    path = checkpoint.save(tmp_path, before, {"images": 4})
    assert (path / checkpoint.SHARDS).is_dir() is saved and checkpoint.latest(tmp_path) == path
    after = _parts(spread=resumed, seed=1)
    assert checkpoint.load(path, after) == {"images": 4}
    one, other = _tensors(before), _tensors(after)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for parts in (before, after):
        _move(parts["module"], parts["optimizer"], 2)  # type: ignore[arg-type]
    one, other = _tensors(before), _tensors(after)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_another_network_says_so(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, {"module": _parts()["module"]}, {"images": 4})
    smaller = nn.Sequential(nn.Linear(3, 4), nn.SiLU())
    distributed.spread(smaller, [])
    with pytest.raises(ValueError, match=r"holds 2\.bias and 1 more that this recipe has not"):
        checkpoint.load(path, {"module": smaller})
    for file in (path / checkpoint.SHARDS).iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*checkpoint-000000004: "):
        checkpoint.load(path, {"module": _parts()["module"]})


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _parts(steps=1)
    kept = checkpoint.save(tmp_path, parts, {"images": 4})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    wanted = (
        f"cannot write .*000000008: process 0: .*No space left.*; the last whole checkpoint is {re.escape(str(kept))}$"
    )
    with pytest.raises(OSError, match=wanted):
        checkpoint.save(tmp_path, parts, {"images": 8})
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == [kept.name]
