"""What departs from SDXL-Lightning's default path: several bases, another start, other teachers, fewer bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sdxl_fast.models.lora import merge_lora, read_lora
from sdxl_fast.testing.toy import toy_pipeline
from sdxl_fast.train import stages
from sdxl_fast.train.config import LightningConfig, cache_folder, load_recipe
from sdxl_fast.train.lightning import Teacher
from sdxl_fast.train.teacher import call_unet
from sdxl_fast.train.trainer import run


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
        task._loss(start).backward()
    assert len(walked) == 2 and bench.which == 0
    assert all(p.grad is not None for p in lora.values())
    assert its.conv_in.weight.grad is None
    folder = _run_lora_stages(lightning_recipe, "bases", f"bases=['{other}']", "accumulate=2")
    d = load_file(folder / "01-8-step-lora-d" / "discriminator.safetensors")
    embedding = d["encoder.base_embedding.weight"]
    assert len(embedding) == 2 and embedding.abs().sum() > 0, "D is told whose sample it sees"


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
