"""The adversarial steps and the stages they make up, on a toy pipeline."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from sdxl_fast import OneStepPipeline
from sdxl_fast.diffusion import prediction, schedule
from sdxl_fast.models.lora import merge_lora, read_lora
from sdxl_fast.train import checkpoint, losses, stages
from sdxl_fast.train.config import LightningConfig, load_recipe
from sdxl_fast.train.lightning import AdversarialTask, RegressionTask, Teacher
from sdxl_fast.train.teacher import call_unet
from sdxl_fast.train.trainer import fit, run


@pytest.fixture(scope="module")
def bench(lightning_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> stages.Bench[LightningConfig]:
    """Shared by the tests: units copy the base before they change anything."""
    config = load_recipe(lightning_recipe)
    assert isinstance(config, LightningConfig)
    return stages.make_bench(config, tmp_path_factory.mktemp("bench"))


@pytest.fixture
def lab(bench: stages.Bench[LightningConfig], tmp_path: Path) -> Any:
    folder = tmp_path / "run"
    folder.mkdir()
    return bench.config, bench, stages.Lineage(bench, folder), folder


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def _adversarial(lab: Any, conditional: bool = True) -> AdversarialTask:
    _config, bench, lineage, folder = lab
    first, units = stages.make_task(lineage.units[0], bench, lineage), lineage.units
    lineage.units[0].folder(folder).mkdir(exist_ok=True)
    lineage.write_student(units[0], first.student.unet)
    unit = units[1]
    assert unit.phase is not None and unit.phase.condition
    task = stages.make_task(unit, bench, lineage)
    assert isinstance(task, AdversarialTask) and task.discriminator.conditional is conditional
    return task


def test_teacher_walks_like_repeated_guided_moves(lab: Any) -> None:
    _config, bench, lineage, _ = lab
    unet = lineage.plain_base()
    teacher = Teacher(bench, unet, 1000 / 8, guidance=3.0)
    x_t, t, condition = bench.inputs((999, 124), 0, "test")
    with torch.no_grad():
        walked = teacher.walk(x_t, t, condition, 2)
        for _ in range(2):
            then = schedule.next_timesteps(t, 125)
            zero = {
                **{key: torch.zeros_like(value) for key, value in condition.items()},
                "time_ids": condition["time_ids"],
            }
            without = call_unet(unet, x_t, t.clamp(min=0), zero)
            output = without + 3.0 * (call_unet(unet, x_t, t.clamp(min=0), condition) - without)
            x0 = prediction.to_x0(output, x_t, t, bench.alphas_cumprod, "epsilon")
            alpha, sigma = schedule.alpha_sigma(bench.alphas_cumprod, then, 4)
            moved = alpha * x0 + sigma * prediction.to_epsilon(output, x_t, t, bench.alphas_cumprod, "epsilon")
            x_t = torch.where((t == then)[:, None, None, None], x_t, moved)
            t = then
    torch.testing.assert_close(walked, x_t, rtol=1e-4, atol=1e-4)


def test_inputs_are_pure_noise_at_the_last_timestep_and_repeat_by_key(lab: Any) -> None:
    _, bench, _, _ = lab
    x_t, t, _ = bench.inputs((999,), 7, "a")
    again, _, _ = bench.inputs((999,), 7, "a")
    other, _, _ = bench.inputs((999,), 8, "a")
    assert t.tolist() == [999] * 4
    assert torch.equal(x_t, again) and not torch.equal(x_t, other)
    assert abs(x_t.mean().item()) < 0.15 and abs(x_t.std().item() - 1) < 0.1


def test_neither_step_moves_the_other_network(lab: Any) -> None:
    task = _adversarial(lab)
    student, d = _weights(task.student.unet), _weights(task.discriminator)
    task.discriminator_step(0)
    assert _same(student, _weights(task.student.unet)) and not _same(d, _weights(task.discriminator))
    d = _weights(task.discriminator)
    task.student_step(0)
    assert _same(d, _weights(task.discriminator)) and not _same(student, _weights(task.student.unet))
    assert all(p.grad is None for p in task.discriminator.parameters())
    assert all(p.requires_grad for p in task.discriminator.parameters())


def test_where_the_step_began_passes_the_discriminator_once(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real and fake together (x_t, c) is one pass, and their own latents, side by side, are another."""
    task = _adversarial(lab)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    features = task.discriminator.features

    def noting(latents: torch.Tensor, timesteps: torch.Tensor, condition: Any) -> torch.Tensor:
        seen.append((latents.detach().clone(), timesteps))
        found: torch.Tensor = features(latents, timesteps, condition)
        return found

    monkeypatch.setattr(task.discriminator, "features", noting)
    task.discriminator_step(0)
    (x_t, t), (pair, level) = seen
    start = task.start(0, "discriminator")
    assert torch.equal(x_t, start.x_t) and torch.equal(t, start.t)
    assert len(pair) == len(level) == 2 * len(x_t)
    with torch.no_grad():
        torch.testing.assert_close(pair[: len(x_t)], task.teacher.walk(*start, task.substeps))


def test_a_lora_phase_trains_the_lora_alone(lab: Any) -> None:
    task = _adversarial(lab)
    before = _weights(task.student.unet)
    task.step(4)
    moved = {key for key, value in _weights(task.student.unet).items() if not torch.equal(value, before[key])}
    assert moved and all("lora_" in key for key in moved)


def _with(lab: Any, **options: Any) -> Any:
    """The lab with settings changed; `discriminator` takes a dict of its own."""
    config, bench, _, folder = lab
    d = config.discriminator.model_copy(update=options.pop("discriminator", {}))
    bench = replace(bench, config=config.model_copy(update={"discriminator": d, **options}))
    return bench.config, bench, stages.Lineage(bench, folder), folder


@pytest.mark.parametrize("option", ["r1", "approximate_r1", "misaligned_text"])
def test_each_penalty_of_the_discriminator_changes_its_step(lab: Any, option: str) -> None:
    plain, penalised = _adversarial(lab), _adversarial(_with(lab, discriminator={option: 10.0}))
    start = _weights(plain.discriminator)
    assert _same(start, _weights(penalised.discriminator))
    a, b = plain.discriminator_step(0), penalised.discriminator_step(0)
    assert float(a["d_loss"]) == pytest.approx(float(b["d_loss"]), rel=1e-6), "the logged loss is the paper's"
    assert a["d_grad_norm"] != pytest.approx(b["d_grad_norm"], rel=1e-3)
    assert not _same(_weights(plain.discriminator), _weights(penalised.discriminator))
    assert all(p.grad is None for p in penalised.student.unet.parameters())


def test_r1_smooths_the_discriminator(lab: Any) -> None:
    def slope(task: AdversarialTask) -> float:
        for images in range(0, 80, 4):
            task.discriminator_step(images)
        x_t, t, condition = task.start(0, "probe")
        x_t.requires_grad_()
        feature = task.discriminator.features(x_t, t, condition)
        return losses.gradient_penalty(task.discriminator.judge(feature, feature.detach()), x_t).item()

    assert slope(_adversarial(_with(lab, discriminator={"r1": 10.0}))) < 0.5 * slope(_adversarial(lab))


def test_a_frozen_backbone_stays(lab: Any) -> None:
    task = _adversarial(_with(lab, discriminator={"freeze_backbone": True}))
    before = _weights(task.discriminator)
    task.step(4)
    moved = {key for key, value in _weights(task.discriminator).items() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith("head.") for key in moved)


def test_regression_beside_the_adversarial_loss(lab: Any) -> None:
    task = _adversarial(lab)
    plain, facts = task._student_loss(8)
    assert "regression" not in facts
    task.phase = task.phase.model_copy(update={"regression_weight": 50.0})
    both, facts = task._student_loss(8)
    with torch.no_grad():
        start = task.start(8, "student")
        error = task.student.move(*start).x - task.teacher.walk(*start, task.substeps)
    regression = facts["regression"].item()
    assert regression == pytest.approx(error.square().mean().item(), rel=1e-4) and regression > 0
    assert (both - plain).item() == pytest.approx(50.0 * regression, rel=1e-3)
    assert "regression" in task.step(8)


def test_the_discriminator_warms_up_alone(lab: Any) -> None:
    task = _adversarial(lab)
    assert "g_loss" not in task.step(0)
    assert "g_loss" in task.step(4)


def test_discriminator_features_are_the_unets_mid_block(lab: Any) -> None:
    task = _adversarial(lab)
    _, bench, lineage, _ = lab
    unet = lineage.plain_base()
    caught: list[torch.Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, inputs, output: caught.append(output))
    x_t, t, condition = bench.inputs((499, 124), 0, "features")
    t = torch.where(t == 124, -1, t)  # the clean latent, shown as timestep 0
    assert (t == -1).any() and (t == 499).any()
    with torch.no_grad():
        call_unet(unet, x_t, t.clamp(min=0), condition)
        features = task.discriminator.features(x_t, t, condition)
        logits = task.discriminator.judge(features, features)
    torch.testing.assert_close(features, caught[0], rtol=1e-4, atol=1e-4)
    assert logits.shape == (4,)
    with pytest.raises(ValueError, match="features_t is None"):
        task.discriminator.judge(features, None)


def test_renoising_is_shared_by_real_and_fake_and_weighted(lab: Any) -> None:
    _, bench, lineage, _ = lab
    task = _adversarial(lab)
    phase = lineage.units[-1].phase
    assert phase is not None
    task.phase = phase
    renoise = task._renoise(3, "d")
    again = task._renoise(3, "d")
    assert torch.equal(renoise.timesteps, again.timesteps) and torch.equal(renoise.seeds, again.seeds)
    zeros, t = torch.zeros(4, *bench.source.shapes[0]), torch.full((4,), 249)
    moved, moved_and_noised = bench.move(zeros, zeros, (t, t), "epsilon", renoise)
    torch.testing.assert_close(moved, zeros)
    torch.testing.assert_close(moved_and_noised, bench.renoised(zeros, renoise))
    drawn = torch.cat([task._renoise(index).timesteps for index in range(150)])
    assert set(drawn.tolist()) <= {10, 250, 500, 750}
    assert abs((drawn == 10).float().mean().item() - 5 / 8) < 0.08


def test_conversion_regresses_on_the_frozen_networks_x0(lab: Any) -> None:
    _config, bench, lineage, folder = lab
    for unit in lineage.units[:5]:
        if unit.trains == "lora":
            unit.folder(folder).mkdir()
            lineage.write_student(unit, lineage.student_of(lineage.units[0]))
    unit = next(unit for unit in lineage.units if unit.convert)
    task = stages.make_task(unit, bench, lineage)
    assert isinstance(task, RegressionTask) and task.student.prediction_type == "sample"
    x_t, t, condition = task.start(0, "x0")
    wanted = task._target_x0(x_t, t, condition)
    with torch.no_grad():
        epsilon = call_unet(task.teacher.unet, x_t, t, condition)
    alpha, sigma = schedule.alpha_sigma(bench.alphas_cumprod, t, 4)
    torch.testing.assert_close(wanted, (x_t - sigma * epsilon) / alpha)


@pytest.mark.parametrize("index", [0, 1])
def test_stopping_and_resuming_is_bitwise_the_uninterrupted_run(lab: Any, index: int, tmp_path: Path) -> None:
    config, bench, lineage, _folder = lab
    if index:
        _adversarial(lab)
    unit = lineage.units[index]
    results = []
    for parts in ((16,), (8, 16)):
        place = tmp_path / f"resume-{len(parts)}"
        for total in parts:
            task = stages.make_task(unit, bench, lineage)
            assert fit(task, config, total, place, resume=True, label="test")
        newest = checkpoint.latest(place)
        assert newest is not None
        tensors = {}
        for path in sorted(newest.glob("*.safetensors")):
            tensors |= {f"{path.stem}/{key}": value for key, value in load_file(path).items()}
        results.append((tensors, [json.loads(x)["images"] for x in (place / "metrics.jsonl").read_text().splitlines()]))
    (whole, lines), (halves, lines_2) = results
    assert lines == lines_2 == [4, 8, 12, 16]
    assert whole.keys() == halves.keys() and _same(whole, halves)
    saved = {key.removeprefix("student/") for key in whole if key.startswith("student/")}
    assert saved == {name for name, p in task.student.unet.named_parameters() if p.requires_grad}, "no frozen weight"
    assert all(".lora_" in name for name in saved)


def test_the_discriminators_rate_is_the_phases(lab: Any) -> None:
    task = _adversarial(lab)
    assert task.d_update.config.lr == 1e-3
    phase = task.phase.model_copy(update={"d_lr": 1e-5})
    other = AdversarialTask(task.student, task.teacher, task.substeps, task.discriminator, phase)
    assert other.d_update.config.lr == 1e-5 and other.update.config.lr == task.update.config.lr


def test_all_stages_run_chain_and_export(lightning_recipe: Path, cache: Path, teacher_folder: Path) -> None:
    out = run(lightning_recipe, [])
    folder = cache / "runs" / "distil"
    lines = folder.joinpath("chain.jsonl").read_text().splitlines()
    units = [json.loads(line) for line in lines]
    assert [unit["unit"].split("-", 1)[1] for unit in units] == [
        "32-step-mse",
        "8-step-lora-d",
        "8-step-lora-d-prime",
        "8-step-full-d-prime",
        "4-step-lora-d-prime",
        "1-step-convert",
        "1-step-full-d",
        "1-step-full-d-prime",
    ]
    for before, after in zip(lines, units[1:], strict=False):
        assert after["previous"] == hashlib.sha256(before.encode()).hexdigest()
    for unit in units:
        for name, digest in unit["sha256"].items():
            assert hashlib.sha256((folder / unit["unit"] / name).read_bytes()).hexdigest() == digest

    assert not [path for path in out.rglob("*.json") if str(teacher_folder) in path.read_text()]
    pipe = StableDiffusionXLPipeline.from_pretrained(out, torch_dtype=torch.float32)
    assert pipe.scheduler.config.prediction_type == "sample"
    image = pipe("red square", num_inference_steps=1, guidance_scale=0, output_type="np").images
    assert image.shape == (1, 32, 32, 3)

    base = UNet2DConditionModel.from_pretrained(out / "unet_base", torch_dtype=torch.float32)
    stock = UNet2DConditionModel.from_pretrained(teacher_folder / "unet", torch_dtype=torch.float32)
    assert _same(_weights(stock.half().float()), _weights(base)), "the base UNet is the teacher's, untouched"
    lora = read_lora(out / "toy_8step_lora.safetensors", base)
    assert lora.metadata["sdxl_fast.num_inference_steps"] == "8"
    before = _weights(base)
    merge_lora(base, lora)
    assert not _same(before, _weights(base))
    assert sorted(path.name for path in out.glob("*_lora.safetensors")) == [
        "toy_4step_lora.safetensors",
        "toy_8step_lora.safetensors",
    ]

    published = folder / "published"
    assert sorted(path.name for path in published.iterdir()) == [
        "toy_1step_x0_unet.safetensors",
        "toy_32step_lora.safetensors",
        "toy_32step_unet.safetensors",
        "toy_4step_lora.safetensors",
        "toy_4step_unet.safetensors",
        "toy_8step_lora.safetensors",
        "toy_8step_unet.safetensors",
    ]
    for file, unit in (("8step", "03-8-step-full-d-prime"), ("1step_x0", "07-1-step-full-d-prime")):
        trained = load_file(folder / unit / "student.safetensors")
        found = load_file(published / f"toy_{file}_unet.safetensors")
        assert _same(found, {name: tensor.half() for name, tensor in trained.items()}), "trained as a whole"

    finished = folder.joinpath("chain.jsonl").read_text()
    run(lightning_recipe, [], resume="latest")
    assert folder.joinpath("chain.jsonl").read_text() == finished, "a finished unit is not run again"
    with pytest.raises(ValueError, match="already holds a run; pass --resume latest"):
        run(lightning_recipe, [])


def test_a_run_that_ends_above_one_step_publishes_its_students(
    lightning_recipe: Path, cache: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    tree = yaml.safe_load(lightning_recipe.read_text())
    first, second = tree["stages"][0], tree["stages"][1] | {"name": "2-step", "steps": 2}
    tree["stages"] = [first, second | {"phases": second["phases"][:1]}]
    recipe = tmp_path / "two.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    out = run(recipe, [])
    assert out == cache / "runs" / "distil" / "published"
    lora, unet = out / "toy_2step_lora.safetensors", out / "toy_2step_unet.safetensors"
    trained = UNet2DConditionModel.from_pretrained(teacher_folder / "unet")
    trained.requires_grad_(False)
    merge_lora(trained, read_lora(cache / "runs" / "distil" / "01-2-step-lora-d" / "student.safetensors", trained))
    found = load_file(unet)
    assert _same(found, {name: tensor.half() for name, tensor in trained.state_dict().items()})
    stock = StableDiffusionXLPipeline.from_pretrained(teacher_folder, torch_dtype=torch.float32)
    stock.load_lora_weights(out, weight_name=lora.name)
    stock.fuse_lora()
    stock.unload_lora_weights()
    for name, tensor in stock.unet.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name], rtol=1e-3, atol=1e-3)
    for file in (lora, unet):
        pipe = OneStepPipeline.from_pretrained(file, base=teacher_folder, device="cpu")
        assert (pipe.num_inference_steps, pipe.preset.prediction_type) == ((2,), "epsilon")
