"""Published checkpoints are recognised, and wrong settings raise with the right ones in the message."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from sdxl_fast.errors import ModelError
from sdxl_fast.inference import presets
from sdxl_fast.models.lora import NUM_STEPS_KEY

EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"}
X0 = EULER | {"prediction_type": "sample"}

NAMES = {
    "sdxl_lightning_1step_x0.safetensors": "lightning-1step-x0",
    "sdxl_lightning_2step.safetensors": "lightning-2step",
    "sdxl_lightning_4step_unet.safetensors": "lightning-4step",
    "SDXL-Lightning-8-steps": "lightning-8step",
    "stabilityai/sdxl-turbo": "turbo",
    "sd_xl_turbo_1.0_fp16.safetensors": "turbo",
    "dmd2_sdxl_4step_unet_fp16": "dmd2-4step",
    "dmd2_sdxl_1step_unet": "dmd2-1step",
    "Hyper-SDXL-1step-Unet": "hyper-1step",
    "Hyper-SDXL-8steps": "hyper-8step",
    "latent-consistency/lcm-sdxl": "lcm",
    "h1t/TCD-SDXL-LoRA": "tcd",
}


@pytest.mark.parametrize(("name", "key"), NAMES.items())
def test_names_are_recognised(name: str, key: str) -> None:
    assert presets.recognise(name, None, {}) == presets.by_key(key)


def test_the_title_in_the_metadata_counts_like_a_name() -> None:
    assert presets.recognise("model SDXL-Lightning", None, {NUM_STEPS_KEY: "2"}) == presets.by_key("lightning-2step")


def test_lightning_without_a_step_count() -> None:
    assert presets.recognise("my-lightning", EULER, {}).steps == (4, 2, 8)
    assert presets.recognise("my-lightning", X0, {}) == presets.LIGHTNING_X0


SETTINGS = {
    "lightning-1step-x0": ("EulerDiscreteScheduler", "sample", {1: (999,)}),
    "lightning-4step": ("EulerDiscreteScheduler", "epsilon", {4: (999, 749, 499, 249)}),
    "turbo": ("EulerAncestralDiscreteScheduler", "epsilon", {1: (999,), 4: (999, 749, 499, 249)}),
    "dmd2-4step": ("LCMScheduler", "epsilon", {4: (999, 749, 499, 249)}),
    "dmd2-1step": ("LCMScheduler", "epsilon", {1: (399,)}),
    "hyper-1step": ("LCMScheduler", "epsilon", {1: (800,)}),
    "hyper-2step": ("DDIMScheduler", "epsilon", {2: (999, 499)}),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_are_those_of_the_model_cards(key: str) -> None:
    preset = presets.by_key(key)
    scheduler, prediction, grids = SETTINGS[key]
    assert (preset.scheduler, preset.prediction_type) == (scheduler, prediction)
    assert {steps: preset.grid(steps) for steps in grids} == grids


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("preset", [presets.LCM, presets.TCD], ids=["lcm", "tcd"])
def test_consistency_grids_are_those_of_their_schedulers(steps: int, preset: presets.Preset) -> None:
    scheduler = getattr(diffusers, preset.scheduler)()
    scheduler.set_timesteps(steps)
    assert list(preset.grid(steps)) == scheduler.timesteps.tolist()


def test_unknown_names_are_sampled_as_their_scheduler_says() -> None:
    assert presets.recognise("emoji", X0, {}).steps == (1,)
    few = presets.recognise("mine", EULER, {})
    assert (few.sampler, few.prediction_type, sorted(few.steps)) == ("euler", "epsilon", [1, 2, 4, 8])
    assert presets.recognise("mine", {"_class_name": "LCMScheduler"}, {}).sampler == "lcm"
    assert presets.recognise("mine", EULER, {NUM_STEPS_KEY: "8"}).steps == (8,)


WRONG: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "lightning that predicts x0": ("sdxl_lightning_4step", X0, r"prediction_type='sample'.*needs.*'epsilon'"),
    "x0 that predicts epsilon": (
        "sdxl_lightning_1step_x0",
        EULER,
        r"needs EulerDiscreteScheduler\(prediction_type='sample'",
    ),
    "turbo with plain euler": ("sdxl-turbo", EULER, r"needs EulerAncestralDiscreteScheduler"),
    "lightning with another spacing": (
        "sdxl_lightning_4step",
        EULER | {"timestep_spacing": "leading"},
        r"'leading'.*needs.*'trailing'",
    ),
    "dmd2 with euler": ("dmd2_4step", EULER, "needs LCMScheduler"),
    "three-step lightning": ("sdxl_lightning_3step", EULER, r"no 3-step.*lightning-4step"),
    "plain sdxl": ("sdxl-base", EULER | {"timestep_spacing": "leading"}, "few-step checkpoint needs 'trailing'"),
    "another scheduler": ("mine", {"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
    "a prediction nobody has": ("mine", EULER | {"prediction_type": "flow"}, "'flow'.*epsilon, sample, v_prediction"),
    "a nameless file": ("model.safetensors", None, "give preset=.*turbo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradictions_raise_with_what_is_right(case: str) -> None:
    name, scheduler, message = WRONG[case]
    with pytest.raises(ModelError, match=message):
        presets.recognise(name, scheduler, {})


def test_unknown_keys_name_all_presets() -> None:
    with pytest.raises(ValueError, match=r"'fast'.*lightning-1step-x0.*lcm"):
        presets.by_key("fast")


def test_guidance_is_refused_above_one() -> None:
    presets.check_guidance(presets.TURBO, 0.0)
    presets.check_guidance(presets.TURBO, 1.0)
    with pytest.raises(ValueError, match=r"guidance_scale is 7\.5; SDXL-Turbo.*guidance_scale=0"):
        presets.check_guidance(presets.TURBO, 7.5)


def test_a_lora_on_plain_sdxl_says_how_to_sample() -> None:
    plain = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading"}
    with pytest.raises(ModelError, match="plain SDXL"):
        presets.recognise("stable-diffusion-xl-base-1.0", plain, {}, loras=["watercolour.safetensors"])
    loras = ["watercolour.safetensors", "sdxl_lightning_4step_lora.safetensors"]
    found = presets.recognise("stable-diffusion-xl-base-1.0", plain, {}, loras=loras)
    assert found is presets.PRESETS["lightning-4step"]
    assert presets.recognise("sdxl-turbo", None, {}, loras=loras) is presets.TURBO  # its own name comes first
