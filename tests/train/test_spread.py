"""Spread networks (FSDP2), by a group of one process: how they are laid out, their checkpoints, and a full disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import nn

from sdxl_fast.train import checkpoint, distributed
from sdxl_fast.train.bench import lay_out
from sdxl_fast.train.config import LightningConfig, load_recipe
from sdxl_fast.train.teacher import call_unet


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


def test_blocks_are_compiled_each_by_itself_before_they_are_spread(
    lightning_recipe: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole network at once would not be: FSDP2's hooks end its graphs."""
    calls: list[Any] = []
    compile_, spread = nn.Module.compile, distributed.spread
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend="eager"))
    config = load_recipe(lightning_recipe, ["parallel=fsdp", "compile=true", "precision=fp64"])
    assert isinstance(config, LightningConfig)
    plain, unet = (UNet2DConditionModel.from_pretrained(teacher_folder / "unet").double() for _ in range(2))

    def of(blocks: list[nn.Module]) -> list[bool]:
        return [block._compiled_call_impl is not None for block in blocks]

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "size", lambda: 2)
        patch.setattr(distributed, "spread", lambda *given, **named: calls.append((of(given[1]), given, named)))
        lay_out(config, [unet], [])
    ((compiled, given, named),) = calls
    assert len(compiled) > 4 and all(compiled) and not any(of([unet]))
    spread(*given, **named)
    text = {"prompt_embeds": torch.randn(2, 5, unet.config.cross_attention_dim, dtype=torch.float64)}
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    text |= {"pooled": torch.randn(2, pooled).double(), "time_ids": torch.full((2, 6), 32.0).double()}
    x = torch.randn(2, unet.config.in_channels, 8, 8, dtype=torch.float64)
    outputs = [call_unet(network, x, torch.tensor([9, 500]), text) for network in (plain, unet)]
    for output in outputs:
        output.square().mean().backward()
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(
            distributed.whole(parameter.grad), plain.get_parameter(name).grad, rtol=1e-8, atol=1e-10
        )


def test_weights_are_put_together_in_bfloat16_and_gradients_meet_in_float32() -> None:
    module = nn.Linear(4, 4)
    weight = module.weight.detach().clone()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    module.register_forward_pre_hook(lambda module, given: seen.append((module.weight.dtype, given[0].dtype)))
    distributed.spread(module, [], computed_in=torch.bfloat16)
    x = torch.full((1, 4), 1365.0)  # bfloat16 has 1368
    with torch.autocast("cpu", torch.bfloat16):
        module(x).sum().backward()
    assert seen[-1][1] == torch.float32
    assert module.weight.dtype == module.weight.grad.dtype == torch.float32
    assert torch.equal(distributed.whole(module.weight.detach()), weight)


def test_a_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device, wanted in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert load_recipe("emoji_lcm", [f"device={device}"]).torch_device == torch.device(wanted)


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


@pytest.mark.parametrize(("saved", "resumed"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("former", [False, True], ids=["what trains", "all, as before"])
def test_frozen_weights_are_left_out_spread_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool, resumed: bool, former: bool
) -> None:
    def network(spread: bool, value: float) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 1))
        nn.init.constant_(module[1].weight, value)
        if spread:
            distributed.spread(module, [module[0]])
        return module

    with monkeypatch.context() as patch:
        if former:
            patch.setattr(checkpoint, "_changing", lambda part: part.state_dict())
        path = checkpoint.save(tmp_path, {"module": network(saved, 2.0)}, {"images": 4})
    structure = json.loads((path / "state.json").read_text())["structure"]["module"]
    assert ("0.weight" in structure) is former and "1.weight" in structure
    module = network(resumed, 1.0)
    checkpoint.load(path, {"module": module})
    one, other = (_tensors({"module": each}) for each in (network(False, 2.0), module))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match=r"module lacks 0\.bias" if not former else r"module holds 0\.bias"):
        other_one = module.requires_grad_(True) if not former else nn.Sequential(nn.Identity(), nn.Linear(4, 1))
        checkpoint.load(path, {"module": other_one})


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


def test_whole_copies_are_gathered_on_the_cpu_by_the_first_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weight = module.weight.detach().clone()
    for spread in (False, True):
        if spread:
            distributed.spread(module, [])
        found = distributed.gathered(module.state_dict())
        assert torch.equal(found["weight"], weight) and all(value.is_contiguous() for value in found.values())
        assert found["weight"].data_ptr() != distributed.local(module.weight).data_ptr()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.gathered(module.state_dict()) == {}
