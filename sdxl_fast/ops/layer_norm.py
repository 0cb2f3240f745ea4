# SPDX-License-Identifier: Apache-2.0
"""``layer_norm``: LayerNorm of x or of x + residual, whose sum it returns too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_fast.constraints import (
    DeviceLike,
    Dtype,
    DtypeLike,
    IsTensor,
    LastAtMost,
    Ndim,
    NonNegative,
    SameShape,
    ShapeFrom,
    Together,
)
from sdxl_fast.op import Args, FusedOp, Incoming, MaybeTensor, reference_gradients
from sdxl_fast.ops import _backends, _float8, _native
from sdxl_fast.reference import layer_norm as reference
from sdxl_fast.reference._common import FLOAT8, accumulation_dtype, rounded


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    scale_y: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Returns LayerNorm over the last dimension; with ``residual`` that of ``x + residual``, and the sum.

    Differentiable twice in x, weight, bias and residual, through both results.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64; made contiguous.
        weight, bias: [C], of x's dtype or float32, or both None.
        eps: added to the variance, which is the biased one; >= 0.
        residual: like x. The sum is rounded to x's dtype before it is normalised.
        scale_y: float32 of one element on x's device, or None. With it the result is float8_e4m3fn: y, rounded to x's
            dtype, times the reciprocal of scale_y, rounded to nearest even, at most 448 in magnitude. That is what
            ``linear`` takes with ``scale_x=scale_y``; it has no derivative.

    Returns:
        y, or with residual the pair (y, sum), of x's shape and dtype (y with scale_y in float8), contiguous.
        Statistics are float32 (float64 for float64).

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Ba, Kiros & Hinton 2016 (arXiv:1607.06450).
    """
    found = _OP(x, weight, bias, residual, eps, scale_y)
    return found[0] if residual is None else (found[0], found[1])


def _native_kernels(device: str) -> _backends.Functions:
    """Adapters from the raw signature to the C functions of ``device``."""
    lib = _native.binding(device)
    functions = _native_fwd(lib, device), _native_bwd(lib, device), _native_fwd(lib, device, statistics=False)
    return tuple(_native.guard(device, function) for function in functions)


def _native_fwd(lib: Any, device: str, *, statistics: bool = True) -> Callable[..., Any]:
    name = f"layer_norm_fwd_{device}"
    function, tail, pointer = getattr(lib, name), _native.TAIL[device], _native.pointer
    e4m3_fwd = _float8.kernel(lib, "layer_norm", device)

    def fwd(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        eps: float,
        scale_y: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        fused = scale_y is not None and e4m3_fwd is not None
        y = torch.empty_like(x, dtype=FLOAT8) if fused else torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        *leading, cols = x.shape
        kept, (mean, rstd, _), _memory = _native.statistics(x, leading, 0, kept=statistics)
        dtype = _native.DTYPE[x.dtype]
        given = (x.data_ptr(), pointer(residual), pointer(weight), pointer(bias))
        rest = (
            *(y.data_ptr(), pointer(total), mean, rstd, math.prod(leading), cols, eps),
            *(dtype, dtype if weight is None else _native.DTYPE[weight.dtype], tail(x)),
        )
        if scale_y is not None and e4m3_fwd is not None:
            status = e4m3_fwd(*given, scale_y.data_ptr(), *rest)
        else:
            status = function(*given, *rest)
        if status:
            _native.fail(lib, status, name, x, weight, bias, residual)
        y = y if fused else rounded(y, scale_y)
        return (y, *kept) if total is None else (y, total, *kept)

    return fwd


def _native_bwd(lib: Any, device: str) -> Callable[..., Any]:
    name, workspace_name = f"layer_norm_bwd_{device}", f"layer_norm_workspace_{device}"
    function, workspace_size = getattr(lib, name), getattr(lib, workspace_name)
    tail, pointer = _native.TAIL[device], _native.pointer

    def bwd(
        dy: torch.Tensor,
        dsum: torch.Tensor | None,
        s: torch.Tensor,
        weight: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        needs: Sequence[bool],
    ) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:
        rows, cols = mean.numel(), s.shape[-1]
        ds = torch.empty_like(s) if needs[0] else None
        dweight, dbias = (
            torch.empty_like(weight) if need and weight is not None else None for need in (needs[1], needs[2])
        )
        wanted = dweight is not None or dbias is not None
        workspace = _native.scratch(workspace_size(rows, cols), s) if wanted else None
        dtype = _native.DTYPE[s.dtype]
        status = function(
            *(dy.data_ptr(), pointer(dsum), s.data_ptr(), pointer(weight), mean.data_ptr(), rstd.data_ptr()),
            *(pointer(ds), pointer(dweight), pointer(dbias), pointer(workspace), rows, cols),
            *(dtype, dtype if weight is None else _native.DTYPE[weight.dtype], tail(s)),
        )
        if status:
            _native.fail(lib, status, name, dy, dsum, s, weight)
        return ds, dweight, dbias

    return bwd


def _composed(
    x: torch.Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    eps: float,
    scale_y: MaybeTensor = None,
) -> tuple[torch.Tensor, ...]:
    total = x if residual is None else x + residual
    y = torch.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return (y,) if residual is None else (y, total)


class _LayerNorm(FusedOp):
    name = "layer_norm"
    parameters = ("x", "weight", "bias", "residual", "eps", "scale_y")
    fwd_schema = (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, Tensor? scale_y) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    bwd_schema = (
        "(Tensor dy, Tensor? dsum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, bool[] needs) "
        "-> (Tensor, Tensor, Tensor)"
    )
    differentiable = 2
    rules = (
        IsTensor("x"),
        *(IsTensor(arg, optional=True) for arg in ("weight", "bias", "residual")),
        Dtype("x", _backends.FLOATS),
        Ndim("x", 1, "[..., C]", at_least=True),
        Together("weight", "bias"),
        *(ShapeFrom(arg, "x", (-1,), "[C]") for arg in ("weight", "bias")),
        *(DtypeLike(arg, "x", also=(torch.float32,)) for arg in ("weight", "bias")),
        DtypeLike("bias", "weight"),
        SameShape("residual", "x"),
        DtypeLike("residual", "x"),
        *(DeviceLike(arg, "x") for arg in ("weight", "bias", "residual")),
        NonNegative("eps"),
        *_float8.rules("x", "weight", "bias", "residual"),
    )
    backends = (
        _backends.native("cuda", "x", _native_kernels, _float8.FROM_BFLOAT16),
        # A program holds whole rows.
        _backends.triton("layer_norm", "x", LastAtMost("x", 4096)),
        _backends.native("cpu", "x", _native_kernels),
        _backends.composed("x", _composed),
        _backends.eager(reference),
    )

    def flowing(self, outputs: Sequence[Any]) -> int:
        return len(outputs) - 2  # all but the statistics

    def prepare(self, args: Args) -> Args:
        *tensors, eps, scale_y = args
        return *(None if t is None else t.contiguous() for t in tensors), eps, scale_y

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return args[0] if args[3] is None else outputs[1], args[1], args[2], outputs[-2], outputs[-1]

    def gradients(
        self,
        dy: Incoming,
        saved: Sequence[MaybeTensor],
        scalars: Args,
        needs: Sequence[bool],
        bwd: Callable[..., Any],
    ) -> tuple[MaybeTensor, ...]:
        if dy[0] is not None:
            *found, ds, _, _ = super().gradients(dy, saved, scalars, needs, bwd)
            return (ds if needs[0] else None, *found[1:], ds if needs[3] else None, None, None)
        # Only the sum was used.
        ds, (_, weight, bias, *_) = dy[1], saved
        zeros = (
            torch.zeros_like(t) if need and t is not None else None
            for t, need in ((weight, needs[1]), (bias, needs[2]))
        )
        return (ds if needs[0] else None, *zeros, ds if needs[3] else None, None, None)

    def bwd_arguments(self, dy: Incoming, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]) -> Args:
        s, weight, _, mean, rstd = saved
        first, second = dy
        second = None if second is None else second.contiguous()
        return first.contiguous(), second, s, weight, mean, rstd, (needs[0] or needs[3], needs[1], needs[2])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        ds, dweight, dbias = found
        return ds, dweight, dbias, ds, None, None

    def second_order(
        self, dy: Incoming, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        eps, wanted = scalars[4], (needs[0] or needs[3], needs[1], needs[2])
        found = reference_gradients(lambda s, w, b: reference.fwd(s, w, b, None, eps)[0], saved[:3], dy[0], wanted)
        ds = found[0]
        if ds is not None and dy[1] is not None:
            ds = ds + dy[1]
        return ds, found[1], found[2], ds, None, None

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, _, s, weight, *_ = bwd_args
        return s, weight, weight, None, 0.0, None

    def library_outputs(self, args: Args, outputs: Any) -> Any:
        y, *rest = outputs
        return (y, args[0].new_empty(0), *rest) if args[3] is None else outputs

    def fake_fwd(self, args: Args) -> Any:
        x, residual = args[0], args[3]
        mean = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))
        total = x.new_empty(0) if residual is None else torch.empty_like(x)
        return torch.empty_like(x, dtype=_float8.dtype_of(x, args[5])), total, mean, torch.empty_like(mean)

    def fake_bwd(self, bwd_args: Args) -> Any:
        dy, _, s, weight, _, _, needs = bwd_args
        of_weight = (
            torch.empty_like(weight) if need and weight is not None else dy.new_empty(0)
            for need in (needs[1], needs[2])
        )
        return (torch.empty_like(s) if needs[0] else dy.new_empty(0), *of_weight)


_OP = _LayerNorm(layer_norm)
