# SPDX-License-Identifier: Apache-2.0
"""``linear_geglu``: value * GELU(gate) of a linear layer, whose own result is never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdxl_fast.constraints import Condition, DeviceLike, Dtype, DtypeLike, IsTensor, Ndim, OneOf, ShapeFrom, Sizes
from sdxl_fast.dispatch import Backend
from sdxl_fast.op import Args, FusedOp, MaybeTensor, reference_gradients
from sdxl_fast.ops import _backends, _hopper, _matrix
from sdxl_fast.reference import linear_geglu as reference
from sdxl_fast.reference._common import autocast
from sdxl_fast.reference.geglu import APPROXIMATIONS


def linear_geglu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none"
) -> torch.Tensor:
    """Returns ``value * GELU(gate)`` with ``value, gate = (x @ weight.T + bias).chunk(2, -1)``.

    Differentiable twice in x, weight and bias. Only those are saved: the backward projects x again.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; made contiguous.
        weight: [2C, K], the rows of the value before those of the gate, of x's dtype; or float32, which is then rounded
            to x's dtype as autocast does.
        bias: [2C] of the weight's dtype, or None.
        approximate: ``"none"`` for the erf form, which SDXL uses, or ``"tanh"``.

    Returns:
        [..., C], contiguous, in x's dtype, or in autocast's where that is on.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Shazeer 2020 (arXiv:2002.05202); order of the halves as in diffusers.
    """
    x, weight, bias = autocast(x, weight, bias)
    y: torch.Tensor = _OP(x, weight, bias, approximate)
    return y


def _triton_kernels() -> Backend:
    """The Triton forward beside the library's backward."""
    backend = _backends.triton("linear_geglu", "x")
    return Backend("triton", lambda: (backend.load()[0], _matrix.linear_geglu_bwd), backend.rules)


class _LinearGeglu(FusedOp):
    name = "linear_geglu"
    parameters = ("x", "weight", "bias", "approximate")
    fwd_schema = "(Tensor x, Tensor weight, Tensor? bias, str approximate) -> Tensor"
    bwd_schema = (
        "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, str approximate, bool[] needs) -> (Tensor, Tensor, Tensor)"
    )
    rules = (
        *(IsTensor(arg) for arg in ("x", "weight")),
        IsTensor("bias", optional=True),
        Dtype("x", _backends.FLOATS),
        Ndim("x", 1, "[..., K]", at_least=True),
        Sizes("weight", "[2C, K]", lambda v: (None, v["x"].shape[-1])),
        Condition("weight must have an even number of rows, value and gate", lambda v: v["weight"].shape[0] % 2 == 0),
        ShapeFrom("bias", "weight", (0,), "[2C]"),
        DtypeLike("weight", "x", also=(torch.float32,)),
        DtypeLike("bias", "weight"),
        *(DeviceLike(arg, "x") for arg in ("weight", "bias")),
        OneOf("approximate", APPROXIMATIONS),
    )
    backends = (
        _hopper.backend(_hopper.linear_geglu, _matrix.linear_geglu_bwd, _hopper.GATED_FEATURES),
        _triton_kernels(),
        Backend("library", lambda: (_matrix.linear_geglu_fwd, _matrix.linear_geglu_bwd)),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x, weight, bias, approximate = args
        # As autocast does with float32 parameters: their gradients too are what the 16-bit product gives.
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        return x.contiguous(), weight.to(x.dtype), bias, approximate

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return args[:3]

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        return dy.contiguous(), *saved, scalars[3], tuple(needs[:3])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return *found, None

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        def forward(x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor) -> torch.Tensor:
            return reference.fwd(x, weight, bias, scalars[3])

        return *reference_gradients(forward, saved, dy, needs[:3]), None

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, x, weight, bias, approximate, _ = bwd_args
        return x, weight, bias, approximate

    def fake_fwd(self, args: Args) -> Any:
        x, weight, *_ = args
        return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))

    def fake_bwd(self, bwd_args: Args) -> Any:
        dy, x, weight, _, _, needs = bwd_args
        shapes = (x.shape, weight.shape, weight.shape[:1])
        return tuple(dy.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


_OP = _LinearGeglu(linear_geglu)
