"""Convolution for inference on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._convolution import KeptWeight


class PreparedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that keeps its weight in the order in which oneDNN reads it, for inference on a CPU.

    The order is made again when the weight has another address or autograd's version counter says that it was written
    to; a write through `.data` leaves no trace, and `forget` has to be called (`fuse` does so). The stock forward runs
    where it brings nothing (large maps or weights, maps that are not channels_last), with gradients on, under autocast,
    while torch.compile traces, and on other devices.
    """

    _kept: KeptWeight | None = None

    def forget(self) -> None:
        """Drop what was made from the weight."""
        self.__dict__.pop("_kept", None)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], as the stock module."""
        if input.is_cpu and input.ndim == 4 and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")):
            if self._kept is None:
                self._kept = KeptWeight()
            y = self._kept.conv2d(input, self.weight, self.bias, self.stride[0], int(self.padding[0]))
            if y is not None:
                return y
        return super().forward(input)


def can_prepare(module: nn.Conv2d) -> bool:
    """Whether a convolution does no more than `KeptWeight.conv2d` does."""
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    same_both_ways = module.stride[0] == module.stride[1] and module.padding[0] == module.padding[1]
    return same_both_ways and module.dilation == (1, 1) and "forward" not in vars(module)
