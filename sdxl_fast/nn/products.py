"""Convolutions and linear layers for inference on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._kept import KeptWeight


class _Kept:
    """What the two modules share: a weight kept in the order in which a CPU reads it.

    The order is made again when the weight has another address or autograd's version counter says that it was written
    to; a write through `.data` leaves no trace, and `forget` has to be called (`fuse` does so). The stock forward runs
    where it brings nothing (see `sdxl_fast.ops._kept`), with gradients on, under autocast, while torch.compile traces,
    and on other devices.
    """

    _kept: KeptWeight | None = None

    def forget(self) -> None:
        """Drop what was made from the weight."""
        self.__dict__.pop("_kept", None)

    def _keeping(self, x: Tensor) -> KeptWeight | None:
        if not x.is_cpu or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        if self._kept is None:
            self._kept = KeptWeight()
        return self._kept


class PreparedConv2d(_Kept, nn.Conv2d):
    """`torch.nn.Conv2d` that keeps its weight in the order in which a CPU reads it, for inference."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], as the stock module."""
        kept = self._keeping(input) if input.ndim == 4 else None
        y = None if kept is None else kept.conv2d(input, self.weight, self.bias, self.stride[0], int(self.padding[0]))
        return super().forward(input) if y is None else y


class PreparedLinear(_Kept, nn.Linear):
    """`torch.nn.Linear` that keeps its weight in the order in which a CPU reads it, for inference."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., C'], as the stock module."""
        kept = self._keeping(input)
        y = None if kept is None else kept.linear(input, self.weight, self.bias)
        return super().forward(input) if y is None else y


PREPARED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: PreparedConv2d, nn.Linear: PreparedLinear}
"""By stock class."""
STOCK: dict[type[nn.Module], type[nn.Module]] = {prepared: plain for plain, prepared in PREPARED.items()}
"""By prepared class."""


def can_prepare(module: nn.Module) -> bool:
    """Whether a module does no more than what `KeptWeight` does in its place."""
    if "forward" in vars(module):
        return False
    if not isinstance(module, nn.Conv2d):
        return True
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    return module.stride[0] == module.stride[1] and module.padding[0] == module.padding[1] and module.dilation == (1, 1)
