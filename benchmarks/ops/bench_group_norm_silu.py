# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ``ops.group_norm_silu``: ``python -m benchmarks.ops.bench_group_norm_silu``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.suite import OpBench, Target
from sdxl_fast import ops
from sdxl_fast.reference import group_norm_silu as reference
from sdxl_fast.testing.cases import Case, sdxl_cases

UNET, VAE = "1x320x128x128-silu", "1x128x512x512-silu"
# What costs most in a one-step picture of 1024 px: the VAE's largest maps, then the U-Net's.
VALUABLE = (
    "1x256x1024x1024-silu",
    "1x128x1024x1024-silu",
    "1x512x512x512-silu",
    "1x320x128x128-silu-shift",
    "1x640x64x64-silu-shift",
    "1x1280x32x32-silu-shift",
)
# Skip connections: the map of a block on the way up, and the other beside it.
SKIPS = tuple(
    Case(
        f"1x{c}+{skip}x{side}x{side}-silu",
        (1, c + skip, side, side),
        {"num_groups": 32, "eps": 1e-5, "shift": False, "activation": "silu", "skip": skip},
    )
    for c, skip, side in ((640, 320, 128), (320, 320, 128), (1280, 640, 64), (640, 640, 64), (1280, 1280, 32))
)
_SDXL = {case.name: case for case in sdxl_cases("group_norm_silu")}


def stock(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_groups: int,
    eps: float,
    shift: torch.Tensor | None,
    activation: str,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a residual block of diffusers does: concatenate, add the time embedding, normalise, activate."""
    if skip is not None:
        x = torch.cat((x, skip), 1)
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = torch.nn.functional.group_norm(x, num_groups, weight, bias, eps)
    return torch.nn.functional.silu(y) if activation == "silu" else y


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case, with parameters around those of a fresh layer."""
    n, channels = case.shape[:2]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    skip = case.options.get("skip", 0)
    x, second = draw(*case.shape).to(dtype).split((channels - skip, skip), 1)
    return {
        "x": x.contiguous(),
        "weight": (1 + 0.5 * draw(channels)).to(dtype),
        "bias": (0.5 * draw(channels)).to(dtype),
        "num_groups": case.options["num_groups"],
        "eps": case.options["eps"],
        "shift": draw(n, channels).to(dtype) if case.options["shift"] else None,
        "activation": case.options["activation"],
        "skip": second.contiguous() if skip else None,
    }


def rows(case: Case) -> dict[str, int]:
    """Over how many rows the gradients of the parameters sum."""
    n, _, h, w = case.shape
    return {"dweight": n * h * w, "dbias": n * h * w, "dshift": h * w}


BENCH = OpBench(
    subject=Subject("group_norm_silu", ops.group_norm_silu, ("y",), ("x", "weight", "bias", "shift", "skip")),
    reference=reference,
    stock=stock,
    make=make,
    cpu_cases=(_SDXL[UNET], _SDXL[VAE], *SKIPS[:2]),
    gpu_cases=(*(_SDXL[name] for name in VALUABLE), *SKIPS),
    gpu_rest=tuple(case for name, case in _SDXL.items() if name not in VALUABLE),
    images=True,
    rows=rows,
    targets=tuple(
        Target(case, dtype, speedup, copy_share=0.6)
        for case in (UNET, VAE)
        for dtype, speedup in (("float32", 1.3), ("bfloat16", 2.0))
    ),
)


def test_group_norm_silu(benchmark: Any, entry: Any) -> None:
    """For ``pytest benchmarks``: one contestant on one case, after its gate."""
    entry.run(benchmark)


if __name__ == "__main__":
    from benchmarks.command import main

    main(BENCH, __spec__.name)
