"""Checkpoints come back as they were, whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdxl_fast.train import checkpoint
from sdxl_fast.train.interruptions import clear_temporaries


def _trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.0, 0.99))
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return module, optimizer


def test_optimizer_and_module_come_back_bit_for_bit(tmp_path: Path) -> None:
    module, optimizer = _trained()
    checkpoint.save(tmp_path, {"module": module, "optimizer": optimizer}, {"images": 12})
    other = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1.0)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    state = checkpoint.load(newest, {"module": other, "optimizer": other_optimizer})
    assert state == {"images": 12}
    for a, b in ((module, other), (optimizer, other_optimizer)):
        left, right = checkpoint.flatten(a.state_dict()), checkpoint.flatten(b.state_dict())
        assert left[1] == right[1]
        assert left[0].keys() == right[0].keys() and all(torch.equal(left[0][k], right[0][k]) for k in left[0])


def test_flatten_and_unflatten_are_inverse() -> None:
    tree = {"state": {0: {"step": torch.tensor(3.0), "x": [1, None, "a"]}}, "groups": [{"lr": 0.1, "ids": [0, 1]}]}
    tensors, rest = checkpoint.flatten(tree)
    back = checkpoint.unflatten(rest, tensors)
    assert back["state"][0]["step"].item() == 3.0
    assert back["state"][0]["x"] == [1, None, "a"] and back["groups"] == tree["groups"]


def test_only_the_newest_are_kept_and_stale_writing_is_cleared(tmp_path: Path) -> None:
    module, _ = _trained()
    (tmp_path / ".checkpoint-000000001.99").mkdir()
    for images in (4, 8, 100):
        checkpoint.save(tmp_path, {"module": module}, {"images": images}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000008", "checkpoint-000000100"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-000000100"


def test_a_checkpoint_without_a_wanted_part_says_so(tmp_path: Path) -> None:
    module, optimizer = _trained()
    path = checkpoint.save(tmp_path, {"module": module}, {"images": 1})
    with pytest.raises(ValueError, match="missing: optimizer; resume with the settings"):
        checkpoint.load(path, {"module": module, "optimizer": optimizer})
    with pytest.raises(ValueError, match="no state"):
        checkpoint.load(tmp_path, {})


def _partly_frozen(seed: int = 0) -> nn.Module:
    """What a seed makes, of which the first layer does not train; with buffers."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    module[0].requires_grad_(False)
    return module


def test_frozen_weights_are_left_out(tmp_path: Path) -> None:
    module = _partly_frozen()
    with torch.no_grad():
        module(torch.randn(5, 3))
        module[2].weight.fill_(2.0)
    path = checkpoint.save(tmp_path, {"module": module}, {"images": 4})
    saved = load_file(path / "module.safetensors")
    assert saved.keys() == module.state_dict().keys() - {"0.weight", "0.bias"} and "1.running_mean" in saved
    rebuilt = _partly_frozen()
    checkpoint.load(path, {"module": rebuilt})
    assert all(torch.equal(value, rebuilt.state_dict()[name]) for name, value in module.state_dict().items())
    with pytest.raises(ValueError, match=r"module lacks 0\.bias and 1 more that train by this recipe; resume with"):
        checkpoint.load(path, {"module": rebuilt.requires_grad_(True)})
    with pytest.raises(ValueError, match=r"module holds 2\.bias and 1 more that this recipe has not; resume with"):
        checkpoint.load(path, {"module": nn.Sequential(*list(_partly_frozen())[:2])})


def test_a_checkpoint_of_before_that_holds_frozen_weights_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_changing", lambda part: part.state_dict())
        path = checkpoint.save(tmp_path, {"module": _partly_frozen(seed=0)}, {"images": 4})
    module = _partly_frozen(seed=1)
    checkpoint.load(path, {"module": module})
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in _partly_frozen().state_dict().items())


def test_the_average_follows_its_half_life() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = checkpoint.Average(module, half_life=100.0, ramp=1e9)
    nn.init.ones_(module.weight)
    for step in range(10):
        average.update(module, 10 * (step + 1), 10)
    assert average.values["weight"].item() == pytest.approx(0.5)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    assert checkpoint.Average(frozen, 1.0).values == {}


def test_moments_take_their_parameters_memory_format(tmp_path: Path) -> None:
    def trained(steps: int, resume: Path | None) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
        if resume:
            checkpoint.load(resume, {"module": module, "optimizer": optimizer})
        for step in range(steps):
            x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(step + (2 if resume else 0)))
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        return module, optimizer

    whole, _ = trained(4, None)
    half, optimizer = trained(2, None)
    path = checkpoint.save(tmp_path, {"module": half, "optimizer": optimizer}, {"images": 2})
    resumed, _ = trained(2, path)
    assert torch.equal(whole.weight, resumed.weight)  # type: ignore[arg-type]


def test_what_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    module, optimizer = _trained()
    parts = {"module": module, "optimizer": optimizer}
    whole = checkpoint.save(tmp_path, parts, {"images": 4})
    (checkpoint.save(tmp_path, parts, {"images": 8}) / "module.safetensors").unlink()
    assert checkpoint.latest(tmp_path) == whole
    (tmp_path / "checkpoint-000000012").mkdir()
    (tmp_path / "checkpoint-000000016").mkdir()
    (tmp_path / "checkpoint-000000016" / "state.json").write_text('{"images": 16, "struct')
    assert checkpoint.latest(tmp_path) == whole
    newest = checkpoint.save(tmp_path, parts, {"images": 20})
    assert sorted(tmp_path.iterdir()) == [whole, newest], "and does not count among those that are kept"


def test_whoever_is_killed_while_one_is_removed_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = _trained()
    for images in (4, 8):
        checkpoint.save(tmp_path, {"module": module}, {"images": images})

    class Killed(BaseException):
        pass

    def halfway(path: Path, **_: object) -> None:
        if path.exists():
            next(path.glob("*.safetensors")).unlink()
            raise Killed

    for images in (8, 12):  # the newest once more, and one that the oldest gives way to
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(checkpoint.shutil, "rmtree", halfway)
            checkpoint.save(tmp_path, {"module": module}, {"images": images})
        clear_temporaries(tmp_path)
        assert checkpoint.latest(tmp_path) == tmp_path / f"checkpoint-{images:09d}"
        for path in tmp_path.glob("checkpoint-*"):
            assert checkpoint.load(path, {"module": module})["images"] == int(path.name[-9:])
