"""ADD's losses, discriminator and steps, on a toy pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline

from sdxl_fast.diffusion import prediction, schedule
from sdxl_fast.models.config import scheduler_arguments
from sdxl_fast.models.discriminators import AddDiscriminator, TokenHead
from sdxl_fast.models.lora import merge_lora, read_lora
from sdxl_fast.random import image_seeds
from sdxl_fast.train import checkpoint, losses
from sdxl_fast.train.add import AddTask, ScoreTeacher
from sdxl_fast.train.config import AddConfig, load_recipe
from sdxl_fast.train.teacher import call_unet
from sdxl_fast.train.trainer import run

pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")


@pytest.fixture(scope="module")
def recipe(pictures: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        **{"kind": "add", "run": "add", "teacher": str(teacher_folder), "batch": 4, "images": 16, "draws": 2},
        "data": {"folder": str(pictures), "resolution": 64, "art_size": 64},
        **{"precision": "fp32", "guidance_scale": 2.0, "checkpoint_every": 8, "log_every": 4, "seed": 3},
        **{"optimizer": {"lr": 1e-3}, "discriminator_optimizer": {"lr": 1e-3}},
    }
    path = tmp_path_factory.mktemp("add") / "add.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _task(recipe: Path, tmp_path: Path, *settings: str) -> AddTask:
    config = load_recipe(recipe, list(settings))
    assert isinstance(config, AddConfig)
    return AddTask(config, tmp_path)


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


def test_r1_is_the_squared_gradient_by_the_heads_inputs_and_reaches_the_weights() -> None:
    weight = torch.randn(6, requires_grad=True)
    tokens = torch.randn(3, 6, 5, requires_grad=True)
    penalty = losses.r1_penalty([torch.einsum("c,ncl->nl", weight, tokens)], [tokens])
    torch.testing.assert_close(penalty, 5 * weight.square().sum())  # each of 5 tokens has the gradient w
    penalty.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, 10.0 * weight)


def test_r1_has_a_second_derivative_through_the_head() -> None:
    torch.manual_seed(0)
    head = TokenHead(8, 4).double().eval()
    condition = torch.randn(2, 4, dtype=torch.float64)

    def penalty(tokens: torch.Tensor) -> torch.Tensor:
        score = head(tokens, condition).mean(1).sum()
        return torch.autograd.grad(score, tokens, create_graph=True)[0]

    tokens = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, (tokens,))


@pytest.mark.parametrize("kind", ["sds", "nfsd"])
def test_the_sds_weight_gives_the_gradient_of_score_distillation(kind: str) -> None:
    """c(t) · d/dx̂ ‖x̂ - x̂_ψ‖² = w(t) (ε̂ - ε) with w = σ², where x̂ - x̂_ψ = σ/α (ε̂ - ε)."""
    alpha, sigma = torch.tensor([0.8, 0.3]), torch.tensor([0.6, 0.954])
    difference = torch.tensor([0.5, -2.0])
    gradient = losses.distillation_weight(alpha, sigma, kind) * 2.0 * (sigma / alpha * difference)
    torch.testing.assert_close(gradient, sigma**2 * difference)
    with pytest.raises(ValueError, match="exponential, sds, nfsd"):
        losses.distillation_weight(alpha, sigma, "other")


def test_a_logit_depends_on_its_own_picture_text_and_image() -> None:
    torch.manual_seed(0)
    d = AddDiscriminator((16, 24), text=5, image=7).eval()
    tokens = [torch.randn(3, 16, 16), torch.randn(3, 24, 4)]
    text, image = torch.randn(3, 5), torch.randn(3, 7)
    logits = d(tokens, text, image)
    assert [tuple(logit.shape) for logit in logits] == [(3, 16), (3, 4)]
    alone = d([layer[1:2] for layer in tokens], text[1:2], image[1:2])
    for layer, one in zip(logits, alone, strict=True):
        torch.testing.assert_close(layer[1:2], one)
    assert not torch.allclose(logits[0], d(tokens, text.flip(0), image)[0])
    assert not torch.allclose(logits[0], d(tokens, text, image.flip(0))[0])
    with pytest.raises(ValueError, match="multiples of 8"):
        TokenHead(12, 5)


def test_each_step_moves_its_own_network_alone(recipe: Path, tmp_path: Path) -> None:
    task = _task(recipe, tmp_path, "d_warmup=4")
    student, discriminator = _weights(task.student), _weights(task.discriminator)
    frozen = [_weights(network) for network in (task.teacher.unet, task.features, task.bench.vae)]
    task.step(0)
    assert _same(student, _weights(task.student)), "the student waits until the discriminator is warm"
    moved = _weights(task.discriminator)
    assert not _same(discriminator, moved)

    after: dict[str, Any] = {}
    original = task.d_update.step

    def spy(images: int) -> float:
        assert all(p.grad is None for p in task.student.parameters())
        norm = original(images)
        after["discriminator"], after["student"] = _weights(task.discriminator), _weights(task.student)
        return norm

    task.d_update.step = spy  # type: ignore[method-assign]
    logged = task.step(4)
    assert _same(student, after["student"]), "the discriminator's loss must not reach the student"
    assert _same(after["discriminator"], _weights(task.discriminator)), "nor the student's the discriminator"
    assert all(p.grad is None for p in task.discriminator.parameters())
    assert not _same(student, _weights(task.student))
    for before, network in zip(frozen, (task.teacher.unet, task.features, task.bench.vae), strict=True):
        assert _same(before, _weights(network))
    assert set(logged) == {"d_loss", "r1", "d_accuracy", "d_grad_norm", "g_loss", "distillation", "grad_norm"}


@pytest.mark.parametrize("steps", [1, 2])
def test_the_exponential_target_is_the_guided_walk(recipe: Path, tmp_path: Path, steps: int) -> None:
    task = _task(recipe, tmp_path, "distillation=exponential", f"teacher_steps={steps}")
    bench, unet = task.bench, task.teacher.unet
    x0, condition = bench.batch(0, "test")
    t = torch.tensor([3, 200, 700, 999])
    x_t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, now = x_t, t
        for left in range(steps - 1, -1, -1):
            zero = {
                **{key: torch.zeros_like(value) for key, value in condition.items()},
                "time_ids": condition["time_ids"],
            }
            without = call_unet(unet, expected, now, zero)
            epsilon = without + 2.0 * (call_unet(unet, expected, now, condition) - without)
            estimate = prediction.to_x0(epsilon, expected, now, bench.alphas_cumprod, "epsilon")
            then = (t + 1) * left // steps - 1
            alpha, sigma = schedule.alpha_sigma(bench.alphas_cumprod, then, 4)
            expected, now = alpha * estimate + sigma * epsilon, then
    torch.testing.assert_close(task.teacher.target(x0, x_t, t, condition), expected, rtol=1e-3, atol=1e-3)


def test_the_noise_free_target_needs_no_noise_where_the_teacher_agrees(recipe: Path, tmp_path: Path) -> None:
    """A teacher that ignores the text gives no direction above t = 200: the target is the estimate itself."""
    task = _task(recipe, tmp_path, "distillation=nfsd")
    bench = task.bench
    x0, condition = bench.batch(0, "test")
    silent = {key: torch.zeros_like(value) for key, value in condition.items()}
    teacher = ScoreTeacher(bench, task.teacher.unet, {key: value[:1] for key, value in silent.items()})
    t = torch.tensor([100, 200, 700, 999])
    target = teacher.target(x0, torch.randn(x0.shape), t, silent)
    torch.testing.assert_close(target[1:], x0[1:], rtol=1e-3, atol=1e-3)
    assert (target[0] - x0[0]).abs().max() > 1e-2


def test_recomputing_the_decoder_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    plain, recomputed = _task(recipe, tmp_path), _task(recipe, tmp_path, "checkpoint_decoder=true")
    first, second = ({k: float(v) for k, v in task.step(0).items()} for task in (plain, recomputed))
    assert first == pytest.approx(second, rel=1e-4)
    assert _same(_weights(plain.discriminator), _weights(recomputed.discriminator))


def test_a_run_resumes_bitwise_and_stock_diffusers_draws_from_it(recipe: Path, cache: Path) -> None:
    run(recipe, ["run=whole"])
    run(recipe, ["run=halves", "images=8"])
    folder = run(recipe, ["run=halves"], resume="latest")
    whole, halves = (checkpoint.latest(cache / "runs" / name) for name in ("whole", "halves"))
    assert whole is not None and halves is not None
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (halves / path.name).read_bytes(), path.name
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    pipe.set_progress_bar_config(disable=True)
    image = pipe("red square", num_inference_steps=1, guidance_scale=0.0, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_a_lora_on_the_shared_base_trains_and_is_merged_into_the_export(recipe: Path, cache: Path) -> None:
    folder = run(recipe, ["trains=lora", "lora_rank=2", "export_name=add_toy", "images=8"])
    teacher = StableDiffusionXLPipeline.from_pretrained(load_recipe(recipe).teacher).unet  # type: ignore[union-attr]
    lora = read_lora(folder / "add_toy_4step_lora.safetensors", teacher)
    assert lora.metadata["sdxl_fast.scheduler"] == "EulerAncestralDiscreteScheduler, timestep_spacing=trailing"
    merge_lora(teacher, lora)
    exported = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32).unet
    for name, weight in exported.state_dict().items():
        torch.testing.assert_close(weight, teacher.state_dict()[name], rtol=2e-3, atol=2e-3)


def test_a_lora_moves_alone_and_the_base_is_there_once(recipe: Path, tmp_path: Path) -> None:
    task = _task(recipe, tmp_path, "trains=lora", "lora_rank=2")
    shared = {p.data_ptr() for p in task.teacher.unet.parameters()}
    frozen = [p for p in task.student.parameters() if not p.requires_grad]
    assert frozen and all(p.data_ptr() in shared for p in frozen)
    before = _weights(task.student)
    task.step(0)
    moved = {name for name, value in _weights(task.student).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_what_the_heads_are_told_can_be_switched_off(recipe: Path, tmp_path: Path) -> None:
    text_alone = _task(recipe, tmp_path, "conditions=[text]")
    drawn = text_alone._draw(0)
    image = drawn._replace(image=drawn.image.flip(0) + 1)
    text = drawn._replace(condition={**drawn.condition, "pooled": drawn.condition["pooled"].flip(0) + 1})
    # spectral norm's vectors move with each forward in training mode
    text_alone.discriminator.eval()
    plain = text_alone.discriminator_loss(drawn)[0]
    assert torch.equal(text_alone.discriminator_loss(image)[0], plain)
    assert not torch.equal(text_alone.discriminator_loss(text)[0], plain)


def test_the_distillation_alone_ignores_the_heads(recipe: Path, tmp_path: Path) -> None:
    task = _task(recipe, tmp_path, "adversarial_weight=0")
    loss, facts = task.student_loss(task._draw(0), 0)
    assert loss.item() == pytest.approx(2.5 * facts["distillation"].item(), rel=1e-6) and facts["g_loss"] != 0


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_refinement_is_diffusers_ancestral_sampler(recipe: Path, tmp_path: Path, steps: int) -> None:
    """The same noise through stock `EulerAncestralDiscreteScheduler` gives the same pictures."""
    task = _task(recipe, tmp_path)
    bench, count = task.bench, len(task.bench.previews["pooled"])
    scheduler = EulerAncestralDiscreteScheduler(**scheduler_arguments("epsilon"))
    scheduler.set_timesteps(steps)
    x = bench.pure_noise(image_seeds(count, "preview")) * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    draws = iter([bench.pure_noise(image_seeds(count, "preview", int(t))) for t in scheduler.timesteps])
    place = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    with torch.no_grad(), mock.patch(place, lambda *args, **settings: next(draws)):
        for t in scheduler.timesteps:
            output = call_unet(task.student, scheduler.scale_model_input(x, t), t.long().expand(count), bench.previews)
            x = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(task._refined(steps), bench.decode(x), rtol=1e-3, atol=2e-3)


def test_levels_without_pure_noise_are_refused(recipe: Path) -> None:
    with pytest.raises(ValueError, match="hold 999"):
        load_recipe(recipe, ["timesteps=[249,499]"])


def test_settings_that_would_do_nothing_are_refused(recipe: Path) -> None:
    with pytest.raises(ValueError, match="teacher_steps is 4, but nfsd takes a direction at one level"):
        load_recipe(recipe, ["teacher_steps=4"])
    assert load_recipe(recipe, ["teacher_steps=4", "distillation=sds"])
    with pytest.raises(ValueError, match="efficientnet-lite0 takes pictures as they are; leave it out"):
        load_recipe(recipe, ["feature_size=224"])
    with pytest.raises(ValueError, match="feature_size is 512; allowed: multiples of the patch, 14"):
        load_recipe(recipe, ["feature_size=512", "feature_network=facebook/dinov2-small"])
    assert load_recipe(recipe, ["feature_size=518", "feature_network=facebook/dinov2-small"])
    with pytest.raises(ValueError, match="d_warmup is 8, after which no batch of 4 is left of 8 images"):
        load_recipe(recipe, ["d_warmup=8", "images=8"])
    assert load_recipe(recipe, ["d_warmup=4", "images=8"])


def test_the_recipes_resolution_is_the_size_of_sheets_and_export(recipe: Path, cache: Path, tmp_path: Path) -> None:
    """The toy UNet was made for pictures of 32 px, the data are of 64 px."""
    task = _task(recipe, tmp_path, "resolution=64", "trains=lora", "lora_rank=2")
    assert task.bench.previews["time_ids"][0].tolist() == [64, 64, 0, 0, 64, 64]
    task.export(tmp_path / "export")
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("red square", num_inference_steps=1, guidance_scale=0.0, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_a_random_student_of_another_shape_trains_and_is_exported(recipe: Path, cache: Path, tmp_path: Path) -> None:
    shape = ("student=random", "student_width=0.5", "student_text_time=false")
    task = _task(recipe, tmp_path, *shape)
    mine, teacher = task.student, task.teacher.unet
    assert [2 * width for width in mine.config.block_out_channels] == list(teacher.config.block_out_channels)
    assert mine.config.addition_embed_type is None and not hasattr(mine, "add_embedding")
    assert mine.config.cross_attention_dim == teacher.config.cross_attention_dim
    before = _weights(mine)
    task.step(0)
    assert not _same(before, _weights(mine))
    again = _task(recipe, tmp_path, *shape).student
    assert _same(before, _weights(again)), "new weights are those of the seed"
    out = run(recipe, [*shape, "images=4"])
    pipe = StableDiffusionXLPipeline.from_pretrained(out)
    assert pipe.unet.config.block_out_channels == mine.config.block_out_channels


def test_a_student_of_another_shape_must_start_at_random(recipe: Path) -> None:
    with pytest.raises(ValueError, match="set student to random"):
        load_recipe(recipe, ["student_width=2"])
    with pytest.raises(ValueError, match="set trains to full"):
        load_recipe(recipe, ["student=random", "trains=lora"])
