"""Latent consistency distillation on a toy pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import LCMScheduler, StableDiffusionXLPipeline

from sdxl_fast.diffusion import prediction, schedule
from sdxl_fast.inference import OneStepPipeline
from sdxl_fast.models.safetensors_check import check_safetensors
from sdxl_fast.train import checkpoint, losses
from sdxl_fast.train.config import LcmConfig, load_recipe
from sdxl_fast.train.lcm import LcmTask, boundary
from sdxl_fast.train.teacher import call_unet
from sdxl_fast.train.trainer import run


@pytest.fixture(scope="module")
def recipe(pictures: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        **{"kind": "lcm", "run": "lcm", "teacher": str(teacher_folder), "batch": 4, "images": 16, "draws": 2},
        "data": {"folder": str(pictures), "resolution": 32, "art_size": 64},
        **{"precision": "fp32", "guidance_range": [2.0, 2.0], "checkpoint_every": 8, "log_every": 4, "lora_rank": 2},
        **{"export_name": "lcm_toy", "optimizer": {"lr": 1e-3}},
    }
    path = tmp_path_factory.mktemp("lcm") / "lcm.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _task(recipe: Path, tmp_path: Path, *settings: str) -> LcmTask:
    config = load_recipe(recipe, list(settings))
    assert isinstance(config, LcmConfig)
    return LcmTask(config, tmp_path)


def test_the_boundary_is_diffusers_own() -> None:
    scheduler = LCMScheduler()
    for t in (0, 1, 19, 999):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        mine = boundary(torch.tensor([t]))
        assert mine[0].item() == pytest.approx(float(skip), rel=1e-5, abs=1e-9)
        assert mine[1].item() == pytest.approx(float(out), rel=1e-5)


def test_the_loss_is_the_published_one(recipe: Path, tmp_path: Path) -> None:
    """Pseudo-Huber distance of f at one level to f at the next, one guided DDIM step of the teacher below."""
    task = _task(recipe, tmp_path, "trains=full")
    bench = task.bench
    loss, _ = task._loss(8)
    _, condition = bench.batch(8, "lcm")
    x_t, t = task.seen[0]["x_t"], task.seen[0]["timesteps"]
    assert set(t.tolist()) <= {20 * k - 1 for k in range(1, 51)}
    zero = {**{k: torch.zeros_like(v) for k, v in condition.items()}, "time_ids": condition["time_ids"]}
    table = bench.alphas_cumprod
    with torch.no_grad():
        without = call_unet(bench.base, x_t, t, zero)
        epsilon = without + 2.0 * (call_unet(bench.base, x_t, t, condition) - without)
        then = t - 20
        alpha, sigma = schedule.alpha_sigma(table, then, 4)
        below = alpha * prediction.to_x0(epsilon, x_t, t, table, "epsilon") + sigma * epsilon

        def consistent(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            skip, out = boundary(level + 1)
            safe = level.clamp(min=0)
            return skip * x + out * prediction.to_x0(
                call_unet(bench.base, x, safe, condition), x, safe, table, "epsilon"
            )

        error = consistent(x_t, t) - consistent(below, then)
    expected = ((error.square() + losses.HUBER_C**2).sqrt() - losses.HUBER_C).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_at_the_clean_latent_the_student_is_the_identity(recipe: Path, tmp_path: Path) -> None:
    task = _task(recipe, tmp_path)
    latents, condition = task.bench.batch(0, "test")
    same = task._consistent(task.student, latents, torch.full((4,), -1), condition)
    torch.testing.assert_close(same, latents)


def test_targets_follow_the_student_slowly(recipe: Path, tmp_path: Path) -> None:
    task = _task(recipe, tmp_path, "target_half_life=40")
    assert task.target is not None
    shared = {p.data_ptr() for p in task.target.parameters()} & {p.data_ptr() for p in task.student.parameters()}
    assert shared, "what does not train is there once"
    start = {n: p.detach().clone() for n, p in task.student.named_parameters() if p.requires_grad}
    for images in (0, 4, 8):
        task.step(images)
    task.follower.copy_to(task.target)
    slow = dict(task.target.named_parameters())
    for name, parameter in task.student.named_parameters():
        if parameter.requires_grad and not torch.equal(parameter, start[name]):
            assert (slow[name] - start[name]).norm() < 0.9 * (parameter - start[name]).norm()
    assert all(p.grad is None for p in task.target.parameters())


def test_a_run_resumes_bitwise_and_both_samplers_draw_from_it(recipe: Path, cache: Path) -> None:
    run(recipe, ["run=whole", "target_half_life=20"])
    run(recipe, ["run=halves", "images=8", "target_half_life=20"])
    folder = run(recipe, ["run=halves", "target_half_life=20"], resume="latest")
    whole, halves = (checkpoint.latest(cache / "runs" / name) for name in ("whole", "halves"))
    assert whole is not None and halves is not None
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (halves / path.name).read_bytes(), path.name
    said = check_safetensors(folder / "lcm_toy_4step_lora.safetensors")["__metadata__"]["sdxl_fast.scheduler"]
    assert said.startswith("LCMScheduler, ") and said.endswith("original_inference_steps=50")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert isinstance(pipe.scheduler, LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red square", num_inference_steps=4, guidance_scale=0.0, output_type="np").images.shape == (
        1,
        32,
        32,
        3,
    )
    ours = OneStepPipeline.from_pretrained(folder, device="cpu")
    assert len(ours("red square", seed=1, num_inference_steps=4).images) == 1
