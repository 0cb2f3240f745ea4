# SPDX-License-Identifier: Apache-2.0
"""The model card of an exported folder or file: what it is, how to draw with it, and pictures it drew.

A card ends in a line with the hash of what is above it. One without that line, or with another, is a person's work and
is never replaced.

The card of a pipeline whose training and evaluation are at hand says much more: see `model_card`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sdxl_fast.eval.model_card import ATTACHMENTS, contents
from sdxl_fast.files import file_sha256, replacing
from sdxl_fast.models.facts import TRAILING_EULER, Facts, Kind, scheduler_config

CARD = "README.md"
_WHAT: dict[Kind, str] = {"": "all networks", "unet": "the UNet alone", "lora": "a LoRA"}


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


@dataclass(frozen=True, slots=True)
class Shown:
    """What a card is of.

    Attributes:
        facts: its name and how it is sampled.
        side: its native picture side in pixels.
        samples: pictures it drew.
    """

    facts: Facts
    side: int
    samples: Sequence[Sample] = ()


def check_card(path: Path) -> None:
    """Raises ValueError if `path` is what writing a card there would lose, or no name for one."""
    if path.suffix != ".md" or path.is_dir():
        raise ValueError(f"{path}: no place for a model card; allowed: a file that ends in .md, as {CARD}")
    if not path.exists():
        return
    above, _, last = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").rpartition("\n")
    if last != _mark(above):
        raise ValueError(f"{path}: not as an export left it, and would be lost; move it away, or export elsewhere")


def write_folder_card(folder: str | Path, shown: Shown, text: CardText) -> Path:
    """Write `README.md` into a pipeline folder, its pictures into `card/` there, each whole or not at all.

    Args:
        folder: a diffusers pipeline.
        shown: what it is.
        text: what the person says about it.
    """
    folder, scheduler = Path(folder), shown.facts.scheduler
    note = "" if scheduler is None else f"  # its scheduler is {scheduler_config(scheduler)['_class_name']}"
    lines = [f'pipe = StableDiffusionXLPipeline.from_pretrained("path/to/this/folder"){note}']
    example = _example(["from diffusers import StableDiffusionXLPipeline"], lines, shown)
    return _write(folder / CARD, shown, text, example, contents(folder), stem="sample", relation="finetune")


def write_file_card(
    card: str | Path, file: Path, kind: Kind, shown: Shown, text: CardText, *, shrunken: bool = False
) -> Path:
    """Write the card of a single file, its pictures into `card/` beside the card, each whole or not at all.

    Args:
        card: a Markdown file: `README.md` of what is uploaded, or another.
        file: a single file, a UNet or a LoRA.
        kind: which of them.
        shown: what it is.
        text: what the person says about it.
        shrunken: not of SDXL's size.
    """
    if kind == "" and shrunken:  # diffusers takes it for one of SDXL's size
        lines = [f'pipe = OneStepPipeline.from_pretrained("{file.name}")']
        example = _example(["from sdxl_fast import OneStepPipeline"], lines, shown)
    else:
        example = _file_example(kind, file.name, text.base_model or "path/to/its/base", shown)
    about = ["## The file", "", f"`{file.name}` holds {_WHAT[kind]}: {file.stat().st_size:,} bytes, sha256"]
    about += [f"`{file_sha256(file)}`."]
    relation = "adapter" if kind == "lora" else "finetune"
    return _write(Path(card), shown, text, example, about, stem=file.stem, relation=relation)


def _write(
    path: Path,
    shown: Shown,
    text: CardText,
    example: Sequence[str],
    about: Sequence[str],
    *,
    stem: str,
    relation: str,
) -> Path:
    """The card, and its pictures by the names of `stem` in a folder beside it."""
    pictures = [f"{ATTACHMENTS}/{stem}-{number}.png" for number in range(len(shown.samples))]
    for sample, picture in zip(shown.samples, pictures, strict=True):
        with replacing(path.parent / picture) as temporary:
            sample.image.save(temporary, format="PNG")
    front = yaml.safe_dump(_front_matter(shown, text, pictures, relation), allow_unicode=True).rstrip()
    lines = ["---", front, "---", "", f"# {text.title or shown.facts.name}", ""]
    if text.notes.strip():
        lines += [text.notes.strip(), ""]
    if shown.facts.num_steps is not None:
        lines += [_how(shown), "", *example, ""]
    if shown.samples:
        lines += ["## Pictures", "", "| prompt | seed | |", "| --- | ---: | --- |", *_rows(shown.samples, pictures), ""]
    page = "\n".join([*lines, *about, ""])
    with replacing(path) as temporary:
        temporary.write_text(f"{page}\n{_mark(page)}\n", encoding="utf-8")
    return path


def _mark(text: str) -> str:
    return f"<!-- by sdxl-fast export; sha256 of what is above: {hashlib.sha256(text.encode()).hexdigest()} -->"


def _front_matter(shown: Shown, text: CardText, pictures: Sequence[str], relation: str) -> dict[str, Any]:
    """The card's metadata as the hub understands them (huggingface.co/docs/hub/model-cards)."""
    tags = ["stable-diffusion-xl", "text-to-image"]
    tags += (["distillation"] if shown.facts.num_steps else []) + (["lora"] if relation == "adapter" else [])
    data: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if text.license is not None:
        data["license"] = text.license
    if text.base_model is not None:
        data |= {"base_model": text.base_model, "base_model_relation": relation}
    if shown.samples:
        pairs = zip(shown.samples, pictures, strict=True)
        data["widget"] = [{"text": sample.prompt, "output": {"url": picture}} for sample, picture in pairs]
    return data


def _how(shown: Shown) -> str:
    facts = shown.facts
    steps = "one step" if facts.num_steps == 1 else f"{facts.num_steps} steps"
    meaning = {"sample": "the clean latent (x0)", "v_prediction": "v"}.get(facts.prediction_type or "", "the noise (ε)")
    return f"Draws {shown.side} px pictures in {steps} without guidance. Its UNet predicts {meaning}."


def _file_example(kind: Kind, name: str, base: str, shown: Shown) -> list[str]:
    """How diffusers draws with a file; it cannot know the scheduler."""
    arguments = scheduler_config(shown.facts.scheduler or TRAILING_EULER)
    scheduler = arguments.pop("_class_name")
    classes, imports = [scheduler, "StableDiffusionXLPipeline"], list[str]()
    if kind == "":
        lines = [f'pipe = StableDiffusionXLPipeline.from_single_file("{name}")']
    elif kind == "lora":
        lines = [f'pipe = StableDiffusionXLPipeline.from_pretrained("{base}")', f'pipe.load_lora_weights("{name}")']
    else:
        classes, imports = [*classes, "UNet2DConditionModel"], ["from safetensors.torch import load_file"]
        lines = [
            f'config = UNet2DConditionModel.load_config("{base}", subfolder="unet")',
            "unet = UNet2DConditionModel.from_config(config)",
            f'unet.load_state_dict(load_file("{name}"))',
            f'pipe = StableDiffusionXLPipeline.from_pretrained("{base}", unet=unet)',
        ]
    arguments["prediction_type"] = shown.facts.prediction_type or "epsilon"
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    lines.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, {given})")
    return _example([f"from diffusers import {', '.join(sorted(classes))}", *imports], lines, shown)


def _example(imports: Sequence[str], lines: Sequence[str], shown: Shown) -> list[str]:
    prompt = shown.samples[0].prompt if shown.samples else "a photo of a cat"
    call = f"image = pipe({prompt!r}, num_inference_steps={shown.facts.num_steps}, guidance_scale=0).images[0]"
    return ["```python", *imports, "", *lines, call, "```"]


def _rows(samples: Sequence[Sample], files: Sequence[str]) -> list[str]:
    rows = zip(samples, files, strict=True)
    return [f"| {sample.prompt.replace('|', chr(92) + '|')} | {sample.seed} | ![]({file}) |" for sample, file in rows]
