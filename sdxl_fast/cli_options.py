"""What several commands share: options, how they name a model, how they load it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from .inference import OneStepPipeline

_DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder, hub id or .safetensors file; the embedded pipeline if left out.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32 or bfloat16; by default what is fastest there.")]
BaseOption = Annotated[str | None, typer.Option(help="Pipeline that a --model which is a UNet or LoRA is for.")]
PresetOption = Annotated[str | None, typer.Option(help="Which published checkpoint it is, if its name does not say.")]
LoraOption = Annotated[list[str] | None, typer.Option(help="FILE or FILE=WEIGHT; may be repeated.")]
VaeOption = Annotated[Path | None, typer.Option(help="Folder of another VAE, such as an AutoencoderTiny.")]
SideOption = Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")]


def model_name(model: str | None) -> str:
    """What to call a model in a picture that others get: a file or folder without where it lies."""
    from .models.facts import place_name

    if model is None:
        return "embedded"
    return place_name(model) if Path(model).exists() else model


def parse_loras(values: list[str]) -> list[tuple[str, float]]:
    """(file, weight) of every `FILE` or `FILE=WEIGHT`. Raises ValueError for a weight that is no number."""
    found = []
    for value in values:
        file, equals, weight = value.rpartition("=")
        if not equals or Path(value).exists():
            file, weight = value, "1"
        try:
            found.append((file, float(weight)))
        except ValueError:
            raise ValueError(f"--lora {value}: {weight!r} is no number; give FILE or FILE=WEIGHT") from None
    return found


def precision(dtype: str | None) -> torch.dtype | None:
    """What `--dtype` says; None where it is left out. Raises ValueError for another."""
    import torch

    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype is {dtype}; allowed: float32, bfloat16")
    return None if dtype is None else getattr(torch, _DTYPES[dtype])


def load_pipeline(
    model: str | None, device: str | torch.device | None, dtype: str | None, **others: Any
) -> OneStepPipeline:
    """The pipeline; `others` are further arguments of `from_pretrained`."""
    wanted = precision(dtype)
    if model is not None and sys.stderr.isatty():  # seven gigabytes take a while
        print(f"loading {model} ...", file=sys.stderr)
    from .inference import OneStepPipeline

    return OneStepPipeline.from_pretrained(model, device=device, dtype=wanted, **others)
