"""Many processes follow one: the same losses to 1e-8 in float64, by DDP and FSDP2, and any of them resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sdxl_fast.train import distributed
from sdxl_fast.train.trainer import run

SEVERAL = """import sys, torch
torch.set_num_threads(1)
from sdxl_fast.train import run
for settings in sys.argv[2:]:
    words = settings.split()
    run(sys.argv[1], [word for word in words if word != "resume"], resume="latest" if "resume" in words else None)
"""
ADD_STEPS, ADD_BATCH = 20, 2
PHASE: dict[str, Any] = {"condition": True, "images": 8}


def _metrics(folder: Path) -> Any:
    return {
        str(path.parent.relative_to(folder)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.rglob("metrics.jsonl"))
    }


def _alone(cache: Path, recipe: Path, name: str, *settings: str) -> Any:
    """The metric lines of a run by this very process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_FAST_CACHE", str(cache))
        run(recipe, [f"run={name}", *settings])
    return _metrics(cache / "runs" / name)


def _together(cache: Path, recipe: Path, *settings: str, program: str = SEVERAL) -> None:
    """Runs by two processes, one after the other: one start of the two does all, as it takes longest.

    Each of `settings` are words, overrides of the recipe or "resume".
    """
    script = cache / "run.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(program)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(recipe), *settings],
        env={**os.environ, "SDXL_FAST_CACHE": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    compared = 0
    for unit, lines in one.items():
        for a, b in zip(lines, other[unit], strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"images", "images_per_second"}:
                assert a[name] == pytest.approx(b[name], rel=1e-8, abs=1e-10), (unit, a["images"], name)
                compared += 1
    assert compared > 20


@pytest.fixture(scope="module")
def recipe(lightning_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regression and one adversarial phase against the conditional D, 20 steps each, in float64."""
    tree = yaml.safe_load(lightning_recipe.read_text())
    tree |= {"precision": "fp64", "log_every": 4, "checkpoint_every": 40}
    regression, adversarial = tree["stages"][:2]
    regression["images"] = 80
    adversarial["phases"] = [{**adversarial["phases"][0], "images": 80, "d_warmup": 8}]
    tree["stages"] = [regression, adversarial]
    path = tmp_path_factory.mktemp("recipe") / "lightning64.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _alone(tmp_path_factory.mktemp("alone"), recipe, "alone")


@pytest.mark.slow(minutes=4)
@pytest.mark.xdist_group("distributed-lightning")
def test_two_processes_follow_one(recipe: Path, alone: Any, tmp_path: Path) -> None:
    kinds = ("ddp", "fsdp")
    _together(tmp_path, recipe, *(f"run={kind} parallel={kind}" for kind in kinds))
    for kind in kinds:
        _assert_same(alone, _metrics(tmp_path / "runs" / kind))


@pytest.mark.slow(minutes=4)
@pytest.mark.xdist_group("distributed-lightning")
def test_micro_batches_follow_the_batch(recipe: Path, alone: Any, tmp_path: Path) -> None:
    _assert_same(alone, _alone(tmp_path, recipe, "micro", "accumulate=2", "gradient_checkpointing=true"))


@pytest.fixture(scope="module")
def add_recipe(pictures: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ADD, 20 steps in float64, the first two of the heads alone."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    images = ADD_STEPS * ADD_BATCH
    tree = {
        **{"kind": "add", "run": "add", "teacher": str(teacher_folder), "batch": ADD_BATCH, "images": images},
        "data": {"folder": str(pictures), "resolution": 32, "art_size": 64},
        **{"draws": 2, "precision": "fp64", "guidance_scale": 2.0, "lora_rank": 2, "d_warmup": 2 * ADD_BATCH},
        **{"optimizer": {"lr": 1e-3}, "discriminator_optimizer": {"lr": 1e-3}},
        **{"checkpoint_every": images, "log_every": ADD_BATCH},
    }
    path = tmp_path_factory.mktemp("recipe") / "add64.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def add_runs(add_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ADD's runs by two processes: of the LoRA by DDP, of all by FSDP2, in one go and in two halves."""
    cache, half = tmp_path_factory.mktemp("add"), ADD_STEPS * ADD_BATCH // 2
    spread = f"parallel=fsdp trains=full checkpoint_every={half}"
    halves = f"run=halves {spread}"
    lora = "run=lora parallel=ddp trains=lora"
    _together(cache, add_recipe, lora, f"run=full {spread}", f"{halves} images={half}", f"{halves} resume")
    return cache / "runs"


@pytest.mark.slow(minutes=3)
@pytest.mark.xdist_group("distributed-add")
def test_two_processes_of_add_follow_one(add_recipe: Path, add_runs: Path, tmp_path: Path) -> None:
    for trains in ("full", "lora"):
        one = _alone(tmp_path, add_recipe, trains, f"trains={trains}")
        assert len(one["."]) == ADD_STEPS
        _assert_same(one, _metrics(add_runs / trains))


@pytest.mark.slow(minutes=3)
@pytest.mark.xdist_group("distributed-add")
def test_spread_networks_resume_bitwise(add_runs: Path) -> None:
    """What FSDP2 has spread over two processes is saved and loaded as shards (DCP)."""
    whole, again = add_runs / "full", add_runs / "halves"
    lines = [[{**line, "images_per_second": 0} for line in _metrics(folder)["."]] for folder in (whole, again)]
    assert len(lines[0]) == ADD_STEPS and lines[0] == lines[1]
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    shards = [file for file in files if f"checkpoint-{ADD_STEPS * ADD_BATCH:09d}/shards" in file.as_posix()]
    assert len(shards) > 1, "each process writes its own"
    for file in [*shards, *(file for file in files if file.parts[0] == "export")]:
        one, other = load_file(whole / file), load_file(again / file)  # DCP writes headers in any order
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items()), file


@pytest.mark.slow(minutes=3)
@pytest.mark.xdist_group("distributed-lightning")
def test_spread_networks_train_alike_in_bfloat16(lightning_recipe: Path, tmp_path: Path) -> None:
    """Weights are sent in the precision in which they are multiplied."""
    tree = yaml.safe_load(lightning_recipe.read_text())
    phases = [{**PHASE, "name": kind, "trains": kind, "teacher": "base"} for kind in ("lora", "full")]
    tree["stages"] = [{"name": "8-step", "steps": 8, "loss": "adversarial", "phases": phases}]
    tree |= {"precision": "bf16", "log_every": 4}
    recipe = tmp_path / "bf16.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    _together(tmp_path, recipe, "run=spread parallel=fsdp")
    one, other = _alone(tmp_path / "alone", recipe, "alone"), _metrics(tmp_path / "runs" / "spread")
    for unit, lines in one.items():
        for a, b in zip(lines, other[unit], strict=True):
            assert a["d_loss"] == pytest.approx(b["d_loss"], rel=0.02), unit
            assert a["g_loss"] == pytest.approx(b["g_loss"], rel=0.05), unit


TOLD = f"""import os, signal
from sdxl_fast.train import lightning
loss, met = lightning.AdversarialTask._discriminator_loss, []


def told(self, images):
    if images == 8 and os.environ["RANK"] == "1" and not met and self.bench.share.start == 6:
        met.append(images)
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(self, images)


lightning.AdversarialTask._discriminator_loss = told
{SEVERAL}"""


@pytest.mark.slow(minutes=2)
@pytest.mark.xdist_group("distributed-lightning")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_leave_a_step_together(lightning_recipe: Path, tmp_path: Path, kind: str) -> None:
    """One is told to stop in the third of four micro-batches: both save what was whole, and go on from there.

    The checkpoint holds the student's LoRA alone.
    """
    tree = yaml.safe_load(lightning_recipe.read_text())
    phase = {"name": "d", "condition": True, "trains": "lora", "images": 16, "teacher": "base"}
    tree["stages"] = [{"name": "8-step", "steps": 8, "loss": "adversarial", "phases": [phase]}]
    tree |= {"batch": 8, "accumulate": 4, "log_every": 8, "checkpoint_every": 100, "parallel": kind}
    recipe = tmp_path / "told.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    _together(tmp_path, recipe, "run=told", program=TOLD)
    told, whole = (tmp_path / "runs" / name / "00-8-step-d" for name in ("told", "whole"))
    assert [path.name for path in told.glob("checkpoint-*")] == ["checkpoint-000000008"]
    assert not (told.parent / "chain.jsonl").exists()
    (state,) = told.glob("checkpoint-*/state.json")
    assert all(".lora_" in key for key in json.loads(state.read_text())["structure"]["student"])
    _together(tmp_path, recipe, "run=told resume", "run=whole")
    for name in ("student", "discriminator"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (told, whole))
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_shares_are_disjoint_and_must_divide() -> None:
    assert distributed.shares(8, 2) == [slice(0, 4), slice(4, 8)]
    with pytest.raises(
        ValueError, match="batch is 6; 1 processes that accumulate 4 micro-batches each need a multiple"
    ):
        distributed.shares(6, 4)


def test_one_process_needs_no_group() -> None:
    assert (distributed.rank(), distributed.size(), distributed.is_first()) == (0, 1, True)
    assert distributed.average({"loss": 2.0}) == {"loss": 2.0}
    assert distributed.agreed(True) and not distributed.agreed(False)
