# SPDX-License-Identifier: Apache-2.0
"""``linear_geglu``: value * GELU(gate) of a linear layer, whose own result is never stored; also in float8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdxl_fast.constraints import Condition, DeviceLike, Dtype, DtypeLike, IsTensor, Ndim, OneOf, ShapeFrom, Sizes
from sdxl_fast.dispatch import Backend
from sdxl_fast.op import Args, FusedOp, MaybeTensor, reference_gradients
from sdxl_fast.ops import _backends, _float8, _hopper, _matrix
from sdxl_fast.reference import linear_geglu as reference
from sdxl_fast.reference._common import autocast
from sdxl_fast.reference.geglu import APPROXIMATIONS
from sdxl_fast.reference.linear import FLOAT8, output_dtype


def linear_geglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximate: str = "none",
    scale_x: torch.Tensor | None = None,
    scale_w: torch.Tensor | None = None,
    scale_y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``value * GELU(gate)`` with ``value, gate = (x @ weight.T + bias).chunk(2, -1)``.

    Differentiable twice in x, weight and bias, but not with float8 in or out. Only those are saved: the backward
    projects x again.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64 (made contiguous), or float8_e4m3fn.
        weight: [2C, K], the rows of the value before those of the gate, of x's dtype; or float32, which is then rounded
            to x's dtype as autocast does.
        bias: [2C] of the weight's dtype, bfloat16 beside float8, or None.
        approximate: ``"none"`` for the erf form, which SDXL uses, or ``"tanh"``.
        scale_x, scale_w: for float8 the factors of x and weight, float32 of one element on x's device, as in
            ``linear``.
        scale_y: float32 of one element on x's device, or None. With it the result is float8_e4m3fn, as ``geglu`` with
            ``scale_y`` rounds it.

    Returns:
        [..., C], contiguous, in x's dtype, or in autocast's where that is on; bfloat16 for float8; float8 with scale_y.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Shazeer 2020 (arXiv:2002.05202); order of the halves as in diffusers. Micikevicius et al. 2022
    (arXiv:2209.05433) for float8 with scales.
    """
    x, weight, bias = autocast(x, weight, bias)
    y: torch.Tensor = _OP(x, weight, bias, approximate, scale_x, scale_w, scale_y)
    return y


class _LinearGeglu(FusedOp):
    name = "linear_geglu"
    parameters = ("x", "weight", "bias", "approximate", "scale_x", "scale_w", "scale_y")
    fwd_schema = (
        "(Tensor x, Tensor weight, Tensor? bias, str approximate, Tensor? scale_x, Tensor? scale_w, Tensor? scale_y) "
        "-> Tensor"
    )
    bwd_schema = (
        "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, str approximate, bool[] needs) -> (Tensor, Tensor, Tensor)"
    )
    rules = (
        *(IsTensor(arg) for arg in ("x", "weight")),
        *(IsTensor(arg, optional=True) for arg in ("bias", "scale_x", "scale_w")),
        Dtype("x", (*_backends.FLOATS, FLOAT8)),
        Ndim("x", 1, "[..., K]", at_least=True),
        Sizes("weight", "[2C, K]", lambda v: (None, v["x"].shape[-1])),
        Condition("weight must have an even number of rows, value and gate", lambda v: v["weight"].shape[0] % 2 == 0),
        ShapeFrom("bias", "weight", (0,), "[2C]"),
        *_float8.operand_rules("x", "weight", "bias"),
        *_float8.rules("x", "weight", "bias"),
        DtypeLike("weight", "x", also=(torch.float32,)),
        _matrix.LikeOutput("bias", parameter=True),
        *(DeviceLike(arg, "x") for arg in ("weight", "bias")),
        OneOf("approximate", APPROXIMATIONS),
    )
    backends = (
        _hopper.backend(_hopper.linear_geglu, _matrix.linear_geglu_bwd, _hopper.GATED_FEATURES, float8=True),
        _matrix.triton("linear_geglu", _matrix.linear_geglu_bwd),
        Backend(
            "library",
            lambda: (_matrix.linear_geglu_fwd, _matrix.linear_geglu_bwd),
            (_matrix.FLOAT8_GPU, _matrix.FLOAT8_LIBRARY),
        ),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x, weight, bias, approximate, *scales = args
        # As autocast does with float32 parameters: their gradients too are what the 16-bit product gives.
        bias = None if bias is None else bias.to(output_dtype(x.dtype)).contiguous()
        return x.contiguous(), weight.to(x.dtype), bias, approximate, *scales

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return args[:3]

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        return dy.contiguous(), *saved, scalars[3], tuple(needs[:3])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return *found, None, None, None, None

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        def forward(x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor) -> torch.Tensor:
            return reference.fwd(x, weight, bias, scalars[3])

        return *reference_gradients(forward, saved, dy, needs[:3]), None, None, None, None

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, x, weight, bias, approximate, _ = bwd_args
        return x, weight, bias, approximate, None, None, None

    def fake_fwd(self, args: Args) -> Any:
        x, weight, *_ = args
        dtype = output_dtype(x.dtype) if args[6] is None else FLOAT8
        return x.new_empty((*x.shape[:-1], weight.shape[0] // 2), dtype=dtype)

    def fake_bwd(self, bwd_args: Args) -> Any:
        dy, x, weight, _, _, needs = bwd_args
        shapes = (x.shape, weight.shape, weight.shape[:1])
        return tuple(dy.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


_OP = _LinearGeglu(linear_geglu)
