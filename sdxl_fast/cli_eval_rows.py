"""What draws the rows of `sdxl-fast eval --prompts`: a few-step model, and an undistilled one with guidance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .cli_options import load_pipeline, model_name, precision
from .errors import NotFewStepError
from .eval.report import model_digest
from .eval.sources import Generate, Teacher
from .eval.tables import student_row
from .inference import OneStepPipeline
from .inference.adapters import Adapters
from .inference.presets import Preset
from .inference.request import check_size
from .models import loading
from .models.facts import TRAILING_EULER

if TYPE_CHECKING:
    from .cli_eval import PromptOptions

TEACHER_DTYPE = torch.float32


@dataclass(frozen=True)
class Row:
    """A set of pictures to draw: its name in the report, what draws it, and all that decides how."""

    name: str
    generate: Generate
    settings: dict[str, Any]


def find_rows(options: PromptOptions, device: torch.device) -> list[Row]:
    """The rows, most steps first, drawn on `device`: by a student in its counts, by an undistilled UNet in any.

    A model of which nothing says how it is sampled in a few steps is undistilled.

    Raises:
        ModelError: no such model, or not an SDXL pipeline, or one that lacks its base.
        ValueError: a step count that a few-step model without its base was not distilled for, or no guidance.
    """
    paths = _paths(options)
    pipe: OneStepPipeline | None = None
    others: dict[str, Any] = {"base": options.base, "preset": options.preset, "vae": options.vae}
    try:
        pipe = load_pipeline(options.model, device, options.dtype, lora=dict(options.loras), **others)
    except NotFewStepError as error:
        if not options.guidance:
            raise NotFewStepError(f"{error}; an undistilled model needs a --guidance above 0") from error
    undistilled = pipe is None or (options.base is None and (paths["model"] / "unet_base").is_dir())
    own = () if pipe is None else pipe.num_inference_steps
    common = _common(options, paths, device)
    teacher = functools.cache(lambda: _teacher(options, paths, device))  # loaded when it first draws, and once
    rows = []
    for count in sorted({*(options.steps or own or (32,))}, reverse=True):
        if pipe is not None and count in own:
            size = check_size(options.height, options.width, pipe.default_size, pipe.vae_scale_factor)
            how = {"steps": count, "source": "student", "guidance": 0.0, "dtype": _word(pipe.dtype)}
            how["scheduler"] = _scheduler(pipe.preset, count)
            rows.append(Row(student_row(count), _student(pipe, count, size), how | common))
        elif options.guidance and undistilled:
            dtype = _word(precision(options.dtype) or TEACHER_DTYPE)
            how = {"steps": count, "source": "undistilled", "guidance": options.guidance, "dtype": dtype}
            how["scheduler"] = TRAILING_EULER
            name = f"{student_row(count)}, guidance {options.guidance:g}"
            rows.append(Row(name, _taught(teacher, count), how | common))
        else:
            counts = ", ".join(map(str, own))
            lacks = "a --guidance above 0" if undistilled else "an undistilled UNet, which a folder has as unet_base"
            name = model_name(options.model)
            raise ValueError(f"--steps {count}: {name} draws in {counts}; other step counts need {lacks}")
    return rows


def _paths(options: PromptOptions) -> dict[str, Path]:
    """All that the pictures are drawn with, by what it is."""
    paths = {"model": loading.resolve(options.model)}
    if options.base is not None:
        paths["base"] = loading.resolve(options.base)
    if options.vae is not None:
        paths["VAE"] = loading.vae_folder(options.vae)
    return paths | {f"LoRA {model_name(file)}": Path(file) for file, _ in options.loras}


def _common(options: PromptOptions, paths: dict[str, Path], device: torch.device) -> dict[str, Any]:
    """What all rows have in common, as far as it decides their pixels."""
    return {
        "model": model_name(options.model),
        "base": None if options.base is None else model_name(options.base),
        "loras": {model_name(file): weight for file, weight in options.loras},
        "vae": None if options.vae is None else model_name(str(options.vae)),
        "preset": options.preset,
        "weights_sha256": {name: model_digest(path) for name, path in paths.items()},
        "height": options.height,
        "width": options.width,
        "device": device.type,  # numbers differ a little between kinds of device
    }


def _scheduler(preset: Preset, count: int) -> str:
    """What a student is sampled by: the pipeline's own preset, or the few-step LoRA beside it for another count."""
    if count not in preset.steps:
        return TRAILING_EULER
    return f"{preset.scheduler}, timesteps {' '.join(map(str, preset.grid(count)))}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _student(pipe: OneStepPipeline, count: int, size: tuple[int, int]) -> Generate:
    how: dict[str, Any] = {"num_inference_steps": count, "height": size[0], "width": size[1], "output_type": "pt"}

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        return pipe(list(prompts), seed=list(seeds), **how).images  # type: ignore[no-any-return]

    return draw


def _teacher(options: PromptOptions, paths: dict[str, Path], device: torch.device) -> Teacher:
    """The undistilled UNet with the LoRAs merged, and the VAE asked for."""
    dtype = precision(options.dtype) or TEACHER_DTYPE
    base = paths.get("base")
    teacher = Teacher(
        paths["model"], base=base, vae=options.vae, guidance_scale=options.guidance, device=device, dtype=dtype
    )
    teacher.size = check_size(options.height, options.width, teacher.size[0], teacher.factor)
    encoders = {name: getattr(teacher.parts, name) for name in ("text_encoder", "text_encoder_2")}
    adapters = Adapters({"unet": teacher.unet, **encoders}, changed=lambda: None)
    for file, weight in options.loras:
        adapters.load(file, strength=weight)
    return teacher


def _taught(teacher: Callable[[], Teacher], count: int) -> Generate:
    return lambda prompts, seeds: teacher().in_steps(count)(prompts, seeds)
