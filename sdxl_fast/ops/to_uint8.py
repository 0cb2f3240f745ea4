# SPDX-License-Identifier: Apache-2.0
"""``to_uint8``: what the VAE decodes to the bytes of a picture."""

from __future__ import annotations

from typing import Any

import torch

from sdxl_fast.constraints import Dtype, IsTensor, Ndim
from sdxl_fast.op import Args, FusedOp, dense
from sdxl_fast.ops import _backends, _native
from sdxl_fast.reference import to_uint8 as reference


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Returns pictures in -1..1 as bytes: clamped, scaled to 0..255, rounded to nearest (ties to even).

    Bit for bit what diffusers' image processor makes of a float32 picture. Not differentiable.

    Args:
        x: [N,C,H,W], float32, bfloat16, float16 or float64; contiguous or channels_last, other strides are made dense.
            NaN becomes 0.

    Returns:
        uint8 [N,H,W,C], contiguous. Arithmetic is float32 (float64 for float64), whatever x's dtype.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: ``VaeImageProcessor.postprocess`` of diffusers.
    """
    found: torch.Tensor = _OP(x)
    return found


def _native_kernels(device: str) -> _backends.Functions:
    """Adapter from the raw signature to the C function of ``device``."""
    lib, name, tail = _native.binding(device), f"to_uint8_fwd_{device}", _native.TAIL[device]
    function = getattr(lib, name)

    def fwd(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        out = x.new_empty((n, h, w, c), dtype=torch.uint8)
        status = function(
            *(x.data_ptr(), out.data_ptr(), n, c, h * w, _native.layout(x), _native.DTYPE[x.dtype], tail(x))
        )
        if status:
            _native.fail(lib, status, name, x)
        return out

    return _native.guard(device, fwd), _backends.no_backward


class _ToUint8(FusedOp):
    name = "to_uint8"
    parameters = ("x",)
    fwd_schema = "(Tensor x) -> Tensor"
    differentiable = 0
    rules = (IsTensor("x"), Dtype("x", _backends.FLOATS), Ndim("x", 4, "[N,C,H,W]"))
    backends = (
        _backends.native("cuda", "x", _native_kernels),
        _backends.triton("to_uint8", "x"),
        _backends.native("cpu", "x", _native_kernels),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        return (dense(args[0]),)

    def fake_fwd(self, args: Args) -> Any:
        n, c, h, w = args[0].shape
        return args[0].new_empty((n, h, w, c), dtype=torch.uint8)


_OP = _ToUint8(to_uint8)
