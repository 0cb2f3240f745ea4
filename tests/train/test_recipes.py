"""The recipes that come with the package: the papers' values, and what a dry run says of SDXL's true size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_fast.models.discriminators import AddDiscriminator
from sdxl_fast.models.feature_nets import DINOV2, feature_shape
from sdxl_fast.models.lora import LORA_TARGETS
from sdxl_fast.models.networks import skeleton
from sdxl_fast.train import checkpoint
from sdxl_fast.train.config import RECIPES, AddConfig, LcmConfig, LightningConfig, load_recipe
from sdxl_fast.train.plan import GIB, Part, parts_of, plan, teacher_networks
from sdxl_fast.train.rehearsal import LiveBytes

LORA, UNET, ENCODER, VAE = 196_751_360, 2_567_463_684, 1_243_367_040, 83_653_863
HEAD = (2560 + 4 * 1280) * 1280 * 16 + 5 * 3 * 1280 + 1281
HEAD_RELAXED = HEAD - 1280 * 1280 * 16


def _lightning(name: str) -> LightningConfig:
    config = load_recipe(name)
    assert isinstance(config, LightningConfig)
    return config


@pytest.mark.parametrize("name", ["sdxl_lightning", "sdxl_add"])
def test_the_command_of_many_gpus_is_torchruns(name: str) -> None:
    """It names what processes of several machines meet at, and how long they have to save."""
    from torch.distributed.run import get_args_parser

    header = (RECIPES / f"{name}.yaml").read_text().replace("\\\n#", "").split("torchrun ")[1].splitlines()[0]
    words = header.replace("SECONDS", "300").split()
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        place = words.index("--shutdown-timeout")  # unknown to it
        del words[place : place + 2]
    found = get_args_parser().parse_args(words)
    assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint) == ("8", "8", "HOST:29500")
    assert getattr(found, "shutdown_timeout", 300) == 300
    assert found.no_python and [found.training_script, *found.training_script_args][:3] == ["sdxl-fast", "train", name]


def _parts(name: str, folder: Path) -> dict[str, Part]:
    config = load_recipe(name)
    assert isinstance(config, LightningConfig | AddConfig | LcmConfig)
    return {part.name: part for part in parts_of(config, folder)}


def _total(part: Part) -> float:
    return (sum(t.bytes for t in part.trained) + part.frozen_bytes + part.activation_bytes) / GIB


@pytest.mark.parametrize("name", ["sdxl_lightning", "sdxl_lightning_80gb"])
def test_lightning_has_the_papers_values(name: str) -> None:
    config = _lightning(name)
    one_gpu = name.endswith("80gb")  # a smaller batch, ten times the rate
    assert config.batch == (64 if one_gpu else 512) and config.guidance_scale == 6.0 and config.distance == "mse"
    assert config.lora_rank == 64 and config.lora_targets == LORA_TARGETS and len(LORA_TARGETS) == 14
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-4 if one_gpu else 1e-5, (0.9, 0.999))
    for optimizer in (config.adversarial_optimizer, config.discriminator_optimizer):
        assert optimizer.betas == (0.0, 0.99) and optimizer.weight_decay == 0
    d = config.discriminator
    assert not d.freeze_backbone and d.r1 == d.approximate_r1 == d.misaligned_text == 0
    assert not config.hand_on_average
    first, *later = config.stages
    assert (first.steps, first.loss) == (32, "mse")
    assert all(stage.loss == "adversarial" for stage in later)
    for stage in later:
        for phase in stage.phases:
            assert phase.lr == phase.d_lr == (1e-5 if one_gpu else 1e-6 if phase.trains == "lora" else 5e-7)
            assert phase.regression_weight == 0
            assert phase.trains == "lora" or not phase.condition or stage.steps == 1
        if stage.steps > 1:
            assert [(p.condition, p.trains) for p in stage.phases][:2] == [(True, "lora"), (False, "lora")]
        wanted = (249, 499, 749, 999) if stage.steps < 4 else None
        assert stage.timesteps == wanted
    skipped = {(stage.steps, p.teacher) for stage in later for p in stage.phases if not p.condition}
    assert (2, "8-step") in skipped and (8, None) in skipped and (4, None) in skipped


def test_one_gpu_can_move_a_lora_as_far() -> None:
    """Adam moves a weight by about its rate in an update, so that rates times updates bound what a phase can learn."""

    def reach(config: LightningConfig) -> dict[str, float]:
        found = {"mse": config.optimizer.lr * config.stages[0].images / config.batch}
        for stage in config.stages:
            for phase in (p for p in stage.phases if p.trains == "lora"):
                found[f"{stage.name} {phase.name}"] = config.optimizers_of(phase)[0].lr * phase.images / config.batch
        return found

    published, one_gpu = reach(_lightning("sdxl_lightning")), reach(_lightning("sdxl_lightning_80gb"))
    assert published.keys() == one_gpu.keys()
    assert all(one_gpu[name] > 5 * published[name] for name in published)


def test_lightnings_last_stage_has_the_papers_values() -> None:
    config = _lightning("sdxl_lightning")
    assert [stage.steps for stage in config.stages] == [32, 8, 4, 2, 1]
    last = config.stages[-1]
    assert last.convert_images and all(phase.trains == "full" for phase in last.phases)
    assert [phase.condition for phase in last.phases] == [True, False, False]
    assert all(phase.renoise == (10, 250, 500, 750) for phase in last.phases)
    assert [phase.renoise_weights for phase in last.phases] == [(1, 1, 1, 1), (1, 1, 1, 1), (5, 1, 1, 1)]
    assert [phase.teacher for phase in last.phases] == [None, "4-step", "4-step"]
    assert config.parallel == "fsdp"
    assert [stage.steps for stage in _lightning("sdxl_lightning_80gb").stages] == [32, 8, 4, 2]


@pytest.mark.parametrize("name", ["sdxl_add", "sdxl_add_80gb"])
def test_add_has_the_papers_values(name: str) -> None:
    config = load_recipe(name)
    assert isinstance(config, AddConfig)
    assert len(config.timesteps) == 4 and max(config.timesteps) == 999 and config.resolution == 512
    assert (config.distillation, config.distillation_weight, config.r1) == ("nfsd", 2.5, 1e-5)
    assert (config.teacher_steps, config.space) == (1, "pixel")
    assert (config.feature_network, config.image_encoder) == ("facebook/dinov2-small", "facebook/dinov2-large")
    assert config.feature_size is not None and config.feature_size >= config.resolution, "D sees all detail there is"
    assert config.trains == ("full" if name == "sdxl_add" else "lora")


def test_lcm_has_the_authors_values() -> None:
    config = load_recipe("sdxl_lcm")
    assert isinstance(config, LcmConfig)
    assert (config.levels, config.guidance_range, config.distance) == (50, (4.0, 16.0), "huber")
    assert (config.lora_rank, config.optimizer.lr, config.optimizer.weight_decay) == (64, 1e-4, 0.0)
    assert (config.batch, config.images) == (12, 12_000)
    assert LcmConfig.model_fields["guidance_range"].default == config.guidance_range


@pytest.mark.parametrize("path", sorted(RECIPES.glob("sdxl_*.yaml")), ids=lambda path: path.stem)
def test_open_values_are_marked(path: Path) -> None:
    text = path.read_text()
    assert text.count("[open]") >= 5 and "Values without a mark are" in text
    for line in text.splitlines():
        for mark in ("[open]", "[one GPU]"):
            if mark in line and "marks" not in line:
                assert "#" in line.partition(mark)[0], f"the mark is not in a comment: {line}"


@pytest.mark.slow
def test_a_dry_run_of_sdxl_lightning(tmp_path: Path) -> None:
    parts = _parts("sdxl_lightning", tmp_path)
    assert len(parts) == 14
    counts = {name.split("-", 1)[1]: [t.parameters for t in part.trained] for name, part in parts.items()}
    assert counts["32-step-mse"] == [LORA]
    assert counts["8-step-lora-d"] == [LORA, ENCODER + HEAD]
    assert counts["8-step-lora-d-prime"] == [LORA, ENCODER + HEAD_RELAXED]
    assert counts["1-step-convert"] == [UNET]
    assert counts["1-step-full-d"] == [UNET, ENCODER + HEAD]
    full = parts["11-1-step-full-d"]
    assert _total(full) > 80, "one 80 GB GPU is not enough without shards"
    assert full.left == full.images == 1_024_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl_lightning_80gb", "sdxl_add_80gb", "sdxl_lcm"])
def test_one_gpu_of_80_gb_is_enough(name: str, tmp_path: Path) -> None:
    parts = _parts(name, tmp_path)
    for part in parts.values():
        assert part.trained[0].parameters == LORA
        assert 5 < _total(part) < 70, f"{part.name}: {_total(part):.1f} GiB leave nothing of 74.5 for the allocator"


def test_the_text_of_a_dry_run(tmp_path: Path) -> None:
    folder = tmp_path / "sdxl-lcm"
    checkpoint.save(folder, {}, {"images": 2400})
    text = plan(load_recipe("sdxl_lcm"), folder)
    assert "trains student (lora) 196,751,360 at 0.0001" in text
    assert "9,600 of 12,000 images, 800 of 1,000 updates to go" in text
    assert "memory" in text and "GiB" in text


def test_a_dry_run_counts_adds_heads_and_what_they_look_through(tmp_path: Path) -> None:
    heads = AddDiscriminator((384,) * 5, 1280, 1024)
    config = load_recipe("sdxl_add", ["gradient_checkpointing=false", "shards=null", "data.resolution=64"])
    assert isinstance(config, AddConfig)
    (part,) = parts_of(config, tmp_path, 64)
    assert [t.parameters for t in part.trained] == [UNET, sum(p.numel() for p in heads.parameters())]
    assert "facebook/dinov2-small 22,056,576, facebook/dinov2-large 304,368,640" in part.what
    assert part.frozen_bytes == 2 * UNET // 64 + 4 * (VAE + 22_056_576 + 304_368_640), "the teacher alone is spread"
    student, its_heads = part.trained
    of_each = 4 + 4 + 8 + 4 + 2
    assert student.bytes == UNET * of_each // 64, "weights, gradients, moments, average, and autocast's copies"
    assert its_heads.bytes == its_heads.parameters * (of_each - 4), "whole in each process, and not averaged"


def test_a_dry_run_of_several_processes_divides_what_is_spread(lightning_recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(lightning_recipe, ["parallel=fsdp"])
    assert isinstance(config, LightningConfig)
    one, four = ({part.name: part for part in parts_of(config, tmp_path, count)} for count in (1, 4))
    networks = teacher_networks(config)
    unet, vae = (4 * sum(p.numel() for p in skeleton(kind, networks[kind]).parameters()) for kind in ("unet", "vae"))
    for name, part in four.items():
        assert [t.bytes for t in part.trained] == [t.bytes // 4 for t in one[name].trained], "D, too"
        copies = 1 if "full" in name or "convert" in name else 2
        assert part.frozen_bytes == vae + unet + copies * unet // 4, (
            "teacher, a LoRA's own, and the base they come from"
        )
    assert one["00-32-step-mse"].frozen_bytes == vae + unet and one["01-8-step-lora-d"].frozen_bytes == vae + 2 * unet


def test_a_dry_run_counts_what_features_of_pictures_hold(teacher_folder: Path, tmp_path: Path) -> None:
    """More of them at a greater size; of a network that nobody knows, none."""

    def held(name: str, *settings: str) -> int:
        chosen = [f"teacher={teacher_folder}", "data.resolution=64", f"feature_network={name}", *settings]
        config = load_recipe("emoji_add", chosen)
        assert isinstance(config, AddConfig)
        return parts_of(config, tmp_path)[0].activation_bytes

    unknown, small = held("nobody/nothing"), held("facebook/dinov2-small", "feature_size=56")
    assert 0 < unknown < small < held("facebook/dinov2-small", "feature_size=112")
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    assert held("efficientnet-lite0") > unknown


def test_a_dry_run_for_more_processes_than_are_running(lightning_recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(lightning_recipe)
    one, four = (plan(config, tmp_path, processes) for processes in (None, 4))
    assert "# 1 process(es), ddp, 4 x 1 of 4 images each" in one and "# 4 process(es), ddp, 1 x 1 of 4" in four
    assert isinstance(config, LightningConfig)
    held = [parts_of(config, tmp_path, processes)[0].activation_bytes for processes in (1, 4)]
    assert held[0] > 2 * held[1] > 0
    assert "batch is 4; 3 processes that accumulate 1 micro-batches each need a multiple of 3" in plan(
        config, tmp_path, 3
    )


def test_the_table_of_feature_networks_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import Dinov2Config

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    config.save_pretrained(tmp_path)
    shapes = [feature_shape(name) for name in (str(tmp_path), *DINOV2, "nobody/nothing")]
    counts = [22_056_576, 22_056_576, 86_580_480, 304_368_640, 1_136_480_768, None]
    assert [shape and shape.parameters for shape in shapes] == counts


@pytest.mark.parametrize("name", ["emoji_lightning", "emoji_add", "emoji_lcm"])
def test_embedded_recipes_plan_from_their_teachers_recipe(name: str, cache: Path) -> None:
    text = plan(load_recipe(name), cache / "none")
    assert "trains student" in text and "images to go" in text


def test_an_unknown_teacher_is_said_to_be_unknown(tmp_path: Path, cache: Path) -> None:
    assert "not there yet" in plan(load_recipe("emoji_lcm", ["teacher=nobody"]), tmp_path)


def test_live_bytes_are_those_alive_at_once() -> None:
    weight = torch.empty(1000, device="meta")
    with LiveBytes([weight]) as counted:
        a = weight + 1  # 4,000 bytes
        b = a.view(10, 100) * 2  # 8,000 with a
        del a
        c = b + 1  # 8,000 again
        del b, c
        assert counted.live == 0
        _ = weight.view(10, 100)
    assert counted.peak == 8000


def test_checkpointing_is_seen_in_the_estimate(teacher_folder: Path, lightning_recipe: Path, tmp_path: Path) -> None:
    def activations(*settings: str) -> Any:
        config = load_recipe(lightning_recipe, ["precision=bf16", *settings])
        assert isinstance(config, LightningConfig)
        return [part.activation_bytes for part in parts_of(config, tmp_path)]

    plain, recomputed = activations(), activations("gradient_checkpointing=true")
    assert all(a > b > 0 for a, b in zip(plain, recomputed, strict=True))
    assert activations("batch=8", "stages.1.phases.0.d_warmup=0")[0] > 1.9 * plain[0]
