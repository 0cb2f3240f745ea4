# SPDX-License-Identifier: Apache-2.0
"""``upsample_conv2d``: nearest-neighbour upsampling by two and a 3x3 convolution, as four exact 2x2 convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdxl_fast.constraints import DeviceLike, Dtype, DtypeLike, IsTensor, Ndim, NoGradient, ShapeFrom, Sizes
from sdxl_fast.dispatch import Backend
from sdxl_fast.op import Args, FusedOp, MaybeTensor, dense, reference_gradients
from sdxl_fast.ops import _backends, _convolution, _hopper
from sdxl_fast.reference import upsample_conv2d as reference
from sdxl_fast.reference._common import autocast
from sdxl_fast.reference.upsample_conv2d import memory_format, phase_weights


def upsample_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, phases: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns ``conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1)`` with 4 / 9 of its multiplications.

    Differentiable twice in x, weight and bias. Equal in real arithmetic; in a 16-bit dtype the summed weights are
    rounded once, which makes the error about sqrt 2 times that of the rounded output alone
    (`sdxl_fast.reference.upsample_conv2d` has the bound).

    Args:
        x: [N, C_in, H, W], float32, bfloat16, float16 or float64, contiguous or channels_last (others are copied).
        weight: [C_out, C_in, 3, 3] of x's dtype, or float32, which is then rounded to x's dtype as autocast does.
        bias: [C_out] of the weight's dtype, or None.
        phases: what `sdxl_fast.ops.upsample_conv2d.phase_weights(weight, x.dtype)` returned for the weight as it is
            now, to save making it again: the caller answers for that. Gradients go to the weight all the same.

    Returns:
        [N, C_out, 2H, 2W] in x's dtype, or in autocast's where that is on; memory format of x.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Shi et al. 2016 (arXiv:1609.07009), of sub-pixel convolutions.
    """
    x, weight, bias = autocast(x, weight, bias)
    y: torch.Tensor = _OP(x, weight, bias, phases)
    return y


def _with_phases(backend: Backend) -> Backend:
    """A backend that has but a forward, and asks for the phases: here it makes them, and the library goes back."""

    def load() -> _backends.Functions:
        forward, _ = backend.load()

        def fwd(x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, phases: MaybeTensor) -> Any:
            return forward(x, weight, bias, phase_weights(weight) if phases is None else phases)

        return fwd, _convolution.upsample_bwd

    return Backend(backend.name, load, backend.rules)


def _weight_sizes(values: Any) -> tuple[int | None, ...]:
    return None, values["x"].shape[1], 3, 3


def _phases_sizes(values: Any) -> tuple[int | None, ...]:
    return values["weight"].shape[1], values["weight"].shape[0], 4, 4


class _UpsampleConv2d(FusedOp):
    name = "upsample_conv2d"
    parameters = ("x", "weight", "bias", "phases")
    fwd_schema = "(Tensor x, Tensor weight, Tensor? bias, Tensor? phases) -> Tensor"
    bwd_schema = (
        "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? phases, bool[] needs) -> (Tensor, Tensor, Tensor)"
    )
    rules = (
        *(IsTensor(arg) for arg in ("x", "weight")),
        *(IsTensor(arg, optional=True) for arg in ("bias", "phases")),
        Dtype("x", _backends.FLOATS),
        Ndim("x", 4, "[N, C_in, H, W]"),
        Sizes("x", "[N, C_in, H, W] with something in every image", lambda v: (v["x"].shape[0], None, None, None)),
        Sizes("weight", "[C_out, C_in, 3, 3]", _weight_sizes),
        ShapeFrom("bias", "weight", (0,), "[C_out]"),
        Sizes("phases", "[C_in, C_out, 4, 4]", _phases_sizes),
        DtypeLike("weight", "x", also=(torch.float32,)),
        DtypeLike("bias", "weight"),
        DtypeLike("phases", "x"),
        *(DeviceLike(arg, "x") for arg in ("weight", "bias", "phases")),
        NoGradient("phases"),
    )
    backends = (
        _with_phases(_hopper.backend(_hopper.upsample_conv2d, _convolution.upsample_bwd, _hopper.CHANNELS)),
        _with_phases(_backends.triton("upsample_conv2d", "x")),
        _convolution.upsample_conv2d(),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x, weight, bias, phases = args
        # As autocast does with float32 parameters: their gradients too are what the 16-bit product gives.
        return dense(x), dense(weight.to(x.dtype)), None if bias is None else bias.to(x.dtype).contiguous(), phases

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return args

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        x, *rest = saved
        like = dy if x is None else x
        return dy.contiguous(memory_format=memory_format(like)), x, *rest, tuple(needs[:3])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return *found, None

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        def forward(x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor) -> torch.Tensor:
            return reference.fwd(x, weight, bias, None)

        return *reference_gradients(forward, saved[:3], dy, needs[:3]), None

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, x, weight, bias, phases, _ = bwd_args
        return x, weight, bias, phases

    def fake_fwd(self, args: Args) -> Any:
        x, weight, *_ = args
        n, _, h, w = x.shape
        return x.new_empty(n, weight.shape[0], 2 * h, 2 * w).contiguous(memory_format=memory_format(x))

    def fake_bwd(self, bwd_args: Args) -> Any:
        dy, *inputs, _, needs = bwd_args
        return tuple(
            torch.empty_like(t) if need and t is not None else dy.new_empty(0)
            for t, need in zip(inputs, needs, strict=True)
        )


_OP = _UpsampleConv2d(upsample_conv2d)
