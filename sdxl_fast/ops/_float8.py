# SPDX-License-Identifier: Apache-2.0
"""What the ops share that write float8_e4m3fn themselves, so that the product they feed needs no pass to round in."""

from __future__ import annotations

from functools import partial

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


NOT_IN_CUDA: Rule = Condition(
    "the CUDA kernel writes x's dtype only (scale_y is None)", lambda values: values["scale_y"] is None
)
