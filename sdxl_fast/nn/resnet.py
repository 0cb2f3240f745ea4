"""The residual block of SDXL's UNet and VAE."""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D as StockResnetBlock2D
from torch import Tensor

from .norm import GroupNormSiLU


class ResnetBlock2D(StockResnetBlock2D):
    """diffusers' `ResnetBlock2D` with both GroupNorm+SiLU pairs fused, the second together with the time embedding.

    Only the "default" time embedding and SiLU are meant by it; `fuse` leaves other blocks alone. Parameter names are
    the stock ones.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.time_embedding_norm != "default":
            raise ValueError(f"time_embedding_norm is {self.time_embedding_norm!r}; only 'default' is fused")
        if arguments.get("non_linearity", "swish") not in ("swish", "silu"):
            raise ValueError(f"non_linearity is {arguments['non_linearity']!r}; only 'silu' is fused")
        self.norm1.__class__ = self.norm2.__class__ = GroupNormSiLU

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """[N, C, H, W] and the time embedding [N, T] to [N, C', H', W']; extra arguments are ignored."""
        hidden_states = self.norm1(input_tensor)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            input_tensor, hidden_states = resample(input_tensor), resample(hidden_states)
        hidden_states = self.conv1(hidden_states)
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            shift = shift.to(hidden_states.dtype)
        hidden_states = self.conv2(self.dropout(self.norm2(hidden_states, shift)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        total: Tensor = input_tensor + hidden_states
        return total if self.output_scale_factor == 1 else total / self.output_scale_factor
