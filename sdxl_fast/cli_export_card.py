"""The model card of what `sdxl-fast export` writes, and the pictures in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .models.facts import SDXL_SIDE

if TYPE_CHECKING:
    from .eval.export_card import CardText, Sample
    from .models.facts import Facts, Kind
    from .models.source import Model

SDXL_PROMPTS = (
    "a photo of a red fox in deep snow, golden hour",
    "portrait of an old sailor, oil painting",
    "a glass greenhouse full of orchids, morning light",
    "a street market in the rain at night, neon signs",
)

Card = Annotated[
    Path | None,
    typer.Option("--card", help="Also write a model card, such as README.md of the upload; pictures go beside it."),
]
BaseModel = Annotated[str | None, typer.Option(help="For the card: hub id of what it was made from.")]
Samples = Annotated[int, typer.Option(help="Pictures to draw for the card; 0 draws none.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="For the pictures; may be repeated.")]
Device = Annotated[str | None, typer.Option(help="To draw on: cpu, cuda, ...; a GPU if there is one.")]


@dataclass(frozen=True, slots=True)
class CardOptions:
    """What the command line says of a card; `path` is None where none is wanted."""

    path: Path | None
    text: CardText
    samples: int
    prompts: list[str]
    device: str | None


def card_options(
    path: Path | None,
    samples: int,
    prompts: list[str] | None,
    device: str | None,
    *,
    license: str | None,
    base_model: str | None,
    title: str | None = None,
) -> CardOptions:
    """The options, checked before anything is written.

    Raises:
        ValueError: no such device, a negative number of pictures, words for a card that is not wanted, or a file at
            `path` that is not to be replaced.
    """
    from .eval.export_card import CardText, check_card
    from .inference.request import check_device

    if samples < 0:
        raise ValueError(f"--samples is {samples}; allowed: 0 or more")
    of_card = {"license": license, "base-model": base_model, "prompt": prompts, "device": device}
    if path is None and (given := [name for name, value in of_card.items() if value]):
        raise ValueError(f"--{given[0]} is of a model card: give --card, too")
    if path is not None:
        check_card(path)
    if device is not None:
        check_device(device)
    text = CardText(title=title, license=license, base_model=base_model)
    return CardOptions(path, text, samples, prompts or [], device)


def folder_card(folder: Path, model: Model, options: CardOptions) -> None:
    """The card of a pipeline folder just written, with pictures that it drew."""
    from .eval.export_card import Shown, write_folder_card

    samples = _samples(folder, None, model.facts, options, shrunken=model.shrunken)
    write_folder_card(folder, Shown(model.facts, model.side or SDXL_SIDE, samples), options.text)


def file_card(
    file: Path,
    kind: Kind,
    facts: Facts,
    options: CardOptions,
    *,
    shrunken: bool,
    base: str | Path | None = None,
    side: int | None = None,
) -> None:
    """The card of a file just written, if one is wanted.

    Args:
        file: a single file, a UNet or a LoRA.
        kind: which of them.
        facts: its name and how it is sampled.
        options: of the card.
        shrunken: not of SDXL's size.
        base: what a UNet or a LoRA is drawn on.
        side: native picture side in pixels; SDXL's where nothing says.
    """
    if options.path is None:
        return
    from .eval.export_card import Shown, write_file_card

    samples = _samples(file, base, facts, options, shrunken=shrunken)
    shown = Shown(facts, side or SDXL_SIDE, samples)
    print(f"wrote {write_file_card(options.path, file, kind, shown, options.text, shrunken=shrunken)}")


def _samples(
    path: Path, base: str | Path | None, facts: Facts, options: CardOptions, *, shrunken: bool
) -> list[Sample]:
    """Pictures drawn with what was written; none, and why, where it cannot be drawn with."""
    from .demo import PROMPTS
    from .errors import SdxlFastError
    from .eval.export_card import Sample
    from .inference import OneStepPipeline
    from .text import one_line

    if not options.samples:
        return []
    if facts.num_steps is None:
        print("note: no sample pictures, for nothing says in how many steps it draws (--steps)")
        return []
    texts = (options.prompts or list(PROMPTS if shrunken else SDXL_PROMPTS)) * options.samples
    texts, seeds = texts[: options.samples], range(options.samples)
    try:
        pipe = OneStepPipeline.from_pretrained(path, base=base, device=options.device)
        images = [
            pipe(prompt, seed=seed, num_inference_steps=facts.num_steps).images[0]
            for prompt, seed in zip(texts, seeds, strict=True)
        ]
    except (SdxlFastError, ValueError) as error:
        print(f"note: no sample pictures, for it could not be drawn with: {one_line(error, None)}")
        return []
    return [Sample(*sample) for sample in zip(texts, seeds, images, strict=True)]
