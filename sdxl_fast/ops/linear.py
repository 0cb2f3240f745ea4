# SPDX-License-Identifier: Apache-2.0
"""``linear``: x W^T with bias and residual, also of float8 operands with static scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_fast.constraints import DeviceLike, Dtype, DtypeLike, IsTensor, Ndim, ShapeFrom, Sizes, Values
from sdxl_fast.dispatch import Backend
from sdxl_fast.op import Args, FusedOp, Incoming, MaybeTensor, reference_gradients
from sdxl_fast.ops import _backends, _float8, _hopper, _matrix
from sdxl_fast.reference import linear as reference
from sdxl_fast.reference._common import autocast
from sdxl_fast.reference.linear import FLOAT8, output_dtype


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    scale_x: torch.Tensor | None = None,
    scale_w: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``x @ weight.T + bias + residual``, accumulated in float32.

    Differentiable twice in x, weight, bias and residual; of float8 operands not at all.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64 (made contiguous), or float8_e4m3fn.
        weight: [N, K] of x's dtype; or float32, which is then rounded to x's dtype as autocast does.
        bias: [N] of the weight's dtype, bfloat16 beside float8, or None.
        residual: [..., N] of the result's dtype, or None.
        scale_x, scale_w: for float8 the factors of x and weight, float32 of one element on x's device. They are fixed
            beforehand: no magnitude is looked for here.

    Returns:
        [..., N], contiguous, in x's dtype, or in autocast's where that is on; bfloat16 for float8.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Micikevicius et al. 2022 (arXiv:2209.05433) for float8 with scales.
    """
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    y: torch.Tensor = _OP(x, weight, bias, residual, scale_x, scale_w)
    return y


def _output_shape(values: Values) -> tuple[int, ...]:
    return *values["x"].shape[:-1], values["weight"].shape[0]


class _Linear(FusedOp):
    name = "linear"
    parameters = ("x", "weight", "bias", "residual", "scale_x", "scale_w")
    fwd_schema = "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale_x, Tensor? scale_w) -> Tensor"
    bwd_schema = "(Tensor dy, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor, Tensor)"
    rules = (
        *(IsTensor(arg) for arg in ("x", "weight")),
        *(IsTensor(arg, optional=True) for arg in ("bias", "residual", "scale_x", "scale_w")),
        Dtype("x", (*_backends.FLOATS, FLOAT8)),
        Ndim("x", 1, "[..., K]", at_least=True),
        Sizes("weight", "[N, K]", lambda v: (None, v["x"].shape[-1])),
        ShapeFrom("bias", "weight", (0,), "[N]"),
        Sizes("residual", "[..., N]", _output_shape),
        *_float8.operand_rules("x", "weight", "bias", "residual"),
        DtypeLike("weight", "x", also=(torch.float32,)),
        _matrix.LikeOutput("bias", parameter=True),
        _matrix.LikeOutput("residual"),
        *(DeviceLike(arg, "x") for arg in ("weight", "bias", "residual")),
    )
    backends = (
        _hopper.backend(_hopper.linear, _matrix.linear_bwd, _hopper.FEATURES, float8=True),
        _matrix.triton("linear", _matrix.linear_bwd),
        Backend(
            "library", lambda: (_matrix.linear_fwd, _matrix.linear_bwd), (_matrix.FLOAT8_GPU, _matrix.FLOAT8_LIBRARY)
        ),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x, weight, bias, residual, scale_x, scale_w = args
        # As autocast does with float32 parameters: their gradients too are what the 16-bit product gives.
        dtype = output_dtype(x.dtype)
        return (
            x.contiguous(),
            weight.to(x.dtype),
            None if bias is None else bias.to(dtype).contiguous(),
            None if residual is None else residual.contiguous(),
            scale_x,
            scale_w,
        )

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return args[:3]

    def gradients(
        self,
        dy: Incoming,
        saved: Sequence[MaybeTensor],
        scalars: Args,
        needs: Sequence[bool],
        bwd: Callable[..., Any],
    ) -> tuple[MaybeTensor, ...]:
        *found, _ = super().gradients(dy, saved, scalars, needs, bwd)[:4]
        return *found, dy if needs[3] else None, None, None

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        return dy.contiguous(), saved[0], saved[1], tuple(needs[:3])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return *found, None, None, None

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        if not any(needs[:3]):
            return (None,) * 6

        def forward(x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor) -> torch.Tensor:
            return reference.fwd(x, weight, bias, None, None, None)

        return *reference_gradients(forward, saved[:3], dy, needs[:3]), None, None, None

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, x, weight, _ = bwd_args
        return x, weight, None, None, None, None

    def fake_fwd(self, args: Args) -> Any:
        x, weight, *_ = args
        return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=output_dtype(x.dtype))

    def fake_bwd(self, bwd_args: Args) -> Any:
        dy, x, weight, needs = bwd_args
        shapes = (x.shape, weight.shape, weight.shape[:1])
        return tuple(dy.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


_OP = _Linear(linear)
