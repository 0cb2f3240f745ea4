# SPDX-License-Identifier: Apache-2.0
"""What is made from a weight once and used many times."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Derived:
    """A tensor made from a weight, kept until the weight changes.

    It is made again when the weight has another address, dtype or device, or autograd's version counter says that it
    was written to; a write through ``.data`` leaves no trace, and :meth:`forget` has to be called. A copy, pickled or
    not, starts with nothing.
    """

    def __init__(self) -> None:
        self._state: object = None
        self.tensor: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def forget(self) -> None:
        """Drops it, to be made again."""
        self._state = self.tensor = None

    def of(self, weight: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Returns ``make(weight)``, or what an earlier call has returned for the weight as it is now."""
        state = weight.data_ptr(), weight._version, weight.dtype, weight.device
        if self.tensor is None or self._state != state:
            # a tensor of inference mode could not be used where gradients flow past a frozen weight
            with torch.inference_mode(False), torch.no_grad():
                self.tensor, self._state = make(weight.detach()), state
        return self.tensor
