"""`sdxl-fast calibrate`: the scales that float8 needs, from a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import BaseOption, DeviceOption, ModelOption, PresetOption, SideOption, load_pipeline


def calibrate(
    prompts: Annotated[Path, typer.Argument(help="Prompts, one per line, or JSON lines; some dozens of your own.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    model: ModelOption = None,
    base: BaseOption = None,
    preset: PresetOption = None,
    steps: Annotated[int | None, typer.Option(help="As it will be used; the model's own by default.")] = None,
    height: SideOption = None,
    width: SideOption = None,
    max_error: Annotated[float | None, typer.Option(help="Relative error above which a layer stays as it is.")] = None,
    convolutions: Annotated[bool, typer.Option(help="Convolutions too, not only linear layers.")] = True,
    device: DeviceOption = None,
) -> None:
    """Find the scales of `generate --quantization fp8`, and say what float8 does to the pictures."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: scales are written to a .safetensors file")
    from .eval.prompt_set import read_prompts
    from .inference import calibrate as find
    from .inference.float8 import MAX_ERROR

    texts = read_prompts(prompts)
    pipe = load_pipeline(model, device, "bfloat16", base=base, preset=preset)
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
