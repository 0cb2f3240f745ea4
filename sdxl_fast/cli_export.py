"""`sdxl-fast export`: a model in the formats that others read. Every mistake is one line on stderr and exit code 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_export_card import BaseModel, Card, Device, Prompts, Samples, card_options, file_card, folder_card

if TYPE_CHECKING:
    import torch

    from .models.extract import Residual
    from .models.facts import Facts
    from .models.lora_file import LoraFile
    from .models.source import Model

export_app = typer.Typer(help="Write a model in the formats that others read.", no_args_is_help=True)

Source = Annotated[
    str,
    typer.Argument(
        metavar="IN",
        help="Pipeline folder, hub id, single file, UNet or LoRA; `embedded` is the pipeline of this package.",
    ),
]
Out = Annotated[Path, typer.Option(help="A .safetensors file, or a folder for one named {name}_{N}step... in it.")]
Base = Annotated[str | None, typer.Option(help="Pipeline that a LoRA changes or a UNet belongs to.")]
Steps = Annotated[
    int | None, typer.Option(help="Step count: which student of a folder to take, or what IN does not say.")
]
Dtype = Annotated[str, typer.Option(help="float16, bfloat16, float32, or keep.")]
Name = Annotated[str | None, typer.Option(help="Name of the model; IN's by default.")]
Prediction = Annotated[
    str | None, typer.Option("--prediction-type", help="epsilon, sample or v_prediction, where IN does not say.")
]
Alpha = Annotated[float | None, typer.Option(help="What a LoRA was trained with, where its file does not say.")]
Metadata = Annotated[bool, typer.Option(help="Say in the file what it is and how to sample it.")]
License = Annotated[
    str | None, typer.Option(help="For the metadata, and for the card, as the hub calls it: openrail++.")
]
HUB_LICENSE = "For the card, as the hub calls it: openrail++, mit, ..."
Author = Annotated[str | None, typer.Option(help="For the metadata.")]
Format = Annotated[str, typer.Option("--format", help="kohya (ComfyUI), diffusers or peft.")]


@export_app.command("unet")
def export_unet(
    source: Source,
    out: Out,
    base: Base = None,
    steps: Steps = None,
    dtype: Dtype = "float16",
    name: Name = None,
    prediction_type: Prediction = None,
    alpha: Alpha = None,
    card: Card = None,
    license: Annotated[str | None, typer.Option(help=HUB_LICENSE)] = None,
    base_model: BaseModel = None,
    samples: Samples = 4,
    prompts: Prompts = None,
    device: Device = None,
) -> None:
    """Write the UNet alone, as SDXL-Lightning's `_unet` files: diffusers' names, float16, no metadata."""
    from .models import export

    options = card_options(card, samples, prompts, device, license=license, base_model=base_model)
    model = _open(source, base, steps, dtype, name, prediction_type, alpha)
    path = export.export_unet(model, out, dtype=_dtype(dtype))
    _say(path, model.facts)
    whole = base or source
    file_card(path, "unet", model.facts, options, shrunken=model.shrunken, base=whole, side=model.side)
    others = sorted(model.adapted - {"unet"})
    if others:
        print(f"note: the LoRA changes {' and '.join(others)} too, which a UNet leaves out: use single-file or folder")


@export_app.command("single-file")
def export_single_file(
    source: Source,
    out: Out,
    base: Base = None,
    steps: Steps = None,
    dtype: Dtype = "float16",
    name: Name = None,
    prediction_type: Prediction = None,
    alpha: Alpha = None,
    metadata: Metadata = True,
    license: License = None,
    author: Author = None,
    card: Card = None,
    base_model: BaseModel = None,
    samples: Samples = 4,
    prompts: Prompts = None,
    device: Device = None,
) -> None:
    """Write an all-in-one checkpoint, as ComfyUI and diffusers' `from_single_file` read it."""
    from .models import export

    stated = _stated(license, author, metadata, card)
    options = card_options(card, samples, prompts, device, license=license if card else None, base_model=base_model)
    model = _open(source, base, steps, dtype, name, prediction_type, alpha)
    path = export.export_single_file(model, out, dtype=_dtype(dtype), metadata=metadata, stated=stated)
    _say(path, model.facts)
    file_card(path, "", model.facts, options, shrunken=model.shrunken, side=model.side)
    widths = {model.configs.get(part, {}).get("hidden_size") for part in ("text_encoder", "text_encoder_2")}
    if len(widths) == 1 and widths != {None}:
        print("note: diffusers tells the text encoders apart by width, and these have one: give it text_encoder_2=")


@export_app.command("folder")
def export_folder(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    base: Base = None,
    steps: Steps = None,
    dtype: Dtype = "float16",
    name: Name = None,
    prediction_type: Prediction = None,
    alpha: Alpha = None,
    title: Annotated[str | None, typer.Option(help="Heading of the model card.")] = None,
    license: Annotated[str | None, typer.Option(help=HUB_LICENSE)] = None,
    base_model: BaseModel = None,
    samples: Samples = 4,
    prompts: Prompts = None,
    device: Device = None,
) -> None:
    """Write a diffusers folder with a model card and sample pictures."""
    from .models import export

    options = card_options(
        out / "README.md", samples, prompts, device, title=title, license=license, base_model=base_model
    )
    model = _open(source, base, steps, dtype, name, prediction_type, alpha)
    if steps is not None:
        model = replace(model, extras={})
    folder = export.export_folder(
        model, out, dtype=_dtype(dtype), finish=lambda folder: folder_card(folder, model, options)
    )
    _say(folder, model.facts)


@export_app.command("lora")
def export_lora(
    source: Source,
    format: Format,
    out: Out,
    base: Base = None,
    alpha: Alpha = None,
    steps: Steps = None,
    dtype: Dtype = "float16",
    name: Name = None,
    prediction_type: Prediction = None,
    metadata: Metadata = True,
    license: License = None,
    author: Author = None,
    card: Card = None,
    base_model: BaseModel = None,
    samples: Samples = 4,
    prompts: Prompts = None,
    device: Device = None,
) -> None:
    """Write a LoRA in another dialect, at the strength it has.

    Without metadata a kohya file is laid out as the published few-step LoRAs are.
    """
    from .models import export
    from .models.facts import Facts
    from .models.lora_file import read_lora_file
    from .models.source import open_model

    stated = _stated(license, author, metadata, card)
    options = card_options(card, samples, prompts, device, license=license if card else None, base_model=base_model)
    found = _resolve(source)
    path = export.find_lora(found, steps)
    whole = _resolve(base) if base is not None else None if path == found else found
    side = None if whole is None else open_model(whole).side
    lora = read_lora_file(path, alpha=alpha)
    facts = Facts.of(path, lora.metadata).but(name=name, num_steps=steps, prediction_type=prediction_type)
    written = export.export_lora(
        lora, out, dialect=format, facts=facts, dtype=_dtype(dtype), metadata=metadata, side=side, stated=stated
    )
    _say(written, facts)
    _note_alpha(lora, format)
    file_card(written, "lora", facts, options, shrunken=lora.shrunken, base=whole, side=side)


@export_app.command("extract-lora")
def extract_lora(
    source: Annotated[str, typer.Argument(metavar="UNET", help="The changed model: anything with a UNet.")],
    base: Annotated[str, typer.Option(help="The model it was made from.")],
    rank: Annotated[int, typer.Option(help="SDXL-Lightning's is 64.")],
    out: Out,
    format: Format = "kohya",
    steps: Steps = None,
    dtype: Dtype = "float16",
    name: Name = None,
    prediction_type: Prediction = None,
    metadata: Metadata = True,
    license: License = None,
    author: Author = None,
    device: Annotated[str, typer.Option(help="Where to decompose: cpu, cuda, ...")] = "cpu",
) -> None:
    """Make a LoRA of what changed between two UNets, and say how much of it a LoRA of that rank leaves out."""
    from tqdm import tqdm

    from .inference.request import check_device
    from .models import export
    from .models.extract import extract_lora
    from .models.source import open_model, undistilled

    if _dtype(dtype) is None:
        raise ValueError("--dtype is keep; allowed here: float16, bfloat16, float32")
    stated = _stated(license, author, metadata)
    model = _open(source, None, steps, "float32", name, prediction_type, None)  # rounded, it would differ everywhere
    origin = undistilled(open_model(_resolve(base)))
    target = export.target_file(out, model.facts, "lora")  # a mistake there is to come up before the work
    lora, residual = extract_lora(
        model.tensors["unet"],
        origin.tensors["unet"],
        rank=rank,
        dtype=_dtype(dtype) or model.tensors["unet"]["conv_in.weight"].dtype,
        device=check_device(device),
        progress=lambda modules: tqdm(modules, unit="layer", disable=None),
    )
    if not residual.total:
        raise ValueError(f"{source} and {base} have equal UNets: there is nothing to extract")
    written = export.export_lora(
        lora, target, dialect=format, facts=model.facts, dtype=None, metadata=metadata, side=origin.side, stated=stated
    )
    _say(written, model.facts)
    for line in residual_lines(residual, rank):
        print(line)


def residual_lines(residual: Residual, rank: int) -> list[str]:
    """What an extracted LoRA leaves out, for people."""
    worst = max(residual.modules, key=residual.modules.__getitem__)
    missing = residual.missing / residual.adapted if residual.adapted else 0.0
    lines = [
        f"leaves out {residual.fraction:.2%} of the whole difference, and {missing:.2%} of that in the "
        f"{len(residual.modules)} layers it adapts at rank {rank}",
        f"most in {worst}: {residual.modules[worst]:.2%}",
    ]
    if residual.outside:
        share = sum(norm**2 for norm in residual.outside.values()) ** 0.5 / residual.total
        lines.append(f"{share:.2%} lies in {len(residual.outside)} parameters that such a LoRA does not reach")
    return lines


def _open(
    source: str,
    base: str | None,
    steps: int | None,
    dtype: str,
    name: str | None,
    prediction_type: str | None,
    alpha: float | None,
) -> Model:
    """The model, with what the command line says of it in place of what it says itself."""
    from .models.source import open_model, rescheduled

    target = _dtype(dtype)
    whole = None if base is None else _resolve(base)
    model = open_model(_resolve(source), base=whole, steps=steps, alpha=alpha, dtype=target)
    return rescheduled(model, model.facts.but(name=name, num_steps=steps, prediction_type=prediction_type))


def _stated(license: str | None, author: str | None, metadata: bool, card: Path | None = None) -> dict[str, str]:
    """ModelSpec's entries for what the person who exports says."""
    if card is not None and not metadata:
        license = None  # the card says it
    stated = {"modelspec.license": license, "modelspec.author": author}
    found = {key: value for key, value in stated.items() if value is not None}
    if found and not metadata:
        raise ValueError("--license and --author go into the metadata, which --no-metadata leaves out: choose one")
    return found


def _resolve(model: str) -> Path:
    from .models import loading

    return loading.resolve(model)


def _dtype(name: str) -> torch.dtype | None:
    from .models.export import DTYPES

    if name not in DTYPES:
        raise ValueError(f"--dtype is {name}; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


def _say(path: Path, facts: Facts) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    known = []
    if facts.num_steps is not None:
        known.append("1 step" if facts.num_steps == 1 else f"{facts.num_steps} steps")
    if facts.prediction_type is not None:
        known.append(f"predicts {facts.prediction_type}")
    size = sum(file.stat().st_size for file in files)
    print(f"wrote {path} ({size:,} bytes{': ' if known else ''}{', '.join(known)})")


def _note_alpha(lora: LoraFile, dialect: str) -> None:
    if dialect != "kohya":
        if any(pair.alpha != pair.rank for pair in lora.pairs.values()):
            print("note: alpha is in the metadata, which diffusers reads and ComfyUI does not: for ComfyUI use kohya")
    elif any(len(set(alphas)) > 1 for alphas in lora.alphas.values()):
        print(
            "note: its alphas differ; written as one, with the ups scaled, for diffusers reads no more in kohya files"
        )
