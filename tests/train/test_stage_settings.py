"""A chain of stages that cannot be trained to its end is refused when the recipe is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdxl_fast.train.config import LightningConfig, load_recipe

PHASE: dict[str, Any] = {"name": "p", "condition": False, "trains": "lora", "images": 4}
FIRST: dict[str, Any] = {"name": "32-step", "steps": 32, "loss": "mse", "images": 4}


def _stage(steps: int, *phases: dict[str, Any], **stage: Any) -> dict[str, Any]:
    return {"name": f"{steps}-step", "steps": steps, "loss": "adversarial", "phases": list(phases or [PHASE]), **stage}


def _load(recipe: Path, *stages: dict[str, Any]) -> Any:
    return load_recipe(recipe, [f"stages={json.dumps(stages)}"])


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no stage": ([], "stages is empty; give at least one"),
    "teacher misspelt": (
        [FIRST, _stage(4, {**PHASE, "teacher": "32step"})],
        "teacher of phase p of stage 4-step is 32step; allowed: an earlier stage, of base, 32-step; did you mean "
        "32-step?",
    ),
    "teacher to come": (
        [FIRST, _stage(8, {**PHASE, "teacher": "4-step"}), _stage(4)],
        "teacher of phase p of stage 8-step is 4-step; allowed: an earlier stage, of base, 32-step",
    ),
    "teacher itself": ([FIRST, _stage(8, {**PHASE, "teacher": "8-step"})], "allowed: an earlier stage"),
    "teacher without LoRA": (
        [FIRST, _stage(4, {**PHASE, "trains": "full"}), _stage(2)],
        "teacher of phase p of stage 2-step is 4-step, which trains no LoRA to teach with; name an earlier stage as its"
        " teacher (base, 32-step), or give 4-step a phase that trains lora",
    ),
    "teacher of the conversion": (
        [FIRST, _stage(2, {**PHASE, "trains": "full"}), _stage(1, {**PHASE, "teacher": "32-step"}, convert_images=4)],
        "teacher of stage 1-step is 2-step, which trains no LoRA",
    ),
    "steps that do not divide": (
        [FIRST, _stage(8), _stage(3)],
        "phase p of stage 3-step has 3 steps, and its teacher 8-step 8; the teacher's must be a multiple of them",
    ),
    "more steps than the teacher": (
        [FIRST, _stage(64)],
        "phase p of stage 64-step has 64 steps, and its teacher 32-step 32",
    ),
    "as many steps as the teacher": ([FIRST, _stage(32, name="again")], "must be a multiple of them, and more"),
    "two of a name": (
        [{**FIRST, "name": "4", "steps": 4}, _stage(2, name="4")],
        "two stages are called 4; give each a name of its own",
    ),
    "a stage called base": ([{**FIRST, "name": "base"}], "two stages are called base"),
    "no length": ([{**FIRST, "images": 0}], "stage 32-step has loss mse and images 0; say its length in images"),
    "a warm-up as long as its phase": (
        [FIRST, _stage(8, {**PHASE, "d_warmup": 4})],
        "d_warmup of phase p of stage 8-step is 4, after which no batch of 4 is left of 4 images for the student; "
        "lower d_warmup or raise images",
    ),
    "a warm-up into the last batch": (
        [FIRST, _stage(8, {**PHASE, "images": 8, "d_warmup": 5})],
        "d_warmup of phase p of stage 8-step is 5, after which no batch of 4 is left of 8 images for the student",
    ),
    "no phases": (
        [FIRST, {**_stage(8), "phases": []}],
        "stage 8-step has loss adversarial and no phases; give it one, or set loss to mse",
    ),
    "timesteps counted from 1": (
        [FIRST, _stage(2, timesteps=[250, 500, 750, 1000])],
        "(250, 500, 750, 1000) must be 0-based timesteps from 0 to 999; the papers' 1000 is 999 here",
    ),
    "re-noising counted from 1": (
        [FIRST, _stage(1, {**PHASE, "renoise": [10, 1000]})],
        "(10, 1000) must be 0-based timesteps from 0 to 999; the papers' 1000 is 999 here",
    ),
    "re-noising of what is never clean": (
        [FIRST, _stage(8, {**PHASE, "renoise": [10]}, timesteps=[999, 499])],
        "renoise of p noises clean latents, which no move from (999, 499) in 8 steps reaches; leave it out",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_chain_is_refused_with_its_remedy(name: str, lightning_recipe: Path) -> None:
    stages, message = WRONG[name]
    with pytest.raises(ValueError) as caught:
        _load(lightning_recipe, *stages)
    assert message in str(caught.value) and "kind" not in str(caught.value)


def test_a_chain_may_skip_and_branch(lightning_recipe: Path) -> None:
    full = {**PHASE, "name": "full", "trains": "full"}
    warmed = {**PHASE, "images": 8, "d_warmup": 4}
    stages = [FIRST, _stage(8, warmed, full), _stage(2, {**PHASE, "teacher": "32-step"}), _stage(1, full)]
    config = _load(lightning_recipe, *stages)
    assert isinstance(config, LightningConfig)
    assert [stage.ends_in_lora for stage in config.stages] == [True, True, True, False]
    assert config.stages[2].grid == (999, 499)
