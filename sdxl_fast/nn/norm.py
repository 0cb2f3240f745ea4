"""Group normalisation in one operation, alone or with the SiLU that follows it."""

from __future__ import annotations

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


class FusedIntoNorm(nn.Identity):
    """What stands where a SiLU was that its norm now computes."""
