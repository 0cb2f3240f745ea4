"""The gated feed-forward of SDXL's transformer blocks."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU as StockGEGLU  # noqa: N811 (a class)
from torch import Tensor

from .. import ops


class GEGLU(StockGEGLU):
    """diffusers' `GEGLU`: projects [..., dim_in] to twice dim_out and gates one half by the GELU of the other.

    The projection is the module `proj`, as in the stock class, so a LoRA on it works.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., dim_in] -> [..., dim_out]; extra arguments are ignored as the stock module does."""
        y: Tensor = ops.geglu(self.proj(hidden_states))
        return y
