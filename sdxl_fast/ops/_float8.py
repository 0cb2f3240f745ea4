# SPDX-License-Identifier: Apache-2.0
"""What the ops share that write float8_e4m3fn themselves, so that the product they feed needs no pass to round in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sdxl_fast.constraints import Condition, DeviceLike, Dtype, IsTensor, Rule, Values
from sdxl_fast.reference._common import FLOAT8


def rules(*inputs: str) -> tuple[Rule, ...]:
    """The rules of the optional argument ``scale_y`` of an op with these differentiable inputs."""
    return (
        IsTensor("scale_y", optional=True),
        Dtype("scale_y", (torch.float32,)),
        Condition("scale_y must have one element", lambda v: v["scale_y"] is None or v["scale_y"].numel() == 1),
        DeviceLike("scale_y", "x"),
        Condition(
            "a float8 result (scale_y) has no derivative; call under torch.no_grad()",
            partial(_needs_no_gradient, (*inputs, "scale_y")),
        ),
    )


def _needs_no_gradient(inputs: tuple[str, ...], values: Values) -> bool:
    if values["scale_y"] is None or not torch.is_grad_enabled():
        return True
    return not any(t is not None and t.requires_grad for t in (values[name] for name in inputs))


def dtype_of(x: torch.Tensor, scale_y: torch.Tensor | None) -> torch.dtype:
    """Returns the dtype of the op's result."""
    return x.dtype if scale_y is None else FLOAT8


def kernel(library: Any, op: str, device: str) -> Callable[..., int] | None:
    """Returns the C forward of ``op`` that writes float8, whose ``scale_y`` stands before ``y``; None on a CPU.

    There the result is rounded by a pass of its own: float8 on a CPU is for checking, its products are the reference's.
    """
    found: Callable[..., int] | None = getattr(library, f"{op}_e4m3_fwd_cuda") if device == "cuda" else None
    return found


FROM_BFLOAT16: Rule = Condition(
    "the CUDA kernel writes float8 (scale_y) for bfloat16 x only",
    lambda values: values["scale_y"] is None or values["x"].dtype == torch.bfloat16,
)
