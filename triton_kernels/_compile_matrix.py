# SPDX-License-Identifier: Apache-2.0
"""The launches of the matrix kernels that `_compile` compiles."""

from __future__ import annotations

import torch

from ._attention_config import target_of

FLOAT8 = torch.float8_e4m3fn


def _takes_float8(x: torch.Tensor) -> bool:
    """Whether float8 is compiled beside x: once, with bf16, which its results are in; older tensor cores know none."""
    return x.dtype == torch.bfloat16 and target_of(x).arch >= 89


def upsample_conv2d_cases(dtype: torch.dtype) -> None:
    """Launches of `upsample_conv2d`."""
    from .upsample_conv2d import upsample_conv2d_fwd

    shapes = [(1, 1280, 32, 32, 1280), (2, 5, 3, 7, 6)]
    if dtype == torch.bfloat16:
        shapes.insert(0, (1, 512, 2048, 2048, 512))  # more than 2^31 elements of y
    for n, c_in, h, w, c_out in shapes:
        phases = torch.empty(c_out, 4, 4, c_in, dtype=dtype, device="meta").permute(3, 0, 1, 2)
        x = torch.empty(n, c_in, h, w, dtype=dtype, device="meta")
        upsample_conv2d_fwd(x.to(memory_format=torch.channels_last), phases, phases[0, :, 0, 0].contiguous(), phases)
    upsample_conv2d_fwd(x, phases, None, phases)


def linear_cases(dtype: torch.dtype) -> None:
    """Launches of `linear`."""
    from .linear import linear_fwd

    for shape, c_out in (((1, 4096, 640), 640), ((1, 1024, 1280), 1280), ((7, 33), 5)):
        x, weight = (torch.empty(size, dtype=dtype, device="meta") for size in (shape, (c_out, shape[-1])))
        y = linear_fwd(x, weight, weight[:, 0].contiguous(), None, None, None)
        linear_fwd(x, weight, None, y, None, None)
        if _takes_float8(x):
            scale = torch.empty((), device="meta")
            x, weight = x.to(FLOAT8), weight.to(FLOAT8)
            linear_fwd(x, weight, None, y, scale, scale)


def linear_geglu_cases(dtype: torch.dtype) -> None:
    """Launches of `linear_geglu`."""
    from .linear_geglu import linear_geglu_fwd

    for shape, c_out in (((1, 1024, 1280), 5120), ((7, 33), 5)):
        x, weight = (torch.empty(size, dtype=dtype, device="meta") for size in (shape, (2 * c_out, shape[-1])))
        linear_geglu_fwd(x, weight, weight[:, 0].contiguous(), "none")
        linear_geglu_fwd(x, weight, None, "tanh")
        scale = torch.empty((), device="meta")
        linear_geglu_fwd(x, weight, None, "none", scale_y=scale)
        if _takes_float8(x):
            x, weight, bias = x.to(FLOAT8), weight.to(FLOAT8), weight[:, 0].contiguous()
            for scale_y in (scale, None):
                linear_geglu_fwd(x, weight, bias, "none", scale, scale, scale_y)


def conv2d_cases(dtype: torch.dtype) -> None:
    """Launches of `conv2d`."""
    from .conv2d import conv2d_fwd

    # n, c_in, side, c_out, kernel, stride, padding, with a residual; the last of both memory formats
    cases = [
        (1, 512, 128, 512, 3, 1, 1, True), (1, 1280, 32, 1280, 3, 1, 1, False), (1, 320, 128, 320, 3, 2, 1, False),
        (1, 640, 64, 320, 1, 1, 0, False), (2, 5, 7, 6, 3, 1, 1, True),
    ]  # fmt: skip
    if dtype == torch.bfloat16:
        cases.insert(0, (1, 256, 4096, 128, 3, 1, 1, False))  # more than 2^31 elements of x
    for n, c_in, side, c_out, size, stride, padding, added in cases:
        weight = torch.empty(c_out, c_in, size, size, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        x = torch.empty(n, c_in, side, side, dtype=dtype, device="meta")
        bias = weight[:, 0, 0, 0].contiguous()
        y = conv2d_fwd(x.to(memory_format=torch.channels_last), weight, bias, None, stride, padding)
        if added:
            conv2d_fwd(x.to(memory_format=torch.channels_last), weight, None, y, stride, padding)
        if _takes_float8(x):
            scale = torch.empty((), device="meta")
            x8, weight8 = x.to(memory_format=torch.channels_last).to(FLOAT8), weight.to(FLOAT8)
            conv2d_fwd(x8, weight8, bias, y if added else None, stride, padding, scale, scale)
    conv2d_fwd(x, weight, None, y.contiguous(), stride, padding)
