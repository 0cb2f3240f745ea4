# SPDX-License-Identifier: Apache-2.0
"""The ``cuda`` backend of the matrix ops: adapters from the raw signatures to the C functions, for Hopper alone.

Their kernel takes rows by TMA, 16 bytes at a time: numbers of channels are multiples of 8 (of 16 for float8). What does
not start at such a multiple is copied, and so are maps that are not channels_last, both on the way in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_fast.constraints import Condition, DeviceType, Dtype, Rule, Values
from sdxl_fast.dispatch import Backend
from sdxl_fast.errors import UnavailableError
from sdxl_fast.ops import _native
from sdxl_fast.reference.conv2d import MaybeTensor, output_shape
from sdxl_fast.reference.linear import FLOAT8, output_dtype
from sdxl_fast.reference.upsample_conv2d import memory_format

_ALIGNMENT = 16
_CAPABILITY = (9, 0)


def backend(
    load: Callable[[Any], Callable[..., Any]], backward: Callable[..., Any], *rules: Rule, float8: bool = False
) -> Backend:
    """The backend whose forward ``load(library)`` returns, beside the library's backward.

    Args:
        load: makes the adapter of the forward.
        backward: the raw backward.
        rules: beyond those of the device and the dtype of x.
        float8: whether x may be float8_e4m3fn.
    """

    def both() -> tuple[Callable[..., Any], Callable[..., Any]]:
        module = _native.binding("cuda")
        reason = unavailable_reason()
        if reason is not None:
            raise UnavailableError(reason)
        return _native.guard("cuda", load(module)), backward

    dtypes = (torch.bfloat16, FLOAT8) if float8 else (torch.bfloat16,)
    return Backend("cuda", both, (DeviceType("x", "cuda"), _HOPPER, Dtype("x", dtypes), *rules))


def unavailable_reason() -> str | None:
    """Returns why the library's matrix kernels cannot be used, or None when they are in it."""
    from sdxl_fast import native

    if native.build_info()["cutlass"] is None:
        return (
            "the matrix kernels were not built: they need CUTLASS's headers (pip install nvidia-cutlass==4.2.0.0, or "
            "CUTLASS_DIR) and 90a among SDXL_FAST_CUDA_ARCHS"
        )
    return None


def _on_hopper(values: Values) -> bool:
    return torch.cuda.get_device_capability(values["x"].device) == _CAPABILITY


_HOPPER = Condition("x must be on a GPU of compute capability 9.0", _on_hopper)


def _features_fit(values: Values) -> bool:
    weight = values["weight"]
    return (
        weight.shape[0] % 8 == 0 and weight.shape[1] % (16 if values["x"].dtype == FLOAT8 else 8) == 0 < weight.shape[1]
    )


def _gated_features_fit(values: Values) -> bool:
    return values["weight"].shape[0] % 16 == 0 and _features_fit(values)


FEATURES = Condition("features in and out must be multiples of 8, those of float8 x of 16", _features_fit)
GATED_FEATURES = Condition("features in and out must be multiples of 8, those of float8 x of 16", _gated_features_fit)
CHANNELS = Condition("channels in and out must be multiples of 8, those of float8 x of 16", _features_fit)
UNIT_STRIDE = Condition("stride must be 1", lambda values: values["stride"] == 1)


def _rows(t: torch.Tensor) -> int:
    return t.numel() // t.shape[-1]


def _nhwc(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _empty_nhwc(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = output_dtype(x.dtype)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


class _Call:
    """One C call: keeps copies of what is not aligned alive until it is launched, and raises for a status."""

    def __init__(self, module: Any, name: str) -> None:
        self._module, self._name, self._function = module, name, getattr(module, name)

    def __call__(self, x: torch.Tensor, others: Sequence[MaybeTensor], y: torch.Tensor, *sizes: int) -> torch.Tensor:
        tensors = (x, *others)
        moved = [t if t is None or t.data_ptr() % _ALIGNMENT == 0 else t.clone() for t in tensors]
        dtype = _native.DTYPE[x.dtype]
        status = self._function(*map(_native.pointer, moved), y.data_ptr(), *sizes, dtype, _native.TAIL["cuda"](x))
        if status:
            _native.fail(self._module, status, self._name, *tensors)
        return y


def linear(module: Any) -> Callable[..., torch.Tensor]:
    """The forward of ``linear``."""
    call = _Call(module, "linear_fwd_cuda")

    def fwd(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        scale_x: MaybeTensor,
        scale_w: MaybeTensor,
    ) -> torch.Tensor:
        y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=output_dtype(x.dtype))
        others = (weight.contiguous(), bias, residual, scale_x, scale_w)
        return call(x, others, y, _rows(y), weight.shape[1], weight.shape[0])

    return fwd


def linear_geglu(module: Any) -> Callable[..., torch.Tensor]:
    """The forward of ``linear_geglu``."""
    call = _Call(module, "linear_geglu_fwd_cuda")

    def fwd(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: MaybeTensor,
        approximate: str,
        scale_x: MaybeTensor = None,
        scale_w: MaybeTensor = None,
        scale_y: MaybeTensor = None,
    ) -> torch.Tensor:
        dtype = output_dtype(x.dtype) if scale_y is None else FLOAT8
        y = x.new_empty((*x.shape[:-1], weight.shape[0] // 2), dtype=dtype)
        sizes = (_rows(y), weight.shape[1], y.shape[-1], _native.APPROXIMATE[approximate])
        return call(x, (weight.contiguous(), bias, scale_x, scale_w, scale_y), y, *sizes)

    return fwd


def conv2d(module: Any) -> Callable[..., torch.Tensor]:
    """The forward of ``conv2d``."""
    call = _Call(module, "conv2d_fwd_cuda")

    def fwd(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        stride: int,
        padding: int,
        scale_x: MaybeTensor = None,
        scale_w: MaybeTensor = None,
    ) -> torch.Tensor:
        y = _empty_nhwc(x, output_shape(x, weight, stride, padding))
        others = (_nhwc(weight), bias, None if residual is None else _nhwc(residual), scale_x, scale_w)
        sizes = (*x.shape, y.shape[1], weight.shape[-1], padding)
        return call(_nhwc(x), others, y, *sizes).contiguous(memory_format=memory_format(x))

    return fwd


def upsample_conv2d(module: Any) -> Callable[..., torch.Tensor]:
    """The forward of ``upsample_conv2d``, of given phases."""
    call = _Call(module, "upsample_conv2d_fwd_cuda")

    def fwd(x: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, phases: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        y = _empty_nhwc(x, (n, weight.shape[0], 2 * h, 2 * w))
        others = (phases.permute(1, 2, 3, 0).contiguous(), bias)
        return call(_nhwc(x), others, y, *x.shape, y.shape[1]).contiguous(memory_format=memory_format(x))

    return fwd
