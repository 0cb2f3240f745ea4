# SPDX-License-Identifier: Apache-2.0
"""The run that all variants go on from, laid out of what the repository holds, so that no training comes first."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import yaml

from sdxl_fast.files import file_sha256, replacing
from sdxl_fast.models.loading import EMBEDDED
from sdxl_fast.models.lora import find_loras
from sdxl_fast.train.config import LightningConfig, StageConfig, cache_folder, load_recipe
from sdxl_fast.train.stages import STUDENT, Unit, units_of

COMMITTED = "embedded"
REGRESSED = Path("weights/emoji-one-step") / STUDENT
"""The one-step student of the embedded model's training after its regression, before any discriminator."""


class NotRunError(RuntimeError):
    """A variant cannot be trained; the message says why."""


class StoppedError(NotRunError):
    """It was told to stop."""


def regressions(stage: StageConfig) -> int:
    """How many of a stage's phases come before its first discriminator."""
    judged = [index for index, phase in enumerate(stage.phases) if phase.adversarial_weight]
    return judged[0] if judged else len(stage.phases)


def regressed_unit(config: LightningConfig) -> Unit | None:
    """The last unit of regression of a one-step stage; None where there is none."""
    for stage in config.stages:
        units = [unit for unit in units_of(config) if unit.stage is stage and unit.phase is not None]
        if stage.steps == 1 and regressions(stage):
            return units[regressions(stage) - 1]
    return None


def committed_run() -> Path:
    """A folder as the recipe `emoji_lightning` would leave it up to there: the embedded LoRAs, and `REGRESSED`.

    Raises:
        NotRunError: files are missing from this checkout, or fit no stage of the recipe.
    """
    config = load_recipe("emoji_lightning", ["teacher=embedded", "run=claims/start"])
    assert isinstance(config, LightningConfig)
    last = regressed_unit(config)
    if last is None or not REGRESSED.is_file():
        raise NotRunError(f"{REGRESSED} is missing (run this in the repository), or the recipe has no regression")
    files = {last: REGRESSED}
    for steps, path in find_loras(EMBEDDED).items():
        found = [unit for unit in units_of(config) if unit.stage.steps == steps and unit.trains == "lora"]
        files |= {found[-1]: path} if found else {}
    recipe = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    told = "\n".join([recipe, *map(file_sha256, files.values())])
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    run = cache_folder() / "runs" / "claims" / f"start-{digest}"
    if (run / "chain.jsonl").is_file():
        return run
    for unit, path in files.items():
        link(path, unit.folder(run) / STUDENT)
    (run / "recipe.yaml").write_text(recipe)
    done = units_of(config)[: last.index + 1]
    lines = [{"unit": u.folder(run).name, "steps": u.stage.steps, "images": u.images} for u in done]
    with replacing(run / "chain.jsonl") as writing:
        writing.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def link(source: Path, target: Path) -> None:
    """The same file, if there is one, under another name, or a copy where the disk has no such thing."""
    if not source.is_file() or (target.is_file() and source.samefile(target)):
        return
    with replacing(target) as writing:
        writing.unlink()
        try:
            os.link(source, writing)
        except OSError:
            shutil.copyfile(source, writing)
