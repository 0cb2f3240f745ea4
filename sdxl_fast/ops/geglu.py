# SPDX-License-Identifier: Apache-2.0
"""``geglu``: value * GELU(gate) over the two halves of the last dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdxl_fast.constraints import Dtype, EvenLast, IsTensor, Ndim, OneOf
from sdxl_fast.op import Args, FusedOp, MaybeTensor, reference_gradients
from sdxl_fast.ops import _backends, _float8, _native
from sdxl_fast.reference import geglu as reference
from sdxl_fast.reference._common import FLOAT8, rounded


def geglu(x: torch.Tensor, *, approximate: str = "none", scale_y: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``value * GELU(gate)`` with ``value, gate = x.chunk(2, -1)``, differentiable twice.

    Args:
        x: [..., 2C], float32, bfloat16, float16 or float64. Anything not contiguous is copied first.
        approximate: ``"none"`` for the erf form, which SDXL uses, or ``"tanh"``.
        scale_y: float32 of one element on x's device, or None. With it the result is float8_e4m3fn: y, rounded to x's
            dtype, times the reciprocal of scale_y, rounded to nearest even, at most 448 in magnitude. That is what
            ``linear`` takes with ``scale_x=scale_y``; it has no derivative.

    Returns:
        [..., C] in x's dtype, or float8, contiguous; computed in float32 (float64 for float64) and rounded once.
        Autocast does not change the dtype.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Shazeer 2020 (arXiv:2002.05202); order of the halves as in diffusers.
    """
    y: torch.Tensor = _OP(x, approximate, scale_y)
    return y


def _native_kernels(device: str) -> _backends.Functions:
    """Adapters from the raw signature to the C functions of ``device``."""
    lib, tail = _native.binding(device), _native.TAIL[device]
    fwd_name, bwd_name = f"geglu_fwd_{device}", f"geglu_bwd_{device}"
    c_fwd, c_bwd = getattr(lib, fwd_name), getattr(lib, bwd_name)
    e4m3_fwd = _float8.kernel(lib, "geglu", device)

    def fwd(x: torch.Tensor, approximate: str, scale_y: MaybeTensor = None) -> torch.Tensor:
        cols = x.shape[-1] // 2
        fused = scale_y is not None and e4m3_fwd is not None
        y = x.new_empty((*x.shape[:-1], cols), dtype=FLOAT8 if fused else x.dtype)
        rows = y.numel() // cols if cols else 0
        rest = (y.data_ptr(), rows, cols, _native.APPROXIMATE[approximate], _native.DTYPE[x.dtype], tail(x))
        if scale_y is not None and e4m3_fwd is not None:
            status = e4m3_fwd(x.data_ptr(), scale_y.data_ptr(), *rest)
        else:
            status = c_fwd(x.data_ptr(), *rest)
        if status:
            _native.fail(lib, status, fwd_name, x)
        return y if fused else rounded(y, scale_y)

    def bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
        dx = torch.empty_like(x)
        cols = dy.shape[-1]
        rows = dy.numel() // cols if cols else 0
        code, dtype = _native.APPROXIMATE[approximate], _native.DTYPE[x.dtype]
        status = c_bwd(dy.data_ptr(), x.data_ptr(), dx.data_ptr(), rows, cols, code, dtype, tail(x))
        if status:
            _native.fail(lib, status, bwd_name, dy, x)
        return dx

    return _native.guard(device, fwd), _native.guard(device, bwd)


class _Geglu(FusedOp):
    name = "geglu"
    parameters = ("x", "approximate", "scale_y")
    fwd_schema = "(Tensor x, str approximate, Tensor? scale_y) -> Tensor"
    bwd_schema = "(Tensor dy, Tensor x, str approximate) -> Tensor"
    rules = (
        IsTensor("x"),
        Dtype("x", _backends.FLOATS),
        Ndim("x", 1, "[..., 2C]", at_least=True),
        EvenLast("x"),
        OneOf("approximate", reference.APPROXIMATIONS),
        *_float8.rules("x"),
    )
    backends = (
        _backends.native("cuda", "x", _native_kernels, _float8.FROM_BFLOAT16),
        _backends.triton("geglu", "x"),
        _backends.native("cpu", "x", _native_kernels),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x, approximate, scale_y = args
        return x.contiguous(), approximate, scale_y

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return (args[0],)

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        return dy.contiguous(), saved[0], scalars[1]

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return found, None, None

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        found = reference_gradients(lambda x: reference.fwd(x, scalars[1]), saved, dy, needs[:1])
        return (*found, None, None)

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, x, approximate = bwd_args
        return x, approximate, None

    def fake_fwd(self, args: Args) -> Any:
        x = args[0]
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=_float8.dtype_of(x, args[2]))

    def fake_bwd(self, bwd_args: Args) -> Any:
        return torch.empty_like(bwd_args[1])


_OP = _Geglu(geglu)
