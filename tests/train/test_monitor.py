"""The monitor tells the failures that the papers name from a healthy run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdxl_fast.train.config import RECIPES, LightningConfig, load_recipe
from sdxl_fast.train.monitor import ARMED, Monitor, facts_of_sheet, reference
from sdxl_fast.train.stages import units_of
from sdxl_fast.train.trainer import run


def _pictures(seed: int, detail: float = 1.0) -> torch.Tensor:
    """Twelve pictures that differ in layout, with edges."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.rand(12, 3, 4, 4, generator=draw) * 2 - 1
    return torch.nn.functional.interpolate(blocks, size=32) * detail


def _check(pictures: torch.Tensor) -> list[str]:
    monitor = Monitor()
    assert monitor.check(facts_of_sheet(_pictures(0))) == []
    return monitor.check(facts_of_sheet(pictures))


def test_healthy_samples_bring_no_warning() -> None:
    assert _check(_pictures(1)) == []


def test_collapse_noise_and_blur_are_named() -> None:
    draw = torch.Generator().manual_seed(3)
    (collapsed,) = _check(_pictures(1)[:1].repeat(12, 1, 1, 1) + 0.01 * torch.randn(12, 3, 32, 32, generator=draw))
    assert "collapse" in collapsed
    (noisy,) = _check(_pictures(1) * 0.7 + 0.5 * torch.randn(12, 3, 32, 32, generator=draw))
    assert "noise" in noisy
    blurred = torch.nn.functional.avg_pool2d(_pictures(1), 7, stride=1, padding=3)
    assert any("blur" in warning for warning in _check(blurred))


def test_a_discriminator_that_has_won_or_lost_is_named() -> None:
    monitor = Monitor()
    assert monitor.check({"d_accuracy": 0.8}) == []
    assert "has won" in monitor.check({"d_accuracy": 0.995})[0]
    assert "has lost" in monitor.check({"d_accuracy": 0.3})[0]


def test_a_jump_of_the_gradient_is_divergence() -> None:
    monitor = Monitor()
    lines = [{"grad_norm": 1.0 + 0.1 * (k % 3)} for k in range(ARMED)]
    assert [warning for line in lines for warning in monitor.check(line)] == []
    (warning,) = monitor.check({"grad_norm": 30.0})
    assert "divergence: grad_norm is 30" in warning


@pytest.mark.parametrize("name", ["g_loss", "d_loss", "regression", "r1", "loss", "distillation", "d_grad_norm"])
def test_every_loss_is_watched(name: str) -> None:
    monitor = Monitor()
    for k in range(ARMED):
        assert monitor.check({name: 1.0 + 0.1 * k}) == []
    (warning,) = monitor.check({name: 40.0})
    assert f"divergence: {name} is 40, 10 times its running median" in warning
    (warning,) = monitor.check({name: float("nan")})
    assert warning == f"divergence: {name} is nan"
    assert monitor.check({name: 1.2}) == [], "what is not finite does not blur the median"


def test_a_hinge_loss_may_pass_through_zero() -> None:
    monitor = Monitor()
    lines = [{"g_loss": value} for value in (0.02, 0.01, -0.01, -0.02, 0.01, 0.5, -3.0)]
    assert [warning for line in lines for warning in monitor.check(line)] == []
    assert "divergence: g_loss is -50" in monitor.check({"g_loss": -50.0})[0]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("sdxl_*.yaml")), ids=lambda path: path.stem)
def test_monitors_are_armed_in_every_unit_of_the_sdxl_recipes(path: Path) -> None:
    config = load_recipe(path)
    lengths = [u.images for u in units_of(config)] if isinstance(config, LightningConfig) else [config.images]
    every = max(config.log_every, config.batch)
    assert all(images / every >= 4 * ARMED for images in lengths), "most of a unit must be watched"


def test_a_run_keeps_what_its_sheets_show(lightning_recipe: Path, cache: Path) -> None:
    run(lightning_recipe, ["stages=[{name: a, steps: 32, loss: mse, images: 16}]"])
    folder = cache / "runs" / "distil" / "00-a-mse"
    lines = [json.loads(line) for line in (folder / "sheets.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 16]
    assert all(line["sheet_sharpness"] > 0 and line["sheet_diversity"] > 0 for line in lines)
    first = Monitor(folder / "sheets.jsonl")
    assert any("collapse" in w for w in first.check({"sheet_sharpness": 1.0, "sheet_diversity": 0.0}))


def test_a_unit_is_compared_with_the_end_of_the_one_before(tmp_path: Path) -> None:
    """What a unit breaks before its own first sheet shows, too."""
    for name, sharpness in (("09-4-step-lora-d", (9.0, 1.0)), ("10-2-step-lora-d", (50.0,)), ("emoji-add", (3.0, 4.0))):
        lines = [json.dumps({"images": 8, "sheet_sharpness": s, "sheet_diversity": 1.0}) for s in sharpness]
        (tmp_path / name).mkdir()
        (tmp_path / name / "sheets.jsonl").write_text("\n".join(lines))
    line = {"sheet_sharpness": 50.0, "sheet_diversity": 1.0}
    assert "noise: samples have 50.0 times" in Monitor(tmp_path / "10-2-step-lora-d" / "sheets.jsonl").check(line)[0]
    assert "noise: samples have 5.6 times" in Monitor(tmp_path / "09-4-step-lora-d" / "sheets.jsonl").check(line)[0]
    assert reference(tmp_path / "emoji-add" / "sheets.jsonl")["sheet_sharpness"] == 3.0
    assert reference(tmp_path / "11-next" / "sheets.jsonl")["sheet_sharpness"] == 50.0
    (tmp_path / "10-2-step-lora-d").rename(tmp_path / "10-1-step-convert")
    assert reference(tmp_path / "11-next" / "sheets.jsonl") == {}
    assert reference(tmp_path / "00-first" / "sheets.jsonl") == {}


def test_facts_are_relative_to_nothing_else() -> None:
    pictures = _pictures(0)
    facts = facts_of_sheet(pictures)
    assert facts_of_sheet(pictures.flip(0)) == pytest.approx(facts)
    half = facts_of_sheet(pictures / 2)
    assert half["sheet_diversity"] == pytest.approx(facts["sheet_diversity"] / 2, rel=1e-5)
    assert half["sheet_sharpness"] == pytest.approx(facts["sheet_sharpness"] / 4, rel=1e-5)
