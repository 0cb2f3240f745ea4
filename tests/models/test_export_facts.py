"""What a weight file says of itself, in its name and in its metadata."""

from __future__ import annotations

from typing import Any

import pytest

from sdxl_fast.errors import ModelError
from sdxl_fast.models.facts import SDXL_ARCHITECTURE, Facts, parse_file_name, scheduler_config, scheduler_text


@pytest.mark.parametrize(
    ("facts", "kind", "name"),
    [
        (Facts("sdxl_lightning", 4, "epsilon"), "", "sdxl_lightning_4step.safetensors"),
        (Facts("sdxl_lightning", 8, "epsilon"), "unet", "sdxl_lightning_8step_unet.safetensors"),
        (Facts("sdxl_lightning", 2, "epsilon"), "lora", "sdxl_lightning_2step_lora.safetensors"),
        (Facts("sdxl_lightning", 1, "sample"), "", "sdxl_lightning_1step_x0.safetensors"),
        (Facts("my_1step_model", 1, "sample"), "unet", "my_1step_model_1step_x0_unet.safetensors"),
    ],
)
def test_file_names(facts: Facts, kind: Any, name: str) -> None:
    assert facts.file_name(kind) == name
    back = parse_file_name(name.removesuffix(".safetensors"))
    x0 = facts.prediction_type == "sample"
    assert back == Facts(facts.name, facts.num_steps, "sample" if x0 else None)


def test_published_order_and_no_order() -> None:
    assert parse_file_name("sdxl_lightning_1step_unet_x0") == Facts("sdxl_lightning", 1, "sample")
    assert parse_file_name("dreamshaper") == Facts("dreamshaper")
    assert Facts.of("a_2step.safetensors", {"sdxl_fast.num_inference_steps": "4"}).num_steps == 4
    with pytest.raises(ModelError, match="no number of steps"):
        Facts.of("a", {"sdxl_fast.num_inference_steps": "four"})
    with pytest.raises(ValueError, match="steps is 0"):
        Facts("a").but(num_steps=0)
    with pytest.raises(ValueError, match="prediction_type is 'x0'"):
        Facts("a").but(prediction_type="x0")


def test_the_size_of_sdxl_goes_without_saying() -> None:
    for architecture, side, wanted in ((SDXL_ARCHITECTURE, None, "1024x1024"), (SDXL_ARCHITECTURE, 512, "512x512")):
        said = Facts("a", 4).metadata("lora", architecture=architecture, implementation="diffusers", side=side)
        assert said["modelspec.resolution"] == wanted
    said = Facts("a", 4).metadata("lora", architecture=f"{SDXL_ARCHITECTURE}-shrunken", implementation="diffusers")
    assert "modelspec.resolution" not in said


def test_scheduler_lines() -> None:
    line = scheduler_text({"_class_name": "LCMScheduler", "beta_start": 1.0})
    assert line == "LCMScheduler"
    assert scheduler_config("A, timestep_spacing=trailing") == {"_class_name": "A", "timestep_spacing": "trailing"}
    assert scheduler_text({}) is None
    told = {"_class_name": "D", "timestep_spacing": "leading", "use_karras_sigmas": True, "solver_order": 2}
    line = scheduler_text({**told, "euler_at_final": False, "beta_start": 1.0})
    assert line == "D, timestep_spacing=leading, use_karras_sigmas=true, solver_order=2"
    assert scheduler_config(line) == told
