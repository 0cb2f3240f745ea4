"""What draws the rows of `sdxl-fast eval --prompts`: a few-step model, and an undistilled one with guidance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .cli_options import model_name
from .errors import NotFewStepError
from .eval.report import model_digest
from .eval.sources import Generate, Teacher
from .eval.tables import student_row
from .inference import OneStepPipeline
from .models import loading

if TYPE_CHECKING:
    from .cli_eval import PromptOptions


@dataclass(frozen=True)
class Row:
    """A set of pictures to draw: its name in the report, what draws it, and all that decides how."""

    name: str
    generate: Generate
    settings: dict[str, Any]


def find_rows(options: PromptOptions, device: torch.device) -> list[Row]:
    """The rows, most steps first, drawn on `device`: by a student in its counts, by an undistilled UNet in any.

    Raises:
        ValueError: a step count that a few-step model without its base was not distilled for, or no guidance.
    """
    folder = loading.resolve(options.model)
    pipe: OneStepPipeline | None = None
    try:
        pipe = OneStepPipeline.from_pretrained(options.model, device=device)
    except NotFewStepError:
        if not options.guidance or not folder.is_dir():  # a plain pipeline draws with guidance, in any number of steps
            raise
    undistilled = pipe is None or (folder / "unet_base").is_dir()
    own = () if pipe is None else pipe.num_inference_steps

    @functools.cache
    def teacher() -> Teacher:  # loaded when it first draws, and once
        return Teacher(folder, guidance_scale=options.guidance, device=device)

    common = {"model": model_name(options.model), "weights_sha256": model_digest(folder)}
    common["device"] = device.type  # numbers differ a little between kinds of device
    rows = []
    for count in sorted({*(options.steps or own or (32,))}, reverse=True):
        if pipe is not None and count in own:
            how = {"steps": count, "source": "student", "dtype": str(pipe.dtype).removeprefix("torch.")}
            rows.append(Row(student_row(count), _student(pipe, count), how | common))
        elif options.guidance and undistilled:
            how = {"steps": count, "source": "undistilled", "dtype": "float32", "guidance": options.guidance}
            rows.append(Row(student_row(count), _taught(teacher, count), how | common))
        else:
            counts = ", ".join(map(str, own))
            lacks = "a --guidance above 0" if undistilled else "an undistilled UNet, which a folder has as unet_base"
            raise ValueError(f"--steps {count}: {folder.name} draws in {counts}; other step counts need {lacks}")
    return rows


def _student(pipe: OneStepPipeline, count: int) -> Generate:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        found = pipe(list(prompts), seed=list(seeds), num_inference_steps=count, output_type="pt").images
        return found  # type: ignore[no-any-return]

    return draw


def _taught(teacher: Callable[[], Teacher], count: int) -> Generate:
    return lambda prompts, seeds: teacher().in_steps(count)(prompts, seeds)
