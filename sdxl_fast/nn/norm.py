"""Normalisation in one operation: GroupNorm alone or with the SiLU that follows, LayerNorm with the sum before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` through `ops.group_norm_silu` without activation.

    Input and output [N, C, ...] of any rank from 2, in float32, bfloat16 or float16 (float64 on CPU); memory format
    and dtype are kept. The parameters may be float32 beside a 16-bit input, as under autocast, where unlike the stock
    module the output stays 16-bit; statistics are float32 either way.
    """

    activation = "none"

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalise `input` plus an optional per-sample, per-channel `shift` [N, C] of the same dtype."""
        x = input if input.ndim == 4 else input.reshape(*input.shape[:2], -1, 1)
        y = ops.group_norm_silu(
            x,
            self.weight,
            self.bias,
            num_groups=self.num_groups,
            eps=self.eps,
            shift=shift,
            activation=self.activation,
        )
        return y if input.ndim == 4 else y.reshape(input.shape)


class GroupNormSiLU(GroupNorm):
    """`torch.nn.GroupNorm` followed by `torch.nn.SiLU`, as one operation."""

    activation = "silu"


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension through `ops.layer_norm`.

    Input and output [..., C], in float32, bfloat16 or float16 (float64 on CPU); the dtype is kept, also under autocast
    with float32 parameters, where the stock module's output on a GPU is float32. Statistics are float32 either way.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """Normalise `input`; with a `residual` of its shape their sum, and return (normalised, sum)."""
        if residual is not None and residual.dtype != input.dtype:
            total = input + residual
            return self(total), total
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps, residual=residual)


def why_not_fused(norm: nn.LayerNorm) -> str | None:
    """Returns why `ops.layer_norm` does not do what a LayerNorm does, or None when it does."""
    if len(norm.normalized_shape) != 1:
        return "it normalises several dimensions together"
    if (norm.weight is None) != (norm.bias is None):
        return "it has a weight and no bias"
    return None


class FusedIntoNorm(nn.Identity):
    """What stands where a SiLU was that its norm now computes."""
