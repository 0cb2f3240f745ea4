"""Where a training starts: the base of an exported student, a folder without a VAE, the package's own pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_fast.errors import ModelError
from sdxl_fast.models.loading import EMBEDDED
from sdxl_fast.testing.toy import toy_pipeline
from sdxl_fast.train.base import export_of, open_pipeline, open_vae
from sdxl_fast.train.config import DistillationConfig, load_recipe
from sdxl_fast.train.plan import plan
from sdxl_fast.train.trainer import run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As distillation leaves it: a student that predicts x0, its base, LoRAs; float16 files."""
    return toy_pipeline(tmp_path_factory.mktemp("exported") / "toy", lora_rank=2, dtype=torch.float16)


def test_the_base_beside_a_student_is_meant(exported: Path) -> None:
    pipe = open_pipeline(str(exported))
    base = load_file(exported / "unet_base" / "diffusion_pytorch_model.safetensors")
    student = load_file(exported / "unet" / "diffusion_pytorch_model.safetensors")
    mine = pipe.unet.state_dict()
    assert all(torch.equal(mine[name], value.float()) for name, value in base.items())
    assert not all(torch.equal(mine[name], value.float()) for name, value in student.items())
    assert pipe.scheduler.config.prediction_type == "epsilon"
    networks = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}


def test_a_vae_in_place_of_one_that_is_missing(exported: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    shutil.copytree(exported, without, ignore=shutil.ignore_patterns("vae"))
    shutil.copytree(exported / "vae", tmp_path / "vae")
    for vae in (str(tmp_path / "vae"), str(exported)):  # the network's own folder, or a pipeline's
        pipe = open_pipeline(str(without), vae)
        for name, value in open_vae(str(exported)).state_dict().items():
            assert torch.equal(pipe.vae.state_dict()[name], value)


def test_a_missing_teacher_is_named_with_what_there_is(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"'emoji-teacher' is no finished run in .*`embedded`"):
        open_pipeline("emoji-teacher")


def test_the_embedded_pipeline_teaches(cache: Path, pictures: Path) -> None:
    assert export_of("embedded") == EMBEDDED
    assert "trains student" in plan(load_recipe("emoji_lcm", ["teacher=embedded"]), cache / "none")
    settings = [f"data.folder={pictures}", "teacher=embedded", "draws=2", "batch=2", "images=2", "precision=fp32"]
    out = run("emoji_lcm", settings)
    base = json.loads((EMBEDDED / "unet_base" / "config.json").read_text())
    assert json.loads((out / "unet" / "config.json").read_text())["block_out_channels"] == base["block_out_channels"]
    assert not (EMBEDDED / "latents.safetensors").exists(), "the installed package is only read"


@pytest.mark.parametrize("recipe", ["emoji_lightning", "emoji_add", "emoji_lcm"])
def test_the_embedded_pipeline_is_all_that_its_recipes_need(recipe: str, cache: Path) -> None:
    config = load_recipe(recipe, ["teacher=embedded"])
    assert isinstance(config, DistillationConfig)
    pipe = open_pipeline(config.teacher, config.vae)
    own = load_file(EMBEDDED / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value.half(), own[name]) for name, value in pipe.vae.state_dict().items())


def test_an_own_run_of_that_name_comes_first(cache: Path) -> None:
    folder = cache / "runs" / "embedded" / "export"
    folder.mkdir(parents=True)
    assert export_of("embedded") == folder
