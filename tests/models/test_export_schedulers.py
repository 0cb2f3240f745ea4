"""How a model is sampled survives every format, also where nothing says in how many steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file

from sdxl_fast import OneStepPipeline
from sdxl_fast.errors import ModelError
from sdxl_fast.models.config import scheduler_arguments
from sdxl_fast.models.export import export_folder, export_single_file
from sdxl_fast.models.facts import SCHEDULER_ARGUMENTS
from sdxl_fast.models.safetensors_check import check_safetensors
from sdxl_fast.models.source import CONFIG_KEY, open_model
from sdxl_fast.testing.toy import toy_pipeline

SCHEDULE = scheduler_arguments("epsilon")
SCHEDULERS: dict[str, Any] = {
    "ancestral": EulerAncestralDiscreteScheduler(**SCHEDULE),
    "karras": DPMSolverMultistepScheduler(
        **SCHEDULE | {"timestep_spacing": "leading"}, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"
    ),
    "heun": HeunDiscreteScheduler(**SCHEDULE, use_exponential_sigmas=True),
    "plain": EulerDiscreteScheduler(**SCHEDULE | {"timestep_spacing": "leading", "steps_offset": 1}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of which nothing says in how many steps it draws; to be given a scheduler."""
    return toy_pipeline(tmp_path_factory.mktemp("m") / "plain", few_steps=(), prediction_type="epsilon")


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))


def _silent(path: Path) -> Path:
    """The same without configurations, as the file of a true SDXL has none."""
    metadata = check_safetensors(path)["__metadata__"]
    del metadata[CONFIG_KEY]
    tensors = load_file(path)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_goes_through_a_single_file(plain: Path, tmp_path: Path, kind: str) -> None:
    SCHEDULERS[kind].save_pretrained(plain / "scheduler")
    wanted = _config(plain)
    path = export_single_file(open_model(plain), tmp_path / "m.safetensors", dtype=None)
    assert _config(export_folder(open_model(path), tmp_path / "back")) == wanted
    SCHEDULERS["heun"].save_pretrained(plain / "scheduler")
    found = open_model(_silent(path), base=plain)  # whose own scheduler is another now
    assert _decisive(found.configs["scheduler"]) == _decisive(wanted)
    assert found.facts.num_steps is None


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """What is set of the arguments that a picture shows."""
    return {name: config[name] for name in ("_class_name", *SCHEDULER_ARGUMENTS) if config.get(name)}


def test_plain_sdxl_stays_refused(plain: Path, tmp_path: Path) -> None:
    SCHEDULERS["plain"].save_pretrained(plain / "scheduler")
    path = export_single_file(open_model(plain), tmp_path / "m.safetensors", dtype=None)
    for model in (plain, path, export_folder(open_model(path), tmp_path / "back")):
        with pytest.raises(ModelError, match="timestep_spacing='leading'"):
            OneStepPipeline.from_pretrained(model, device="cpu")


def test_a_prediction_type_alone_changes_nothing_else(plain: Path, tmp_path: Path) -> None:
    SCHEDULERS["karras"].save_pretrained(plain / "scheduler")
    path = export_single_file(open_model(plain), tmp_path / "m.safetensors", dtype=None)
    tensors = load_file(path)
    save_file(tensors, path, metadata={"modelspec.prediction_type": "v"})
    unet = tmp_path / "u.safetensors"
    save_file(load_file(plain / "unet" / "diffusion_pytorch_model.safetensors"), unet, metadata={
        "modelspec.prediction_type": "v"
    })  # fmt: skip
    for file in (path, unet):
        found = open_model(file, base=plain)
        assert found.configs["scheduler"] == _config(plain) | {"prediction_type": "v_prediction"}
        assert (found.facts.num_steps, found.facts.prediction_type) == (None, "v_prediction")


@pytest.mark.parametrize("markers", [{"v_pred"}, {"v_pred", "ztsnr"}])
def test_v_prediction_is_marked_as_comfyui_looks_for_it(plain: Path, tmp_path: Path, markers: set[str]) -> None:
    rescaled = "ztsnr" in markers
    arguments = SCHEDULE | {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
    EulerDiscreteScheduler(**arguments, rescale_betas_zero_snr=rescaled).save_pretrained(plain / "scheduler")
    wanted = _config(plain)
    path = export_single_file(open_model(plain), tmp_path / "m.safetensors", dtype=None)
    tensors = load_file(path)
    assert {name for name in tensors if "." not in name} == markers
    assert all(tensors[name].numel() == 0 for name in markers)
    assert _config(export_folder(open_model(path), tmp_path / "back")) == wanted
    stock = StableDiffusionXLPipeline.from_single_file(path, config=str(plain), text_encoder_2=None)
    assert torch.equal(stock.unet.conv_in.weight, open_model(plain).tensors["unet"]["conv_in.weight"].read())
    # a file of others says nothing else
    save_file(tensors, path)
    SCHEDULERS["plain"].save_pretrained(plain / "scheduler")
    found = open_model(path, base=plain)
    assert found.facts.prediction_type == "v_prediction"
    assert found.configs["scheduler"] == wanted | {"steps_offset": 1}
    assert {name for name in load_file(export_single_file(found, path, dtype=None)) if "." not in name} == markers


def test_other_predictions_have_no_marks(plain: Path, toy_folder: Path, tmp_path: Path) -> None:
    EulerDiscreteScheduler(**SCHEDULE, rescale_betas_zero_snr=True).save_pretrained(plain / "scheduler")
    for folder in (plain, toy_folder):
        path = export_single_file(open_model(folder), tmp_path / "m.safetensors")
        assert all("." in name for name in load_file(path))
