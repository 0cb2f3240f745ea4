# SPDX-License-Identifier: Apache-2.0
"""The public operations. Each picks the fastest backend that can run the call; see :mod:`sdxl_fast.dispatch`."""

from sdxl_fast.ops.conv2d import conv2d
from sdxl_fast.ops.cross_attention import cross_attention
from sdxl_fast.ops.ddim_move import ddim_move
from sdxl_fast.ops.disc_head import disc_head
from sdxl_fast.ops.forward_diffusion import forward_diffusion
from sdxl_fast.ops.geglu import geglu
from sdxl_fast.ops.group_norm_silu import group_norm_silu
from sdxl_fast.ops.layer_norm import layer_norm
from sdxl_fast.ops.linear import linear
from sdxl_fast.ops.linear_geglu import linear_geglu
from sdxl_fast.ops.lora_merge import lora_merge
from sdxl_fast.ops.self_attention import self_attention
from sdxl_fast.ops.to_uint8 import to_uint8
from sdxl_fast.ops.token_head import token_head
from sdxl_fast.ops.upsample_conv2d import upsample_conv2d
from sdxl_fast.ops.vae_attention import vae_attention

__all__ = [
    "conv2d",
    "cross_attention",
    "ddim_move",
    "disc_head",
    "forward_diffusion",
    "geglu",
    "group_norm_silu",
    "layer_norm",
    "linear",
    "linear_geglu",
    "lora_merge",
    "self_attention",
    "to_uint8",
    "token_head",
    "upsample_conv2d",
    "vae_attention",
]
