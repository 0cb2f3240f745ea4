"""Upsampling as SDXL's UNet and VAE do it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D as StockUpsample2D
from torch import Tensor, nn

from .. import ops
from ..dispatch import forced_backend
from ..ops._derived import Derived
from ..ops._kept import KeptWeight
from ..reference.upsample_conv2d import phase_weights
from .classes import kind
from .hooks import has_hooks
from .products import PreparedConv2d

# On a CPU, with the sums of the weights made for each call. Both passes of 144 channels on 2 Zen 4 cores, ours and
# stock, ms: 16 positions 0.87 and 0.64, 128 positions 5.3 and 3.5, 256 positions 6.8 and 6.0, 768 positions 11 and 16.
_FEW_POSITIONS = 512


class Upsample2D(StockUpsample2D):
    """diffusers' `Upsample2D` with upsampling and convolution as one operation that skips 5 of 9 multiplications.

    The convolution stays the module `conv`, under its name and with its parameters. When something stands in its place
    (a LoRA layer, say), when hooks wait for it, or when another size than the double is asked for, the stock forward
    runs.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """[N, C, H, W] -> [N, C', 2H, 2W]; extra arguments are for the stock module."""
        if args or kwargs or why_not_fused(self) or not _is_double(output_size, hidden_states):
            y: Tensor = super().forward(hidden_states, output_size, *args, **kwargs)
            return y
        convolution: Any = self.conv if self.name == "conv" else self.Conv2d_0
        return self._upsampled(hidden_states, convolution.weight, convolution.bias)

    def _upsampled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Nothing is kept of the weight, as training changes it with every step: a small map does not pay for that."""
        if not torch.compiler.is_compiling() and _is_small(x) and weight.dtype == x.dtype and forced_backend() is None:
            return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
        return ops.upsample_conv2d(x, weight, bias)


class PreparedUpsample2D(Upsample2D):
    """`Upsample2D` that keeps what it makes of its weights, for inference.

    They are made again when the weight has another address or autograd's version counter says that it was written to;
    a write through `.data` leaves no trace, and `forget` has to be called (`fuse` does so). Where the weight needs a
    gradient, under autocast and while torch.compile traces, nothing is kept.
    """

    _phases: Derived | None = None
    _kept: KeptWeight | None = None

    def forget(self) -> None:
        """Drop what was made from the weights."""
        for name in ("_phases", "_kept"):
            self.__dict__.pop(name, None)

    def _upsampled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or (weight.requires_grad and torch.is_grad_enabled())
            or weight.dtype != x.dtype
            or torch.is_autocast_enabled(x.device.type)
            or weight.is_inference()
        ):
            return super()._upsampled(x, weight, bias)
        if self._phases is None or self._kept is None:
            self._phases, self._kept = Derived(), KeptWeight()
        y = None if forced_backend() else self._kept.upsample_conv2d(x, weight, bias)
        if y is not None:
            return y
        return ops.upsample_conv2d(x, weight, bias, phases=self._phases.of(weight, phase_weights))


def why_not_fused(module: StockUpsample2D) -> str | None:
    """Returns why the fused operation does not do what this module does, or None when it does."""
    convolution: Any = getattr(module, "conv" if module.name == "conv" else "Conv2d_0", None)
    if not module.use_conv:
        return "it has no convolution"
    if module.use_conv_transpose or not module.interpolate or module.norm is not None:
        return "it does more, or other things, than upsample and convolve"
    if kind(convolution) not in (nn.Conv2d, PreparedConv2d):
        return f"its convolution is wrapped in {type(convolution).__name__} (LoRA?)"
    if has_hooks(convolution):
        return "its convolution has hooks, which the fused operation would pass by"
    shape = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or convolution.padding_mode != "zeros":
        return "its convolution is not 3x3 with padding 1"
    return None


def _is_small(x: Tensor) -> bool:
    return x.is_cpu and x.shape[0] * x.shape[2] * x.shape[3] < _FEW_POSITIONS


def _is_double(output_size: Any, x: Tensor) -> bool:
    return output_size is None or tuple(output_size) == (2 * x.shape[-2], 2 * x.shape[-1])
