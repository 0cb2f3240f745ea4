# SPDX-License-Identifier: Apache-2.0
"""``group_norm_silu``: act(GroupNorm(x [+ shift])) in one operation, of one map or of two side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from sdxl_fast.constraints import (
    DeviceLike,
    Divides,
    Dtype,
    DtypeLike,
    Integer,
    IsTensor,
    Ndim,
    NonNegative,
    OneOf,
    Sizes,
    Together,
    Values,
)
from sdxl_fast.op import Args, FusedOp, MaybeTensor, dense, laid_out_like, reference_gradients
from sdxl_fast.ops import _backends, _float8, _native
from sdxl_fast.reference import group_norm_silu as reference
from sdxl_fast.reference._common import FLOAT8, accumulation_dtype, rounded
from sdxl_fast.reference.upsample_conv2d import memory_format

_SKIP_MULTIPLE = 16  # kSkipMultiple of csrc/common/skip.h


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    num_groups: int,
    eps: float = 1e-5,
    shift: torch.Tensor | None = None,
    activation: str = "silu",
    scale_y: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``act(GroupNorm(x + shift))``, differentiable twice in x, weight, bias, shift and skip.

    Args:
        x: [N,C,H,W], float32, bfloat16, float16 or float64; contiguous or channels_last. Other strides are made dense
            first: channels_last if C is innermost, contiguous otherwise.
        weight, bias: [C], both or neither; x's dtype, or float32 beside a 16-bit x (autocast).
        num_groups: G, divides C.
        eps: added to the (biased) variance.
        shift: [N,C] in x's dtype, added to every pixel before the statistics: the time embedding of a residual block.
        activation: ``"silu"`` or ``"none"``.
        scale_y: float32 of one element on x's device, or None. With it the result is float8_e4m3fn: y, rounded to x's
            dtype, times the reciprocal of scale_y, rounded to nearest even, at most 448 in magnitude. That is what
            ``linear`` and ``conv2d`` take with ``scale_x=scale_y``; it has no derivative.
        skip: [N,C2,H,W] in x's dtype, or None. With it the call means ``torch.cat((x, skip), 1)`` in x's place, and C
            stands for the channels of both, also in the result. It is read where it lies if x is channels_last, both
            have a multiple of 16 channels and no gradients are recorded; otherwise the two are concatenated here.

    Returns:
        [N,C,H,W] in x's dtype, or float8, and x's memory format. Statistics and arithmetic are float32 (float64 for
        float64), rounded once at the end. Autocast does not change the dtype.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Wu & He 2018 (arXiv:1803.08494).
    """
    y: torch.Tensor = _OP(x, weight, bias, shift, num_groups, eps, activation, scale_y, skip)[0]
    return y


def _native_kernels(device: str) -> _backends.Functions:
    """Adapters from the raw signature to the C functions of ``device``."""
    lib = _native.binding(device)
    c_workspace = getattr(lib, f"group_norm_silu_workspace_{device}")
    functions = (
        _native_fwd(lib, device, c_workspace),
        _native_bwd(lib, device, c_workspace),
        _native_fwd(lib, device, c_workspace, statistics=False),
    )
    return tuple(_native.guard(device, function) for function in functions)


def _native_fwd(
    lib: Any, device: str, c_workspace: Callable[..., int], *, statistics: bool = True
) -> Callable[..., Any]:
    name = f"group_norm_silu_fwd_{device}"
    function, tail, pointer = getattr(lib, name), _native.TAIL[device], _native.pointer
    e4m3_fwd = _float8.kernel(lib, "group_norm_silu", device)

    def fwd(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        shift: torch.Tensor | None,
        num_groups: int,
        eps: float,
        activation: str,
        scale_y: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        layout = _native.layout(x)
        fused = scale_y is not None and e4m3_fwd is not None
        y = _empty_result(x, skip, FLOAT8 if fused else x.dtype)
        n, c, h, w = y.shape
        c_skip = 0 if skip is None else skip.shape[1]
        size = c_workspace(n, c, h * w, num_groups, layout, 0)
        kept, at, _memory = _native.statistics(x, (n, num_groups), size, kept=statistics)
        dtype = _native.DTYPE[x.dtype]
        given = (x.data_ptr(), pointer(skip), pointer(weight), pointer(bias), pointer(shift))
        rest = (
            *(y.data_ptr(), *at),
            *(n, c, c_skip, h * w, num_groups, eps, layout, _native.ACTIVATION[activation]),
            *(dtype, dtype if weight is None else _native.DTYPE[weight.dtype], tail(x)),
        )
        if scale_y is not None and e4m3_fwd is not None:
            status = e4m3_fwd(*given, scale_y.data_ptr(), *rest)
        else:
            status = function(*given, *rest)
        if status:
            _native.fail(lib, status, name, x, skip, weight, bias, shift)
        return (y if fused else rounded(y, scale_y), *kept)

    return fwd


def _native_bwd(lib: Any, device: str, c_workspace: Callable[..., int]) -> Callable[..., Any]:
    name = f"group_norm_silu_bwd_{device}"
    function, tail, pointer = getattr(lib, name), _native.TAIL[device], _native.pointer

    def bwd(
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        shift: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        num_groups: int,
        activation: str,
        needs: Sequence[bool],
    ) -> tuple[MaybeTensor, ...]:
        n, c, h, w = x.shape
        layout = _native.layout(x)
        gradients = [
            torch.empty_like(t) if need and t is not None else None
            for t, need in zip((x, weight, bias, shift), needs, strict=True)
        ]
        workspace = _native.scratch(c_workspace(n, c, h * w, num_groups, layout, 1), x)
        dtype = _native.DTYPE[x.dtype]
        status = function(
            *(dy.data_ptr(), x.data_ptr(), pointer(weight), pointer(bias), pointer(shift)),
            *(mean.data_ptr(), rstd.data_ptr(), *map(pointer, gradients), pointer(workspace)),
            *(n, c, h * w, num_groups, layout, _native.ACTIVATION[activation]),
            *(dtype, dtype if weight is None else _native.DTYPE[weight.dtype], tail(x)),
        )
        if status:
            _native.fail(lib, status, name, dy, x, weight, bias, shift)
        return tuple(gradients)

    return bwd


def _empty_result(x: torch.Tensor, skip: MaybeTensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns memory for y, laid out like x; a skip that is still beside x is channels_last, and so is x."""
    if skip is None:
        return torch.empty_like(x, dtype=dtype)
    n, c, h, w = x.shape
    shape = (n, c + skip.shape[1], h, w)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _composed(
    x: torch.Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    shift: MaybeTensor,
    num_groups: int,
    eps: float,
    activation: str,
    scale_y: MaybeTensor = None,
    skip: MaybeTensor = None,
) -> tuple[torch.Tensor]:
    x = reference.joined(x, skip)
    total = x if shift is None else x + shift[:, :, None, None]
    y = torch.group_norm(total, num_groups, weight, bias, eps)
    return (F.silu(y) if activation == "silu" else y,)


def _channels(values: Values) -> int:
    """Returns C: the channels of x and of a skip."""
    skip = values["skip"]
    channels: int = values["x"].shape[1] + (0 if skip is None else skip.shape[1])
    return channels


def _read_together(x: torch.Tensor, skip: torch.Tensor, others: Sequence[Any]) -> bool:
    """Whether the forwards take the two where they lie; a backward knows x alone."""
    recorded = _backends.recorded((x, skip, *others))
    aligned = x.shape[1] % _SKIP_MULTIPLE == 0 and skip.shape[1] % _SKIP_MULTIPLE == 0
    return aligned and not recorded and memory_format(x) == memory_format(skip) == torch.channels_last


class _GroupNormSilu(FusedOp):
    name = "group_norm_silu"
    parameters = ("x", "weight", "bias", "shift", "num_groups", "eps", "activation", "scale_y", "skip")
    fwd_schema = (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, SymInt num_groups, float eps, str activation, "
        "Tensor? scale_y, Tensor? skip) -> (Tensor, Tensor, Tensor)"
    )
    bwd_schema = (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, Tensor mean, Tensor rstd, "
        "SymInt num_groups, str activation, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    rules = (
        IsTensor("x"),
        *(IsTensor(arg, optional=True) for arg in ("weight", "bias", "shift", "skip")),
        Dtype("x", _backends.FLOATS),
        Ndim("x", 4, "[N,C,H,W]"),
        Integer("num_groups"),
        Sizes("skip", "[N,C2,H,W] beside x", lambda v: (v["x"].shape[0], None, *v["x"].shape[2:])),
        Divides("num_groups", "x", 1, beside="skip"),
        Together("weight", "bias"),
        *(Sizes(arg, "[C] of x (and skip)", lambda v: (_channels(v),)) for arg in ("weight", "bias")),
        Sizes("shift", "[N,C] of x (and skip)", lambda v: (v["x"].shape[0], _channels(v))),
        *(DtypeLike(arg, "x", also=(torch.float32,)) for arg in ("weight", "bias")),
        DtypeLike("bias", "weight"),
        *(DtypeLike(arg, "x") for arg in ("shift", "skip")),
        *(DeviceLike(arg, "x") for arg in ("weight", "bias", "shift", "skip")),
        NonNegative("eps"),
        OneOf("activation", reference.ACTIVATIONS),
        *_float8.rules("x", "weight", "bias", "shift", "skip"),
    )
    backends = (
        _backends.native("cuda", "x", _native_kernels, _float8.FROM_BFLOAT16),
        _backends.triton("group_norm_silu", "x"),
        _backends.native("cpu", "x", _native_kernels),
        _backends.composed("x", _composed),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x, weight, bias, shift, *scalars, skip = args
        x = dense(x)
        if weight is not None:
            weight, bias = weight.contiguous(), bias.contiguous()
        if skip is not None:
            skip = skip.contiguous(memory_format=memory_format(x))
            if not _read_together(x, skip, (weight, bias, shift)):
                x, skip = reference.joined(x, skip), None
        return x, weight, bias, None if shift is None else shift.contiguous(), *scalars, skip

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return (*args[:4], *outputs[1:])

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        x, weight, bias, shift, mean, rstd = saved
        num_groups, activation = scalars[4], scalars[6]
        return (
            laid_out_like(dy, cast(torch.Tensor, x)),
            x,
            weight,
            bias,
            shift,
            mean,
            rstd,
            num_groups,
            activation,
            tuple(needs[:4]),
        )

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return (*found, None, None, None, None, None)

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        found = reference_gradients(lambda *t: reference.fwd(*t, *scalars[4:])[0], saved[:4], dy, needs[:4])
        return (*found, None, None, None, None, None)

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, x, weight, bias, shift, _, _, num_groups, activation, _ = bwd_args
        return x, weight, bias, shift, num_groups, 0.0, activation, None, None

    def fake_fwd(self, args: Args) -> Any:
        x, num_groups = args[0], args[4]
        statistics = x.new_empty((x.shape[0], num_groups), dtype=accumulation_dtype(x.dtype))
        y = _empty_result(x, args[8], _float8.dtype_of(x, args[7]))
        return y, statistics, torch.empty_like(statistics)

    def fake_bwd(self, bwd_args: Args) -> Any:
        needs = bwd_args[9]
        like = bwd_args[1:5]
        return tuple(
            torch.empty_like(t) if need and t is not None else bwd_args[0].new_empty(0)
            for t, need in zip(like, needs, strict=True)
        )


_OP = _GroupNormSilu(group_norm_silu)
