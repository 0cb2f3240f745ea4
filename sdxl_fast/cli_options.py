"""What several commands share: options, how they name a model, how they load it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .inference import OneStepPipeline

_DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder, hub id or .safetensors file; the embedded pipeline if left out.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32 or bfloat16; by default what is fastest there.")]


def model_name(model: str | None) -> str:
    """What to call a model in a picture that others get: a file or folder without where it lies."""
    if model is None:
        return "embedded"
    return Path(model).resolve().name if Path(model).exists() else model


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


def load_pipeline(model: str | None, device: str | None, dtype: str | None, **others: Any) -> OneStepPipeline:
    """The pipeline; `others` are further arguments of `from_pretrained`."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype is {dtype}; allowed: float32, bfloat16")
    if model is not None and sys.stderr.isatty():  # seven gigabytes take a while
        print(f"loading {model} ...", file=sys.stderr)
    import torch

    from .inference import OneStepPipeline

    precision = None if dtype is None else getattr(torch, _DTYPES[dtype])
    return OneStepPipeline.from_pretrained(model, device=device, dtype=precision, **others)
