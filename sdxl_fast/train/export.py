"""What distillation hands out: files of each stage's student as few-step checkpoints are published, and one diffusers
folder with the one-step student, the base UNet and the few-step LoRAs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler

from ..files import replacing_folder
from ..models.config import scheduler_arguments
from ..models.export import export_lora, export_unet
from ..models.facts import Facts
from ..models.lora import lora_file_name, read_lora, write_lora
from ..models.lora_file import read_lora_file
from ..models.source import open_model

PUBLISHED = "published"
"""The folder in a run for the files of its stages' students."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write an export into, which takes the place of `folder` when whole."""
    with replacing_folder(folder) as writing:
        yield writing
        _forget_paths(writing)


def export_pipeline(folder: Path, pipe: Any, student: Any, loras: dict[int, Path], *, name: str) -> Path:
    """Writes the folder under a temporary name, in float16, and renames it.

    Args:
        folder: target; an earlier export there is replaced.
        pipe: the teacher's StableDiffusionXLPipeline with the VAE to ship.
        student: the one-step UNet, which predicts x0.
        loras: LoRA file on the base UNet by step count.
        name: stem of the LoRA files, as in `emoji_4step_lora.safetensors`.

    The scheduler config says prediction_type "sample" and trailing: stock diffusers with num_inference_steps=1 and
    guidance_scale=0 draws with the student; the base UNet lies under `unet_base`.
    """
    base = pipe.unet
    prediction_type = pipe.scheduler.config.prediction_type
    pipe.register_modules(unet=student, scheduler=EulerDiscreteScheduler(**scheduler_arguments("sample")))
    with new_folder(folder) as writing:
        pipe.to(torch.float16).save_pretrained(writing, safe_serialization=True)
        base.to(torch.float16).save_pretrained(writing / "unet_base", safe_serialization=True)
        for steps, path in loras.items():
            pairs = {
                module: (down.to(torch.float16), up.to(torch.float16))
                for module, (down, up) in read_lora(path, base).pairs.items()
            }
            rank = next(iter(pairs.values()))[0].shape[0]
            target = writing / lora_file_name(name, steps)
            write_lora(target, pairs, alpha=rank, num_inference_steps=steps, prediction_type=prediction_type)
    return folder


def publish_student(folder: Path, facts: Facts, *, base: Path, lora: Path | None, full: Path | None) -> None:
    """Writes `{name}_{N}step[_x0]_unet.safetensors` and, of a LoRA, `{name}_{N}step_lora.safetensors`, in float16.

    Args:
        folder: where to; files of these names there are replaced.
        facts: the student's name, step count and prediction type.
        base: folder of the UNet that the LoRA is for.
        lora: what was trained of it as a LoRA, if anything; written in kohya's dialect, as SDXL-Lightning's.
        full: all weights of the student; None is the base with the LoRA merged.
    """
    source = full or lora
    if source is None:
        raise ValueError("neither a LoRA nor whole weights: there is no student to publish")
    model = open_model(source, base=base, dtype=torch.float16)
    export_unet(model, folder / facts.file_name("unet"))
    if lora is not None:
        export_lora(read_lora_file(lora), folder / facts.file_name("lora"), dialect="kohya", facts=facts)


def _forget_paths(folder: Path) -> None:
    """Removes `_name_or_path`, where diffusers notes which folder of this machine a part was loaded from."""
    for path in [*folder.glob("*.json"), *folder.glob("*/config.json")]:
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
