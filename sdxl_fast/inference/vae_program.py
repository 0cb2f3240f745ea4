"""The VAE's decoder as packed code, in a dtype of its own.

SDXL's VAE overflows in float16, so diffusers casts it to float32 and back on every call. Here such a VAE's decoder is
copied once to bfloat16, whose range is float32's; any other is used as it is, without a copy.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .packing import (
    Conv,
    Joined,
    Linear,
    Norm,
    NotPackableError,
    Resnet,
    UpsampledConv,
    mapped,
    nothing_set,
    plain,
    refresh_parts,
    tokens,
)


class _Attention:
    """The single-head attention in the middle."""

    def __init__(self, module: Any, name: str) -> None:
        from diffusers.models.attention_processor import Attention as Stock
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        plain(module, Stock, name)
        if type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
            raise NotPackableError(f"{name} has the processor {type(module.processor).__name__}")
        nothing_set(module, name, "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "is_causal")
        if module.group_norm is None or not module.residual_connection or module.rescale_output_factor != 1:
            raise NotPackableError(f"{name} is not the attention of an SDXL VAE")
        self.norm = Norm(module.group_norm, f"{name}.group_norm", activation="none")
        parts = [Linear(getattr(module, f"to_{x}"), f"{name}.to_{x}") for x in "qkv"]
        if any(part.bias is None for part in parts):
            raise NotPackableError(f"{name} has no biases")
        self.qkv = Joined(parts, f"{name}.qkv")
        self.out, self.heads = Linear(module.to_out[0], f"{name}.to_out.0"), module.heads

    def __call__(self, x: Tensor) -> Tensor:
        h = tokens(self.norm(x))
        n, s, _ = h.shape
        qkv = self.qkv(h)
        if self.heads == 1:
            y = ops.vae_attention(*qkv.chunk(3, -1))
        else:
            y = ops.self_attention(*qkv.view(n, s, 3, self.heads, -1).unbind(2)).flatten(2)
        return mapped(self.out(y, tokens(x)), x)


class DecoderProgram:
    """The decoder of an AutoencoderKL, packed.

    Args:
        vae: an AutoencoderKL.
        dtype: to compute in; None is bfloat16 for a float16 VAE that says it needs float32, and otherwise its own.

    Raises:
        NotPackableError: some part of it does something that this does not.
    """

    def __init__(self, vae: Any, *, dtype: torch.dtype | None = None) -> None:
        if "forward" in vae.__dict__ or hasattr(vae, "_hf_hook"):
            raise NotPackableError("its weights are moved about (offloading)")
        found = vae.decoder.conv_in.weight.dtype
        overflows = found == torch.float16 and vae.config.force_upcast
        self.dtype = dtype or (torch.bfloat16 if overflows else found)
        self.device = vae.decoder.conv_in.weight.device
        decoder, post = vae.decoder, vae.post_quant_conv
        self.copied = self.dtype != found
        self._originals = (decoder, post)
        if self.copied:
            decoder, post = copy.deepcopy((decoder, post))
            decoder.to(self.dtype)
            if post is not None:
                post.to(self.dtype)
        self._copies = (decoder, post)
        self._post = None if post is None else Conv(post, "post_quant_conv")
        self._assemble(decoder)

    def refresh(self) -> None:
        """Take over the VAE's weights again, where they were copied or summed."""
        for mine, its in zip(self._copies, self._originals, strict=True):
            if self.copied and mine is not None:
                mine.load_state_dict(its.state_dict())
        refresh_parts(self)

    def fits(self, latents: Tensor) -> bool:
        """Every size does."""
        return latents.ndim == 4

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, H, W], nominally in -1..1, of latents [N, C, h, w] divided by the scaling factor."""
        x = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = x if self._post is None else self._post(x)
        x = self._middle[0](self._conv_in(x))
        for attention, resnet in zip(self._attentions, self._middle[1:], strict=True):
            x = resnet(x if attention is None else attention(x))
        for resnets, up in self._levels:
            for resnet in resnets:
                x = resnet(x)
            x = x if up is None else up(x)
        return self._conv_out(self._norm_out(x))

    def _assemble(self, decoder: Any) -> None:
        from diffusers.models.autoencoders.vae import Decoder
        from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D

        plain(decoder, Decoder, "decoder")
        middle = plain(decoder.mid_block, UNetMidBlock2D, "mid_block")
        self._conv_in, self._conv_out = Conv(decoder.conv_in, "conv_in"), Conv(decoder.conv_out, "conv_out")
        self._norm_out = Norm(decoder.conv_norm_out, "conv_norm_out", activation="silu")
        self._middle = [Resnet(r, f"mid_block.resnets.{i}") for i, r in enumerate(middle.resnets)]
        self._attentions = [
            None if a is None else _Attention(a, f"mid_block.attentions.{i}") for i, a in enumerate(middle.attentions)
        ]
        self._levels = []
        for i, block in enumerate(decoder.up_blocks):
            plain(block, UpDecoderBlock2D, f"up_blocks.{i}")
            nothing_set(block, f"up_blocks.{i}", "resolution_idx")
            resnets = [Resnet(r, f"up_blocks.{i}.resnets.{k}") for k, r in enumerate(block.resnets)]
            ups = block.upsamplers
            up = None if ups is None else UpsampledConv(ups[0], f"up_blocks.{i}.upsamplers.0")
            self._levels.append((resnets, up))
