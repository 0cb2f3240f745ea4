"""What departs from SDXL-Lightning's default path: several bases, another start, other teachers, fewer bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sdxl_fast.models.lora import merge_lora, read_lora
from sdxl_fast.testing.toy import toy_pipeline
from sdxl_fast.train import stages
from sdxl_fast.train.config import LightningConfig, cache_folder, load_recipe
from sdxl_fast.train.lightning import AdversarialTask, Teacher
from sdxl_fast.train.teacher import call_unet
from sdxl_fast.train.trainer import run

MakeTask = Callable[..., AdversarialTask]
ALONE: dict[str, Any] = {"adversarial_weight": 0.0, "regression_weight": 1.0}  # no discriminator


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def _run_lora_stages(recipe: Path, name: str, *settings: str) -> Path:
    """The MSE stage and the first LoRA phase."""
    tree = yaml.safe_load(recipe.read_text())
    tree["stages"] = tree["stages"][:2]
    tree["stages"][1]["phases"] = tree["stages"][1]["phases"][:1]
    path = cache_folder() / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    run(path, [f"run={name}", *settings])
    return cache_folder() / "runs" / name


def test_several_bases_share_one_lora(lightning_recipe: Path, cache: Path, tmp_path: Path) -> None:
    other = toy_pipeline(tmp_path / "other", seed=5, prediction_type="epsilon", few_steps=())
    config = load_recipe(
        lightning_recipe, [f"bases=['{other}']", "accumulate=2", "stages=[{name: a, steps: 32, loss: mse, images: 8}]"]
    )
    assert isinstance(config, LightningConfig)
    bench = stages.make_bench(config, cache)
    lineage = stages.Lineage(bench, cache)
    task = stages.make_task(lineage.units[0], bench, lineage)
    mine, its = task.student.unet, task.student.others[0]
    lora = {n: p for n, p in mine.named_parameters() if p.requires_grad}
    assert lora and all(dict(its.named_parameters())[name] is parameter for name, parameter in lora.items())
    assert not torch.equal(mine.conv_in.weight, its.conv_in.weight)
    walked = []
    bench = task.bench
    for _ in bench.shares():
        start = task.start(0, "test")
        assert start.condition["base"].tolist() == [bench.which] * 2
        unet = (task.teacher.unet, *task.teacher.others)[bench.which]
        alone = Teacher(bench, unet, task.teacher.stride, task.teacher.guidance)
        alone.others = (unet,)
        walked.append(task.teacher.walk(*start, 1))
        assert torch.equal(walked[-1], alone.walk(*start, 1))
        task._loss(start)[0].backward()
    assert len(walked) == 2 and bench.which == 0
    assert all(p.grad is not None for p in lora.values())
    assert its.conv_in.weight.grad is None
    folder = _run_lora_stages(lightning_recipe, "bases", f"bases=['{other}']", "accumulate=2")
    d = load_file(folder / "01-8-step-lora-d" / "discriminator.safetensors")
    embedding = d["encoder.base_embedding.weight"]
    assert len(embedding) == 2 and embedding.abs().sum() > 0, "D is told whose sample it sees"


@pytest.mark.large
def test_compiled_networks_train_alike(lightning_recipe: Path, cache: Path) -> None:
    logs = {}
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        folder = _run_lora_stages(lightning_recipe, f"compiled-{compiled}", f"compile={compiled}")
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (compiled == "true")
        files = sorted(folder.glob("*/metrics.jsonl"))
        logs[compiled] = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(logs["true"]) == len(logs["false"]) >= 4
    for ours, plain in zip(logs["true"], logs["false"], strict=True):
        assert ours.keys() == plain.keys()
        for name in ours.keys() - {"images_per_second"}:
            assert ours[name] == pytest.approx(plain[name], rel=1e-3), name


def test_bases_are_refused_where_they_cannot_share(lightning_recipe: Path) -> None:
    with pytest.raises(ValueError, match="trains full UNets"):
        load_recipe(lightning_recipe, ["bases=[other]"])
    with pytest.raises(ValueError, match="set parallel to ddp"):
        load_recipe(lightning_recipe, ["bases=[other]", "parallel=fsdp", "stages=[]"])


def test_a_fine_tune_is_distilled_anew_from_a_published_lora(lightning_recipe: Path, cache: Path) -> None:
    first = _run_lora_stages(lightning_recipe, "first")
    lora = first / "01-8-step-lora-d" / "student.safetensors"
    config = load_recipe(lightning_recipe, [f"initial={lora}"])
    assert isinstance(config, LightningConfig)
    bench = stages.make_bench(config, cache)
    lineage = stages.Lineage(bench, cache)
    student = lineage.student_of(lineage.units[0])
    merged = lineage.plain_base()
    merge_lora(merged, read_lora(lora, merged))
    x_t, t, condition = bench.inputs((999, 499), 0, "test")
    with torch.no_grad():
        expected = call_unet(merged, x_t, t, condition)
        torch.testing.assert_close(call_unet(student, x_t, t, condition), expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(expected, call_unet(bench.base, x_t, t, condition), rtol=1e-3, atol=1e-4)
    wrong = load_recipe(lightning_recipe, [f"initial={lora}", "lora_rank=4"])
    lineage = stages.Lineage(replace(bench, config=wrong), cache)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="set lora_rank to it instead of 4"):
        lineage.student_of(lineage.units[0])


def test_timesteps_are_drawn_by_their_weights(lightning_recipe: Path, cache: Path) -> None:
    grid, weights = "stages.0.timesteps=[249,499,749,999]", "stages.0.timestep_weights=[1,0,0,3]"
    config = load_recipe(lightning_recipe, ["batch=400", "stages.1.phases.0.d_warmup=0", grid, weights])
    assert isinstance(config, LightningConfig)
    bench = stages.make_bench(config, cache)
    lineage = stages.Lineage(bench, cache)
    drawn = stages.make_task(lineage.units[0], bench, lineage).start(0, "test").t
    assert set(drawn.tolist()) == {249, 999}
    assert 260 <= int((drawn == 999).sum()) <= 340  # 300 expected, standard deviation 8.7


def test_the_average_teaches_while_the_last_weights_go_on(lightning_recipe: Path, cache: Path) -> None:
    settings = ("teach_average=true", "hand_on_average=false", "ema_half_life=1000")
    folder = _run_lora_stages(lightning_recipe, "average", *settings) / "00-32-step-mse"
    last, average = (load_file(folder / f"{name}.safetensors") for name in ("student", "average"))
    assert last.keys() == average.keys() and not _same(last, average)
    config = load_recipe(lightning_recipe, [*settings, "run=average"])
    assert isinstance(config, LightningConfig)
    bench = stages.make_bench(config, cache)
    lineage = stages.Lineage(bench, folder.parent)
    wanted = lineage.plain_base()
    merge_lora(wanted, read_lora(folder / "average.safetensors", wanted))
    assert _same(_weights(wanted), _weights(lineage.teacher_of(lineage.units[1])[0]))
    wanted = lineage.plain_base()
    merge_lora(wanted, read_lora(folder / "student.safetensors", wanted))
    assert _same(_weights(wanted), _weights(lineage.merged(lineage.units[0])))


def test_frozen_weights_in_bfloat16_are_there_once(lightning_recipe: Path, cache: Path) -> None:
    lean = [f"{name}.kind=adamw_lean" for name in ("optimizer", "adversarial_optimizer", "discriminator_optimizer")]
    settings = ("precision=bf16", "frozen=bf16", "trained=bf16", *lean)
    config = load_recipe(lightning_recipe, list(settings))
    assert isinstance(config, LightningConfig)
    bench = stages.make_bench(config, cache)
    lineage = stages.Lineage(bench, cache)
    task = stages.make_task(lineage.units[0], bench, lineage)
    assert {p.dtype for p in task.student.unet.parameters()} == {torch.bfloat16}
    taught = {p.data_ptr() for p in task.teacher.unet.parameters()}
    assert all(p.data_ptr() in taught for p in task.student.unet.parameters() if not p.requires_grad)
    assert {p.dtype for p in bench.base.parameters()} == {torch.float32}, "training starts from all bits"
    folder = _run_lora_stages(lightning_recipe, "bits", *settings)
    assert len((folder / "chain.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("backbone", ["conv", "pixels"])
def test_a_discriminator_with_another_backbone(
    phase_task: MakeTask, tmp_path: Path, backbone: str, condition: bool
) -> None:
    if backbone == "pixels":
        pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    task = phase_task(f"discriminator.backbone={backbone}", condition=condition)
    d, vae = task.discriminator, task.bench.vae
    weights = _weights(d)
    assert not any(key.startswith("unet.") or "decoder" in key for key in weights), "frozen networks are not D's"
    save_file(d.state_dict(), tmp_path / "d.safetensors")  # as the phase ends; tensors under two names are refused
    before = {"d": weights, "student": _weights(task.student.unet), "vae": _weights(vae)}
    logged = task.step(0)
    assert {"d_loss", "g_loss"} <= logged.keys()
    assert not _same(before["d"], _weights(d)) and not _same(before["student"], _weights(task.student.unet))
    assert _same(before["vae"], _weights(vae)) and all(p.grad is None for p in vae.parameters())
    start = task.start(0, "probe")
    with torch.no_grad():
        seen = d.features(start.x_t, start.t, start.condition)
        other = {**start.condition, "pooled": start.condition["pooled"].flip(0)}
        assert not torch.allclose(seen, d.features(start.x_t, start.t, other)), "it is told the text"
        assert not torch.allclose(seen, d.features(start.x_t, start.t - 20, start.condition)), "and the timestep"


def test_another_backbone_is_refused_where_it_cannot_be(lightning_recipe: Path) -> None:
    with pytest.raises(ValueError, match="conv takes one base and parallel ddp"):
        load_recipe(lightning_recipe, ["discriminator.backbone=conv", "parallel=fsdp"])
    with pytest.raises(ValueError, match=r"backbone.*'unet', 'pixels' or 'conv'"):
        load_recipe(lightning_recipe, ["discriminator.backbone=dino"])


def test_regression_alone_leaves_the_discriminator_out(phase_task: MakeTask) -> None:
    task = phase_task(adversarial_weight=0.0, regression_weight=2.0)
    d, student = _weights(task.discriminator), _weights(task.student.unet)
    start = task.start(0, "student")
    with torch.no_grad():
        wanted = task.teacher.walk(*start, task.substeps)
        loss = (task.student.move(*start).x - wanted).square().mean()
    logged = task.step(0)
    assert logged.keys() == {"regression", "grad_norm"}
    assert logged["regression"] == pytest.approx(loss.item(), rel=1e-4)
    assert _same(d, _weights(task.discriminator)) and not _same(student, _weights(task.student.unet))
    with pytest.raises(ValueError, match="both 0"):
        phase_task(adversarial_weight=0.0)


def test_only_clean_latents_are_noised_anew(phase_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent at t - ns > 0 noised to t* would hold the noise of both; D is told one level."""
    timesteps = "stages.0.timesteps=[999,30]"  # of 32 steps, the second is the last
    task = phase_task(timesteps, "batch=16", renoise=[500])
    bare = phase_task(timesteps, "batch=16")
    start = task.start(0, "discriminator")
    clean = start.t == 30
    assert clean.any() and not clean.all() and not task.student.ends_clean
    renoise = task._renoise(0, "discriminator")
    assert renoise is not None
    moved, plain = task.student.move(*start, renoise), bare.student.move(*start)
    assert moved.level.tolist() == [500 if end else 968 for end in clean.tolist()]
    torch.testing.assert_close(moved.shown[~clean], plain.x[~clean])
    torch.testing.assert_close(moved.shown[clean], task.bench.renoised(plain.x, renoise)[clean])
    shown = []
    judge = task._judge
    monkeypatch.setattr(task, "_judge", lambda pairs, *more: shown.append(pairs) or judge(pairs, *more))
    task.discriminator_step(0)
    ((real, _), _), walked = shown[0], task.teacher.walk(*start, task.substeps)
    torch.testing.assert_close(real[~clean], walked[~clean])
    torch.testing.assert_close(real[clean], task.bench.renoised(walked, renoise)[clean])


def test_a_phase_regresses_by_the_recipes_distance(phase_task: MakeTask) -> None:
    task = phase_task("distance=l1", regression_weight=1.0)
    start = task.start(0, "student")
    with torch.no_grad():
        wanted = (task.student.move(*start).x - task.teacher.walk(*start, task.substeps)).abs().mean()
        assert task._student_loss(0)[1]["regression"] == pytest.approx(wanted.item(), rel=1e-4)


def test_a_sheet_shows_the_weights_that_are_handed_on(phase_task: MakeTask, tmp_path: Path) -> None:
    drawn = {}
    for handed_on in ("false", "true"):
        task = phase_task(f"hand_on_average={handed_on}")
        task.preview(before := tmp_path / "before.png")
        with torch.no_grad():
            for parameter in task.student.unet.parameters():
                parameter.mul_(1.5)  # an average still has the old ones
        task.preview(after := tmp_path / "after.png")
        drawn[handed_on] = after.read_bytes() == before.read_bytes()
    assert drawn == {"false": False, "true": True}


@pytest.mark.parametrize(
    ("setting", "trains", "kept"),
    [
        ("hand_on_average=false", "lora", False),
        ("hand_on_average=true", "full", True),
        ("teach_average=true", "lora", True),
        ("teach_average=true", "full", False),
    ],
)
def test_an_average_is_kept_where_something_reads_it(
    phase_task: MakeTask, setting: str, trains: str, kept: bool
) -> None:
    task = phase_task(setting, trains=trains)
    assert ("average" in task.parts) is (task.average is not None) is kept
    task.step(0)


def test_a_text_that_comes_twice_is_not_another(phase_task: MakeTask, lightning_recipe: Path) -> None:
    with pytest.raises(ValueError, match="misaligned_text takes another picture's text; set batch to at least 2"):
        load_recipe(lightning_recipe, ["batch=1", "discriminator.misaligned_text=1"])
    task, plain = (phase_task(f"discriminator.misaligned_text={w}") for w in (1, 0))
    bench, use = task.bench, "discriminator"

    def differ(images: int) -> torch.Tensor:
        texts = (bench.batch(images, use, text_of_next=after)[1]["prompt_embeds"] for after in (False, True))
        return torch.ne(*texts).flatten(1).any(1)

    images = next(images for images in range(0, 400, 4) if not differ(images).all())
    another = differ(images)
    loss = task._discriminator_loss(images)[0] - plain._discriminator_loss(images)[0]
    start, (_, others) = task.start(images, use), bench.batch(images, use, text_of_next=True)
    with torch.no_grad():
        real, level = task.teacher.walk(*start, task.substeps), task.student.move(*start).level
        ((_, found),) = task._judge([(real, "fake")], level, start, others)
    assert loss.item() == pytest.approx(found[another].sum().item() / 4, rel=1e-3)


def test_lora_targets_that_name_nothing_are_refused(phase_task: MakeTask) -> None:
    with pytest.raises(ValueError, match="lora_targets names nonsense, which the UNet has no layer of"):
        phase_task("lora_targets=[to_q,nonsense]", trains="lora")


def test_repeated_inputs_keep_the_teachers_targets(phase_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    task, fresh = (phase_task(**ALONE, repeat=repeat) for repeat in (8, 0))
    assert [task.step(images) for images in (0, 4)] == [fresh.step(images) for images in (0, 4)]
    starts = [task.start(images, "student").x_t for images in (0, 4)]
    monkeypatch.setattr(Teacher, "walk", None)  # whoever calls it now fails
    task.step(8)
    assert torch.equal(task.seen[0]["x_t"], starts[0]) and not torch.equal(*starts)
    task.step(12)
    assert torch.equal(task.seen[0]["x_t"], starts[1]), "images 12 to 16 are images 4 to 8 again"
    with pytest.raises(ValueError, match="repeat is for phases of regression alone"):
        phase_task(repeat=8)
    with pytest.raises(ValueError, match="repeat 6 of p must be a multiple of batch, 4"):
        phase_task(**ALONE, repeat=6)


def test_a_regression_phase_has_the_optimizer_of_regressions(phase_task: MakeTask) -> None:
    settings = ("optimizer.betas=[0.8, 0.9]", "adversarial_optimizer.betas=[0.0, 0.99]")
    for phase, betas in ((ALONE, (0.8, 0.9)), ({}, (0.0, 0.99))):
        task = phase_task(*settings, **phase)
        assert task.update.optimizer.param_groups[0]["betas"] == betas


def test_the_last_timestep_can_keep_what_the_schedule_leaves_of_the_picture(phase_task: MakeTask) -> None:
    pure, impure = (phase_task(f"pure_noise={value}") for value in ("true", "false"))
    for task in (pure, impure):
        task.student.timesteps = (999,)
    a, b = pure.start(0, "probe"), impure.start(0, "probe")
    latents, _ = pure.bench.batch(0, "probe")
    alpha_bar = pure.bench.alphas_cumprod[999]
    torch.testing.assert_close(b.x_t, alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * a.x_t)
    assert alpha_bar.sqrt() > 0.05


def test_seeds_of_training_leave_the_pictures_alone(phase_task: MakeTask) -> None:
    first, second = (phase_task("data_seed=5", f"seed={seed}") for seed in (1, 2))
    third = phase_task("seed=2")
    drawn = [task.bench.source.latents.latents for task in (first, second, third)]  # type: ignore[attr-defined]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(first.start(0, "probe").x_t, second.start(0, "probe").x_t)
