# SPDX-License-Identifier: Apache-2.0
"""``conv2d``: a 3x3 or 1x1 convolution with bias and residual, also of float8 operands with static scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_fast.constraints import (
    Condition,
    DeviceLike,
    Dtype,
    DtypeLike,
    Integer,
    IsTensor,
    Ndim,
    ShapeFrom,
    Sizes,
    Values,
)
from sdxl_fast.op import Args, FusedOp, Incoming, MaybeTensor, dense, reference_gradients
from sdxl_fast.ops import _backends, _convolution, _float8, _hopper, _matrix
from sdxl_fast.reference import conv2d as reference
from sdxl_fast.reference._common import autocast
from sdxl_fast.reference.conv2d import output_shape
from sdxl_fast.reference.linear import FLOAT8, output_dtype
from sdxl_fast.reference.upsample_conv2d import memory_format


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | None = None,
    residual: torch.Tensor | None = None,
    scale_x: torch.Tensor | None = None,
    scale_w: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``torch.nn.functional.conv2d(x, weight, bias, stride, padding) + residual``, accumulated in float32.

    Differentiable twice in x, weight, bias and residual; of float8 operands not at all.

    Args:
        x: [N, C_in, H, W], float32, bfloat16, float16, float64 or float8_e4m3fn, contiguous or channels_last (others
            are copied).
        weight: [C_out, C_in, k, k] with k 1 or 3, of x's dtype; or float32, which is then rounded to x's dtype as
            autocast does.
        bias: [C_out] of the weight's dtype, bfloat16 beside float8, or None.
        stride: 1 or 2, in both directions.
        padding: zeros around the map, 0 or 1; by default what keeps its size, (k - 1) / 2.
        residual: [N, C_out, P, Q] of the result's dtype, or None.
        scale_x, scale_w: for float8 the factors of x and weight, float32 of one element on x's device, as in
            ``linear``.

    Returns:
        [N, C_out, P, Q] in x's dtype, or in autocast's where that is on, bfloat16 for float8; memory format of x.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Chetlur et al. 2014 (arXiv:1410.0759); Micikevicius et al. 2022 (arXiv:2209.05433) for float8 with scales.
    """
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    y: torch.Tensor = _OP(x, weight, bias, residual, stride, padding, scale_x, scale_w)
    return y


def _resolved(padding: int | None, weight: torch.Tensor) -> int:
    return (weight.shape[-1] - 1) // 2 if padding is None else padding


def _weight_sizes(values: Values) -> tuple[int | None, ...]:
    weight = values["weight"]
    size = 3 if weight.ndim != 4 or weight.shape[-1] != 1 else 1
    return None, values["x"].shape[1], size, size


def _residual_sizes(values: Values) -> tuple[int, ...]:
    weight = values["weight"]
    return output_shape(values["x"], weight, values["stride"], _resolved(values["padding"], weight))


class _Conv2d(FusedOp):
    name = "conv2d"
    parameters = ("x", "weight", "bias", "residual", "stride", "padding", "scale_x", "scale_w")
    fwd_schema = (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int stride, int? padding, Tensor? scale_x, "
        "Tensor? scale_w) -> Tensor"
    )
    bwd_schema = (
        "(Tensor dy, Tensor x, Tensor weight, int stride, int padding, bool[] needs) -> (Tensor, Tensor, Tensor)"
    )
    rules = (
        *(IsTensor(arg) for arg in ("x", "weight")),
        *(IsTensor(arg, optional=True) for arg in ("bias", "residual", "scale_x", "scale_w")),
        Dtype("x", (*_backends.FLOATS, FLOAT8)),
        Ndim("x", 4, "[N, C_in, H, W]"),
        Sizes("x", "[N, C_in, H, W] with something in every image", lambda v: (v["x"].shape[0], None, None, None)),
        Sizes("weight", "[C_out, C_in, k, k] with k 1 or 3", _weight_sizes),
        ShapeFrom("bias", "weight", (0,), "[C_out]"),
        Integer("stride", 1, 3),
        Integer("padding", 0, 2, optional=True),
        Condition(
            "x must be at least as large as the kernel, padding counted",
            lambda v: min(_residual_sizes(v)) > 0 or v["x"].shape[0] == 0,
        ),
        Sizes("residual", "[N, C_out, P, Q]", _residual_sizes),
        *_float8.operand_rules("x", "weight", "bias", "residual"),
        DtypeLike("weight", "x", also=(torch.float32,)),
        _matrix.LikeOutput("bias", parameter=True),
        _matrix.LikeOutput("residual"),
        *(DeviceLike(arg, "x") for arg in ("weight", "bias", "residual")),
    )
    backends = (
        _hopper.backend(_hopper.conv2d, _convolution.conv2d_bwd, _hopper.CHANNELS, _hopper.UNIT_STRIDE, float8=True),
        _matrix.triton("conv2d", _convolution.conv2d_bwd),
        _convolution.conv2d(),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x, weight, bias, residual, stride, padding, *scales = args
        x = dense(x)
        # As autocast does with float32 parameters: their gradients too are what the 16-bit product gives.
        return (
            x,
            dense(weight.to(x.dtype)),
            None if bias is None else bias.to(output_dtype(x.dtype)).contiguous(),
            None if residual is None else residual.contiguous(memory_format=memory_format(x)),
            stride,
            _resolved(padding, weight),
            *scales,
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
        found = super().gradients(dy, saved, scalars, needs, bwd)
        return *found[:3], dy if needs[3] else None, *(None,) * 4

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        x, weight, _ = saved
        if x is None or weight is None:
            raise RuntimeError("the graph has lost its tensors")
        dy = dy.contiguous(memory_format=memory_format(x))
        return dy, x, weight, scalars[4], _resolved(scalars[5], weight), tuple(needs[:3])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return *found, *(None,) * 5

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        if not any(needs[:3]):
            return (None,) * 8

        def forward(x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor) -> torch.Tensor:
            return reference.fwd(x, weight, bias, None, scalars[4], _resolved(scalars[5], weight))

        return *reference_gradients(forward, saved[:3], dy, needs[:3]), *(None,) * 5

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, x, weight, stride, padding, _ = bwd_args
        return x, weight, None, None, stride, padding, None, None

    def fake_fwd(self, args: Args) -> Any:
        x, weight, _, _, stride, padding, *_ = args
        y = x.new_empty(output_shape(x, weight, stride, padding), dtype=output_dtype(x.dtype))
        return y.contiguous(memory_format=memory_format(x))

    def fake_bwd(self, bwd_args: Args) -> Any:
        dy, x, weight, _, _, needs = bwd_args
        outputs = (torch.empty_like(x), torch.empty_like(weight), dy.new_empty(weight.shape[0]))
        return tuple(t if need else dy.new_empty(0) for t, need in zip(outputs, needs, strict=True))


_OP = _Conv2d(conv2d)
