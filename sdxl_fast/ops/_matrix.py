# SPDX-License-Identifier: Apache-2.0
"""The ``library`` backend of the linear layers: the matrix products behind PyTorch's own functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sdxl_fast.constraints import Condition, Dtype, Rule, Values, dtype_name
from sdxl_fast.dispatch import Backend, Kernels, any_backend
from sdxl_fast.ops import _backends
from sdxl_fast.ops.geglu import _OP as GEGLU
from sdxl_fast.reference import linear as reference
from sdxl_fast.reference import linear_geglu as gated
from sdxl_fast.reference._common import without_autocast
from sdxl_fast.reference.linear import FLOAT8, FLOAT8_OUTPUT, Gradients, MaybeTensor, output_dtype


@dataclass(frozen=True)
class LikeOutput:
    """``arg`` has the dtype of the result: x's, or bfloat16 for float8; a ``parameter`` may have the weight's too."""

    arg: str
    parameter: bool = False

    def check(self, values: Values) -> str | None:
        value, dtype = values[self.arg], output_dtype(values["x"].dtype)
        if value is None or value.dtype == dtype:
            return None
        if self.parameter and value.dtype == values["weight"].dtype != FLOAT8:
            return None
        return f"{self.describe()} = {dtype_name(dtype)}, got {dtype_name(value.dtype)}; convert it"

    def describe(self) -> str:
        return f"{self.arg} must have the dtype of the result" + (" or of weight" if self.parameter else "")


def _float8_gpu(values: Values) -> bool:
    x = values["x"]
    return x.dtype != FLOAT8 or x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 9)


def _float8_library(values: Values) -> bool:
    x, weight = values["x"], values["weight"]
    return x.dtype != FLOAT8 or x.device.type != "cuda" or (weight.shape[0] % 16 == x.shape[-1] % 16 == 0 < x.numel())


FLOAT8_GPU: Rule = Condition("float8 products need a GPU of compute capability 8.9 or newer", _float8_gpu)
# On a CPU the reference multiplies them, which asks for nothing.
FLOAT8_LIBRARY: Rule = Condition("float8 products need rows, and numbers of features divisible by 16", _float8_library)


def triton(op: str, backward: Callable[..., Any]) -> Backend:
    """The Triton forward of ``op``, also of float8 operands, beside the library's backward."""
    backend = _backends.triton(op, "x")
    rules = (_backends.TritonDevice("x"), Dtype("x", (*_backends.GPU_FLOATS, FLOAT8)), FLOAT8_GPU)
    return Backend(backend.name, lambda: (backend.load()[0], backward), rules)


def linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    scale_x: MaybeTensor,
    scale_w: MaybeTensor,
) -> torch.Tensor:
    if scale_x is not None and scale_w is not None:
        if x.device.type != "cuda":
            return reference.fwd(x, weight, bias, residual, scale_x, scale_w)
        rows: torch.Tensor = torch._scaled_mm(
            x.reshape(-1, x.shape[-1]), weight.t(), scale_x, scale_w, bias=bias, out_dtype=FLOAT8_OUTPUT
        )
        y = rows.view(*x.shape[:-1], weight.shape[0])
    else:
        with without_autocast(x):
            y = F.linear(x, weight, bias)
    return y if residual is None else y.add_(residual)


def linear_bwd(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool]) -> Gradients:
    rows = dy.reshape(-1, dy.shape[-1])
    with without_autocast(x):
        dx = dy @ weight if needs[0] else None
        dweight = rows.t() @ x.reshape(rows.shape[0], x.shape[-1]) if needs[1] else None
    return dx, dweight, rows.sum(0) if needs[2] else None


def _gate(projected: torch.Tensor, approximate: str, scale_y: MaybeTensor = None) -> Kernels:
    """Returns the fastest kernels of ``geglu`` for this, whatever backend is forced for what is made of them."""
    with any_backend():
        return GEGLU.plan((projected, approximate, scale_y))


def linear_geglu_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: MaybeTensor,
    approximate: str,
    scale_x: MaybeTensor = None,
    scale_w: MaybeTensor = None,
    scale_y: MaybeTensor = None,
) -> torch.Tensor:
    if scale_x is not None and x.device.type != "cuda":
        return gated.fwd(x, weight, bias, approximate, scale_x, scale_w, scale_y)
    projected = linear_fwd(x, weight, bias, None, scale_x, scale_w)
    y: torch.Tensor = _gate(projected, approximate, scale_y).fwd(projected, approximate, scale_y)
    return y


def linear_geglu_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, approximate: str, needs: Sequence[bool]
) -> Gradients:
    with without_autocast(x):
        projected = F.linear(x, weight, bias)
    dprojected = _gate(projected, approximate).bwd(dy, projected, approximate)
    return linear_bwd(dprojected, x, weight, needs)
