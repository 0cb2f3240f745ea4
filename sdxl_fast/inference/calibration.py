"""Putting a pipeline's UNet into float8: `calibrate` on prompts, or scales that were found before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import float8
from .float8 import MAX_ERROR, Scales
from .packing import Conv
from .runner import Runner, runner_of


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    max_error: float = MAX_ERROR,
    convolutions: bool = True,
    **arguments: Any,
) -> Scales:
    """Put the UNet's linear layers and its residual blocks' convolutions into float8, with scales these prompts need.

    Every prompt is drawn three times: for the largest input of every layer, for the error that each then makes, and,
    with those within `max_error` in float8, for the pictures, which are compared with the first ones.

    Args:
        pipe: a `OneStepPipeline`, or a diffusers pipeline that `optimize` was applied to, in bfloat16.
        prompts: what it is used for; some dozens. The scales cover what these make of the layers' inputs, so numbers
            beyond that are cut off.
        seed: of the first picture; the others count up.
        max_error: relative L2 error of a layer's result above which it stays in bfloat16.
        convolutions: whether they are put into float8 too; without, only linear layers are.
        arguments: of the pipeline's call, such as `num_inference_steps`, height and width.

    Returns:
        the scales, which say what was excluded and how close the pictures are; `save` keeps them.

    Raises:
        ValueError: no prompts, a pipeline that is not packed or not in bfloat16, or inputs that are not finite.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list with at least one text")
    runner = _float8_runner(pipe)
    runner.quantise(None)
    products = [p for p in runner.ready().float8_products() if float8.suits(p)]  # type: ignore[union-attr]
    products = [p for p in products if convolutions or not isinstance(p, Conv)]

    def draw() -> Tensor:
        return torch.cat([_picture(pipe, text, seed + k, arguments) for k, text in enumerate(prompts)])

    magnitudes = float8.Magnitudes()
    with _uncaptured(runner), float8.observing(products, magnitudes):
        wanted = draw()
    inputs = magnitudes.scales()
    errors = float8.Errors(inputs)
    with _uncaptured(runner), float8.observing(products, errors):
        draw()
    relative = errors.relative()
    excluded = tuple(name for name, error in relative.items() if error > max_error)
    found = Scales(float8.fingerprint(products), inputs, relative, excluded, len(prompts))
    runner.quantise(found)
    found.psnr = float8.psnr(draw(), wanted)
    return found


def use_scales(pipe: Any, scales: Scales | str | Path | None) -> Scales | None:
    """Put the UNet into float8 with scales found before, from memory or a file; None puts it back into bfloat16.

    LoRAs go on top: with one merged already, the weights are not those that were calibrated.

    Returns:
        the scales.

    Raises:
        ValueError: a pipeline that is not packed or not in bfloat16.
        ModelError: a broken file, or scales of another model.
    """
    runner = _float8_runner(pipe)
    found = Scales.load(scales) if isinstance(scales, str | Path) else scales
    if found is not None:
        runner.ready().check_scales(found)  # type: ignore[union-attr]
    runner.quantise(found)
    return found


def check_quantization(quantization: str | None, scales: Any) -> None:
    """Raises ValueError unless it is None, or "fp8" with scales."""
    if quantization not in (None, "fp8"):
        raise ValueError(f"quantization is {quantization!r}; allowed: None, 'fp8'")
    if quantization == "fp8" and scales is None:
        raise ValueError(
            "quantization='fp8' needs scales: sdxl_fast.inference.calibrate(pipe, prompts) makes them; give them, or "
            "the file they were saved in, as scales="
        )
    if quantization is None and scales is not None:
        raise ValueError("scales are those of quantization='fp8'; give both, or neither")


def _float8_runner(pipe: Any) -> Runner[Any]:
    """The runner of a pipeline's UNet."""
    runner = runner_of(getattr(pipe, "unet", None))
    if runner is None:
        raise ValueError(f"float8 needs a packed UNet, which this {type(pipe).__name__} has none: optimize it first")
    program = runner.ready()
    if program is None:
        raise ValueError(f"float8 needs a packed UNet; this one runs by its modules: {runner.reason}")
    if program.dtype != torch.bfloat16:
        raise ValueError(
            f"float8 products give bfloat16: load the pipeline with dtype=torch.bfloat16, not {program.dtype}"
        )
    return runner


def _picture(pipe: Any, prompt: str, seed: int, arguments: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise wherever it runs
    given = {"guidance_scale": 0.0, "output_type": "pt", **arguments}
    picture: Tensor = pipe(prompt, generator=generator, **given).images.cpu()
    return picture


@contextmanager
def _uncaptured(runner: Runner[Any]) -> Iterator[None]:
    """Without CUDA graphs, in which nobody can look at what goes through."""
    graphs, runner.graphs = runner.graphs, None
    try:
        yield
    finally:
        runner.graphs = graphs
