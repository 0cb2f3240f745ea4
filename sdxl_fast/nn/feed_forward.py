"""The gated feed-forward of SDXL's transformer blocks."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU as StockGEGLU  # noqa: N811 (a class)
from torch import Tensor, nn

from .. import ops
from .hooks import has_hooks
from .products import PreparedLinear


class GEGLU(StockGEGLU):
    """diffusers' `GEGLU`: projects [..., dim_in] to twice dim_out and gates one half by the GELU of the other.

    The projection is the module `proj`, as in the stock class, so a LoRA on it works.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., dim_in] -> [..., dim_out]; extra arguments are ignored as the stock module does."""
        y: Tensor = ops.geglu(self.proj(hidden_states))
        return y


class ProjectedGEGLU(GEGLU):
    """`GEGLU` with the projection in the same operation, which then stores the result alone.

    That is for inference: a backward has to project again. A projection that is more than a plain `nn.Linear` (LoRA
    layers, hooks, on a CPU a `PreparedLinear`) is called as before.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., dim_in] -> [..., dim_out]; extra arguments are ignored as the stock module does."""
        at_once = type(self.proj) is nn.Linear or (type(self.proj) is PreparedLinear and not hidden_states.is_cpu)
        if not at_once or has_hooks(self.proj):
            return super().forward(hidden_states)
        return ops.linear_geglu(hidden_states, self.proj.weight, self.proj.bias)
