# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.upsample_conv2d``: ``python -m benchmarks.ops.bench_upsample_conv2d``.

As in inference: the phases are prepared, and only the forward is timed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gate import Subject, Values
from benchmarks.suite import FORWARD, OpBench, Target
from sdxl_fast import ops
from sdxl_fast.ops.upsample_conv2d import phase_weights
from sdxl_fast.reference import upsample_conv2d as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

_SDXL = {case.name: case for case in sdxl_cases("upsample_conv2d")}
# Both of the U-Net, and the first of the VAE: the others take a CPU too long.
CPU = ("1x640x64x64-to640", "1x1280x32x32-to1280", "1x512x128x128-to512")


def stock(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, phases: torch.Tensor | None = None
) -> torch.Tensor:
    """What diffusers' ``Upsample2D`` does."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case, the weight as a fresh layer has it."""
    c_in, c_out = case.shape[1], case.options["out_channels"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    weight = (draw(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5).to(dtype)
    return {
        "x": draw(*case.shape).to(dtype),
        "weight": weight,
        "bias": draw(c_out).to(dtype),
        "phases": phase_weights(weight),
    }


BENCH = OpBench(
    subject=Subject("upsample_conv2d", ops.upsample_conv2d, ("y",), ("x", "weight", "bias")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=tuple(_SDXL[name] for name in CPU),
    gpu_cases=tuple(_SDXL.values()),
    modes=(FORWARD,),
    images=True,
    ordered=("phases",),
    rows=lambda case: {"y": 9 * case.shape[1]},
    cost=lambda case: {"out_channels": case.options["out_channels"]},
    targets=tuple(Target(name, dtype, 1.5, backend="library") for name in CPU for dtype in ("float32", "bfloat16")),
)


def test_upsample_conv2d(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
