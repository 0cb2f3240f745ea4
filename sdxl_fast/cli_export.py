"""`sdxl-fast export`: a model in the formats that others read. Every mistake is one line on stderr and exit code 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from .eval.export_card import CardText, Sample
    from .models.extract import Residual
    from .models.facts import Facts
    from .models.lora_file import LoraFile
    from .models.source import Model

export_app = typer.Typer(help="Write a model in the formats that others read.", no_args_is_help=True)

SDXL_PROMPTS = (
    "a photo of a red fox in deep snow, golden hour",
    "portrait of an old sailor, oil painting",
    "a glass greenhouse full of orchids, morning light",
    "a street market in the rain at night, neon signs",
)

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
License = Annotated[str | None, typer.Option(help="For the metadata, such as CreativeML Open RAIL++-M.")]
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
) -> None:
    """Write the UNet alone, as SDXL-Lightning's `_unet` files: diffusers' names, float16, no metadata."""
    from .models import export

    model = _open(source, base, steps, dtype, name, prediction_type, alpha)
    _say(export.export_unet(model, out, dtype=_dtype(dtype)), model.facts)
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
) -> None:
    """Write an all-in-one checkpoint, as ComfyUI and diffusers' `from_single_file` read it."""
    from .models import export

    stated = _stated(license, author, metadata)
    model = _open(source, base, steps, dtype, name, prediction_type, alpha)
    path = export.export_single_file(model, out, dtype=_dtype(dtype), metadata=metadata, stated=stated)
    _say(path, model.facts)
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
    license: Annotated[str | None, typer.Option(help="For the card, as the hub calls it: openrail++, mit, ...")] = None,
    base_model: Annotated[str | None, typer.Option(help="For the card: hub id of what it was made from.")] = None,
    samples: Annotated[int, typer.Option(help="Pictures to draw for the card; 0 draws none.")] = 4,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="For the pictures; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="To draw on: cpu, cuda, ...; a GPU if there is one.")] = None,
) -> None:
    """Write a diffusers folder with a model card and sample pictures."""
    from .eval.export_card import CardText
    from .models import export

    if samples < 0:
        raise ValueError(f"--samples is {samples}; allowed: 0 or more")
    model = _open(source, base, steps, dtype, name, prediction_type, alpha)
    if steps is not None:
        model = replace(model, extras={})
    text = CardText(title=title, license=license, base_model=base_model)

    def card(folder: Path) -> None:
        _write_card(folder, model, text, prompts or [], samples, device)

    folder = export.export_folder(model, out, dtype=_dtype(dtype), finish=card)
    _say(folder, model.facts)


@export_app.command("lora")
def export_lora(
    source: Source,
    format: Format,
    out: Out,
    alpha: Alpha = None,
    steps: Steps = None,
    dtype: Dtype = "float16",
    name: Name = None,
    prediction_type: Prediction = None,
    metadata: Metadata = True,
    license: License = None,
    author: Author = None,
) -> None:
    """Write a LoRA in another dialect, at the strength it has.

    Without metadata a kohya file is laid out as the published few-step LoRAs are.
    """
    from .models import export
    from .models.facts import Facts
    from .models.lora_file import read_lora_file
    from .models.source import open_model

    stated = _stated(license, author, metadata)
    found = _resolve(source)
    path = export.find_lora(found, steps)
    side = None if path == found else open_model(found).side
    lora = read_lora_file(path, alpha=alpha)
    facts = Facts.of(path, lora.metadata).but(name=name, num_steps=steps, prediction_type=prediction_type)
    written = export.export_lora(
        lora, out, dialect=format, facts=facts, dtype=_dtype(dtype), metadata=metadata, side=side, stated=stated
    )
    _say(written, facts)
    _note_alpha(lora, format)


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
        device=_device(device),
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


def _stated(license: str | None, author: str | None, metadata: bool) -> dict[str, str]:
    """ModelSpec's entries for what the person who exports says."""
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


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; allowed: cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, but torch sees no GPU here; use cpu")
    return device


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


def _write_card(folder: Path, model: Model, text: CardText, prompts: list[str], count: int, device: str | None) -> None:
    from .eval.export_card import write_export_card

    samples: list[Sample] = []
    if count and model.facts.num_steps is None:
        print("note: no sample pictures, for nothing says in how many steps it draws (--steps)")
    elif count:
        samples = _draw(folder, model, prompts, count, device)
    write_export_card(folder, model.facts, text, samples, side=model.side or 1024)


def _draw(folder: Path, model: Model, prompts: list[str], count: int, device: str | None) -> list[Any]:
    from .demo import PROMPTS
    from .errors import SdxlFastError
    from .eval.export_card import Sample
    from .inference import OneStepPipeline
    from .text import one_line

    shrunken = model.architecture.endswith("-shrunken")
    texts = (prompts or list(PROMPTS if shrunken else SDXL_PROMPTS)) * count
    texts, seeds = texts[:count], list(range(count))
    try:
        pipe = OneStepPipeline.from_pretrained(folder, device=device)
        images = [
            pipe(prompt, seed=seed, num_inference_steps=model.facts.num_steps).images[0]
            for prompt, seed in zip(texts, seeds, strict=True)
        ]
    except SdxlFastError as error:
        print(f"note: no sample pictures, for it could not be drawn with: {one_line(error, None)}")
        return []
    return [Sample(*sample) for sample in zip(texts, seeds, images, strict=True)]
