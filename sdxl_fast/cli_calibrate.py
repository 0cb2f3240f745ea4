"""`sdxl-fast calibrate`: the scales that float8 needs, from a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    prompts: Annotated[Path, typer.Argument(help="A text file, one prompt a line; some dozens of your own.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    model: Annotated[str | None, typer.Option(help="Folder, hub id or .safetensors file.")] = None,
    base: Annotated[str | None, typer.Option(help="Pipeline that a --model which is a UNet or LoRA is for.")] = None,
    preset: Annotated[str | None, typer.Option(help="Which published checkpoint it is.")] = None,
    steps: Annotated[int | None, typer.Option(help="As it will be used; the model's own by default.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Relative error above which a layer stays as it is.")] = None,
    convolutions: Annotated[bool, typer.Option(help="Convolutions too, not only linear layers.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
) -> None:
    """Find the scales of `generate --quantization fp8`, and say what float8 does to the pictures."""
    if not prompts.is_file():
        raise ValueError(f"{prompts}: no such file")
    texts = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{prompts}: no prompts in it")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: scales are written to a .safetensors file")
    import torch

    from .inference import OneStepPipeline
    from .inference import calibrate as find
    from .inference.float8 import MAX_ERROR

    pipe = OneStepPipeline.from_pretrained(model, base=base, preset=preset, device=device, dtype=torch.bfloat16)
    bound = MAX_ERROR if max_error is None else max_error
    found = find(
        pipe,
        texts,
        max_error=bound,
        convolutions=convolutions,
        num_inference_steps=steps,
        height=height,
        width=width,
    )
    found.save(out)
    print(f"{found}\nwrote {out.resolve()}")
