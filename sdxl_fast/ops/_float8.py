# SPDX-License-Identifier: Apache-2.0
"""What the ops share that read or write float8_e4m3fn: products of it, and what makes their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdxl_fast.constraints import Condition, DeviceLike, Dtype, IsTensor, Rule, Values
from sdxl_fast.ops._backends import recorded
from sdxl_fast.reference._common import FLOAT8


def is_float8(values: Values) -> bool:
    """Whether the product is one of float8 operands."""
    return bool(values["x"].dtype == FLOAT8)


def operand_rules(*inputs: str) -> tuple[Rule, ...]:
    """The rules of ``scale_x`` and ``scale_w`` of a product of x and weight with these differentiable inputs."""
    scales = ("scale_x", "scale_w")
    return (
        Condition(
            "scale_x and scale_w must be given for a float8_e4m3fn x, and only then",
            lambda v: all((v[scale] is not None) == is_float8(v) for scale in scales),
        ),
        *(Dtype(scale, (torch.float32,)) for scale in scales),
        *(
            Condition(f"{scale} must have one element", lambda v, s=scale: v[s] is None or v[s].numel() == 1)  # type: ignore[misc]
            for scale in scales
        ),
        *(DeviceLike(scale, "x") for scale in scales),
        Condition(
            "weight must be float8_e4m3fn beside a float8_e4m3fn x",
            lambda v: (v["weight"].dtype == FLOAT8) == is_float8(v),
        ),
        Condition(
            "float8 products have no derivative; call under torch.no_grad()",
            lambda v: not is_float8(v) or not recorded(v[name] for name in inputs),
        ),
    )


def rules(*inputs: str) -> tuple[Rule, ...]:
    """The rules of the optional argument ``scale_y`` of an op with these differentiable inputs."""
    return (
        IsTensor("scale_y", optional=True),
        Dtype("scale_y", (torch.float32,)),
        Condition("scale_y must have one element", lambda v: v["scale_y"] is None or v["scale_y"].numel() == 1),
        DeviceLike("scale_y", "x"),
        Condition(
            "a float8 result (scale_y) has no derivative; call under torch.no_grad()",
            lambda v: v["scale_y"] is None or not recorded(v[name] for name in (*inputs, "scale_y")),
        ),
    )


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
