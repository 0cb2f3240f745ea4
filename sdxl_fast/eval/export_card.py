# SPDX-License-Identifier: Apache-2.0
"""The model card of an exported folder: what it is, how to draw with it, and pictures it drew.

The card of a pipeline whose training and evaluation are at hand says much more: see `model_card`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sdxl_fast.eval.model_card import ATTACHMENTS, contents
from sdxl_fast.files import replacing
from sdxl_fast.models.facts import Facts, scheduler_config

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture to show, and what drew it."""

    prompt: str
    seed: int
    image: Image.Image


@dataclass(frozen=True, slots=True)
class CardText:
    """What only the person who exports can know; nothing is guessed, least of all the licence.

    Attributes:
        title: heading; the model's name if None.
        license: an identifier of the Hugging Face hub, such as "openrail++".
        base_model: hub id of the model it was made from.
        notes: Markdown to put under the heading.
    """

    title: str | None = None
    license: str | None = None
    base_model: str | None = None
    notes: str = ""


@dataclass(slots=True)
class _Page:
    lines: list[str] = field(default_factory=list)

    def add(self, *lines: str) -> None:
        self.lines += [*lines, ""]


def write_export_card(
    folder: str | Path, facts: Facts, text: CardText, samples: Sequence[Sample], *, side: int
) -> Path:
    """Write `README.md` into a pipeline folder, its pictures into `card/` there, each whole or not at all.

    Args:
        folder: a diffusers pipeline.
        facts: its name and how it is sampled.
        text: what the person says about it.
        samples: pictures it drew.
        side: its native picture side in pixels.
    """
    folder = Path(folder)
    files = []
    for number, sample in enumerate(samples):
        file = f"{ATTACHMENTS}/sample-{number}.png"
        with replacing(folder / file) as temporary:
            sample.image.save(temporary, format="PNG")
        files.append(file)
    page = _Page()
    page.add("---", yaml.safe_dump(front_matter(facts, text, samples, files), allow_unicode=True).rstrip(), "---")
    page.add(f"# {text.title or facts.name}")
    if text.notes.strip():
        page.add(text.notes.strip())
    if facts.num_steps is not None:
        page.add(_how(facts, side), "", *_example(facts, samples))
    if samples:
        page.add("## Pictures", "", "| prompt | seed | |", "| --- | ---: | --- |", *_rows(samples, files))
    page.add(*contents(folder))
    with replacing(folder / CARD) as temporary:
        temporary.write_text("\n".join(page.lines).rstrip() + "\n", encoding="utf-8")
    return folder / CARD


def front_matter(facts: Facts, text: CardText, samples: Sequence[Sample], files: Sequence[str]) -> dict[str, Any]:
    """The card's metadata as the hub understands them (huggingface.co/docs/hub/model-cards)."""
    tags = ["stable-diffusion-xl", "text-to-image", "distillation"] if facts.num_steps else ["stable-diffusion-xl"]
    data: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if text.license is not None:
        data["license"] = text.license
    if text.base_model is not None:
        data |= {"base_model": text.base_model, "base_model_relation": "finetune"}
    if samples:
        pairs = zip(samples, files, strict=True)
        data["widget"] = [{"text": sample.prompt, "output": {"url": file}} for sample, file in pairs]
    return data


def _how(facts: Facts, side: int) -> str:
    steps = "one step" if facts.num_steps == 1 else f"{facts.num_steps} steps"
    meaning = {"sample": "the clean latent (x0)", "v_prediction": "v"}.get(facts.prediction_type or "", "the noise (ε)")
    return f"Draws {side} px pictures in {steps} without guidance. Its UNet predicts {meaning}."


def _example(facts: Facts, samples: Sequence[Sample]) -> list[str]:
    prompt = samples[0].prompt if samples else "a photo of a cat"
    kind = scheduler_config(facts.scheduler)["_class_name"] if facts.scheduler else "EulerDiscreteScheduler"
    return [
        "```python",
        "from diffusers import StableDiffusionXLPipeline",
        "",
        f'pipe = StableDiffusionXLPipeline.from_pretrained("path/to/this/folder")  # its scheduler is {kind}',
        f"image = pipe({prompt!r}, num_inference_steps={facts.num_steps}, guidance_scale=0).images[0]",
        "```",
    ]


def _rows(samples: Sequence[Sample], files: Sequence[str]) -> list[str]:
    rows = zip(samples, files, strict=True)
    return [f"| {sample.prompt.replace('|', chr(92) + '|')} | {sample.seed} | ![]({file}) |" for sample, file in rows]
