# SPDX-License-Identifier: Apache-2.0
"""Weights of convolutions and linear layers in the order in which a CPU reads them, kept for inference.

A 3x3 convolution on a CPU puts its weight into oneDNN's own order on every call, or, of one small map, takes a slower
way (im2col); a product of a few rows is spread over two cores badly. So small float32 products go to a kernel of this
package's own, with its own order, and middling convolutions to oneDNN with the order kept. Large ones hide the
reordering, and what is kept costs their memory again.

Most 3x3 convolutions of stride 1 go by Winograd's F(2x2, 3x3), whose weight is kept transformed, 16 / 9 as large, or as
large, ahead of a doubled map. It takes 16 (9) multiplications where there are 36, and its sums are shorter, so that its
error against float64 is smaller than oneDNN's.

Microseconds on two cores of a Zen 4 EPYC, torch 2.13, float32, in a loop, stock / oneDNN's order kept / own / Winograd:
    3x3        144ch 4x4 70/58/39/55, 96ch 8x8 91/75/59/31, 128ch 8x8 138/108/97/51, 64ch 16x16 133/111/104/52,
               16ch 64x64 170/148/157/98, 8 of 144ch 4x4 545/207/240/113, 8 of 128ch 8x8 1317/1226/1381/670,
               320ch 64x64 34541/33540/35846/16170, 128ch 256x256 86393/85781/-/44290
    upsampling 144ch 2x2 65/-/-/33, 128ch 8x8 394/-/-/99, 8 of 32ch 32x32 2864/-/-/999, 512ch 32x32 86042/-/-/22219
    1x1        128 to 64ch 16x16 57/-/30, 32 to 16ch 64x64 62/-/47
    rows       16 of 144 to 1152 53/-/33, 16 of 576 to 144 27/-/17, 128 of 144 to 1152 258/-/228
In the embedded model, where weights come from further away, its forward of eight takes milliseconds: stock 31.4, before
Winograd 19.2, now 17.4.
"""

from __future__ import annotations

import torch

from sdxl_fast.ops import _packed
from sdxl_fast.ops._derived import Derived

# Output positions N*H*W (of a linear layer, rows) up to which the own kernel runs, by the size of the kernel.
OWN_POSITIONS = {1: 4096, 3: 256}
OWN_ROWS = 8, 512
# Between so many positions oneDNN's order is kept.
KEPT_POSITIONS = 128, 2048
KEPT_BYTES = 8 << 20
# From so many on, 3x3 convolutions of stride 1 are Winograd's; an upsampling always is.
WINOGRAD_POSITIONS = 64
WINOGRAD_BYTES = 16 << 20
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


class KeptWeight:
    """What is kept of the weight of one layer. Each product returns None where it is better left to PyTorch.

    It runs on a CPU where gradients are off; maps have to be channels_last, rows contiguous.
    """

    def __init__(self) -> None:
        self._own, self._onednn, self._winograd = Derived(), Derived(), Derived()

    def forget(self) -> None:
        """Drops it, to be made again."""
        for derived in (self._own, self._onednn, self._winograd):
            derived.forget()

    def conv2d(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, padding: int
    ) -> torch.Tensor | None:
        """The convolution of x [N,C,H,W] with weight [C',C,k,k]."""
        c_out, _, kernel, width = weight.shape
        positions = x.shape[0] * x.shape[2] * x.shape[3] // (stride * stride)
        three = kernel == width == 3 and stride == padding == 1
        if three and positions >= WINOGRAD_POSITIONS and _winograd(x, weight):
            return _packed.winograd_conv2d(x, self._winograd.of(weight, _packed.winograd), bias, c_out)
        if not _keeps(x, weight, KEPT_BYTES) or not _is_channels_last(x):
            return None
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

    def upsample_conv2d(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The 3x3 convolution of x [N,C,H,W], doubled by nearest neighbours, with weight [C',C,3,3]."""
        if not _winograd(x, weight):
            return None
        kept = self._winograd.of(weight, lambda w: _packed.winograd(w, upsample=True))
        return _packed.winograd_conv2d(x, kept, bias, weight.shape[0], upsample=True)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The linear layer of x [..., C] with weight [C',C]."""
        rows, (low, high) = x.numel() // max(1, x.shape[-1]), OWN_ROWS
        if not low <= rows <= high or not _keeps(x, weight, KEPT_BYTES) or not _own(x) or not x.is_contiguous():
            return None
        return _packed.linear(x, self._own.of(weight, _packed.packed), bias, weight.shape[0])


def _keeps(x: torch.Tensor, weight: torch.Tensor, most: int) -> bool:
    """Whether anything is kept of a weight of at most so many bytes for a product with x."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and weight.numel() * weight.element_size() <= most
        and not weight.is_inference()
        and x.numel() > 0
    )


def _own(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and _packed.available()


def _winograd(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a 3x3 convolution of stride 1 and padding 1 is Winograd's."""
    fits = weight.shape[1] <= _packed.WINOGRAD_CHANNELS
    return fits and _keeps(x, weight, WINOGRAD_BYTES) and _own(x) and _is_channels_last(x)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
