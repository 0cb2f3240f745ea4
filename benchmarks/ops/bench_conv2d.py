# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.conv2d``: ``python -m benchmarks.ops.bench_conv2d``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import FORWARD, OpBench, Target
from sdxl_fast import ops
from sdxl_fast.reference import conv2d as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

_SDXL = {case.name: case for case in sdxl_cases("conv2d")}
UNET = "1x320x128x128-to320-k3-s1-p1-residual"
# Most of the VAE's work is on its large maps, most of the U-Net's on its small ones.
VALUABLE = (
    "1x256x512x512-to256-k3-s1-p1-residual",
    "1x512x256x256-to512-k3-s1-p1-residual",
    "1x1280x32x32-to1280-k3-s1-p1-residual",
    "1x640x64x64-to640-k3-s1-p1-residual",
    UNET,
)


def stock(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: int,
    padding: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The convolution and the addition of diffusers' residual blocks."""
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding)
    return y if residual is None else y + residual


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case, the parameters as a fresh layer has them."""
    options, (n, c_in, h, w) = case.options, case.shape
    k, c_out = options["kernel_size"], options["out_channels"]
    p, q = (reference.output_size(size, k, options["stride"], options["padding"]) for size in (h, w))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    return {
        "x": draw(*case.shape).to(dtype),
        "weight": (draw(c_out, c_in, k, k) / (k * k * c_in) ** 0.5).to(dtype),
        "bias": draw(c_out).to(dtype),
        "stride": options["stride"],
        "padding": options["padding"],
        "residual": draw(n, c_out, p, q).to(dtype) if options["residual"] else None,
    }


BENCH = OpBench(
    subject=Subject("conv2d", ops.conv2d, ("y",), ("x", "weight", "bias", "residual")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(_SDXL[UNET],),
    gpu_cases=tuple(_SDXL[name] for name in VALUABLE),
    gpu_rest=tuple(case for name, case in _SDXL.items() if name not in VALUABLE),
    modes=(FORWARD,),
    images=True,
    rows=lambda case: {"y": case.shape[1] * case.options["kernel_size"] ** 2},
    cost=lambda case: dict(case.options),
    targets=tuple(Target(UNET, dtype, 0.95, backend="library") for dtype in ("float32", "bfloat16")),
)


def test_conv2d(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
