# SPDX-License-Identifier: Apache-2.0
"""Weights of convolutions and linear layers in the order in which a CPU reads them, kept for inference.

A 3x3 convolution on a CPU puts its weight into oneDNN's own order on every call, or, of one small map, takes a slower
way (im2col); a product of a few rows is spread over two cores badly. So small float32 products go to a kernel of this
package's own, with its own order, and middling convolutions to oneDNN with the order kept. Large ones hide the
reordering, and what is kept costs their memory again.

Microseconds on two cores of a Zen 4 EPYC, torch 2.13, float32, in a loop, stock / oneDNN's order kept / own kernel:
    3x3        144ch 4x4 60/54/35, 96ch 8x8 76/75/56, 128ch 8x8 128/113/101, 240 to 96ch 8x8 174/137/129,
               64ch 16x16 117/108/96, 32ch 32x32 120/111/108, 8 of 144ch 4x4 313/206/234, 8 of 128ch 8x8 691/631/705
    1x1        128 to 64ch 16x16 57/-/30, 32 to 16ch 64x64 62/-/47
    upsampling 144ch 4x4 158/-/64, 128ch 8x8 216/-/167, 64ch 16x16 220/-/174
    rows       16 of 144 to 1152 53/-/33, 16 of 576 to 144 27/-/17, 128 of 144 to 1152 258/-/228
In the embedded model, where weights come from further away, the small ones gain more: convolutions of 4x4 maps take 113
microseconds as they come. Its forward of eight, milliseconds, stock 31.4, with limits of 128 rows 25.7, of 512 24.9.
"""

from __future__ import annotations

import torch

from sdxl_fast.ops import _packed
from sdxl_fast.ops._derived import Derived

# Output positions N*H*W (for an upsampling, input positions; of a linear layer, rows) up to which the own kernel runs.
OWN_POSITIONS = {1: 4096, 3: 256, "upsample": 512}
OWN_ROWS = 8, 512
# Between so many positions oneDNN's order is kept.
KEPT_POSITIONS = 128, 2048
KEPT_BYTES = 8 << 20
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


class KeptWeight:
    """What is kept of the weight of one layer. Each product returns None where it is better left to PyTorch.

    It runs on a CPU where gradients are off; maps have to be channels_last, rows contiguous.
    """

    def __init__(self) -> None:
        self._own, self._onednn = Derived(), Derived()

    def forget(self) -> None:
        """Drops it, to be made again."""
        self._own.forget()
        self._onednn.forget()

    def conv2d(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, padding: int
    ) -> torch.Tensor | None:
        """The convolution of x [N,C,H,W] with weight [C',C,k,k]."""
        if not _keeps(x, weight) or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        c_out, _, kernel, width = weight.shape
        positions = x.shape[0] * x.shape[2] * x.shape[3] // (stride * stride)
        if (
            _own(x)
            and positions <= OWN_POSITIONS.get(kernel, 0)
            and kernel == width
            and stride <= 2
            and padding <= 1
            and min(x.shape[2:]) + 2 * padding >= kernel
        ):
            return _packed.conv2d(x, self._own.of(weight, _packed.packed), bias, c_out, kernel, stride, padding)
        low, high = KEPT_POSITIONS
        if kernel == 1 or not low <= positions <= high or x.dtype not in _ONEDNN_DTYPES:
            return None
        if not torch.backends.mkldnn.is_available():
            return None
        sides = [padding, padding], [stride, stride], [1, 1]
        reorder = torch.ops.mkldnn._reorder_convolution_weight.default
        kept = self._onednn.of(weight, lambda w: reorder(w, *sides, 1, list(x.shape)))
        y: torch.Tensor = torch.ops.mkldnn._convolution_pointwise.default(x, kept, bias, *sides, 1, "none", [], "")
        return y

    def upsample_conv2d(self, x: torch.Tensor, phases: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The convolution of x [N,C,H,W] doubled, with the weight's ``phase_weights`` [C,C',4,4]."""
        n, _, h, w = x.shape
        if (
            not _keeps(x, phases)
            or not _own(x)
            or n * h * w > OWN_POSITIONS["upsample"]
            or not x.is_contiguous(memory_format=torch.channels_last)
        ):
            return None
        return _packed.upsample_conv2d(x, self._own.of(phases, _packed.packed_phases), bias, phases.shape[1])

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The linear layer of x [..., C] with weight [C',C]."""
        rows, (low, high) = x.numel() // max(1, x.shape[-1]), OWN_ROWS
        if not low <= rows <= high or not _keeps(x, weight) or not _own(x) or not x.is_contiguous():
            return None
        return _packed.linear(x, self._own.of(weight, _packed.packed), bias, weight.shape[0])


def _keeps(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether anything is kept of a weight for a product with x."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and weight.numel() * weight.element_size() <= KEPT_BYTES
        and not weight.is_inference()
        and x.numel() > 0
    )


def _own(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and _packed.available()
