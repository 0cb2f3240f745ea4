"""SDXL's UNet as packed code: the same parameters, fewer and larger operations.

The time embeddings of all residual blocks come from one product, keys and values of all cross-attentions from another,
which a prompt needs once; self-attention projects with one packed weight; residuals are added where they are
normalised; the map stays channels-last from end to end; on a GPU a skip connection's map is read where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ModelError
from .float8 import Scales, fingerprint, suits
from .lru import ByteLru
from .packing import (
    Conv,
    Joined,
    Linear,
    Norm,
    NotPackableError,
    Product,
    Resnet,
    UpsampledConv,
    linear,
    mapped,
    nothing_set,
    pack,
    plain,
    refresh_parts,
    tokens,
)

PROMPT_BUDGET = 256 << 20
"""Bytes of cross-attention keys and values kept: ten prompts of SDXL in bf16, 26 MB each."""
_MAX_FOLDED = 64  # timesteps whose embedding is kept; samplers use a handful


class _Norm1d:
    """LayerNorm, of a sum if there is a residual; with `scale_y` in float8, for the one product that reads it."""

    def __init__(self, module: Any, name: str) -> None:
        plain(module, nn.LayerNorm, name)
        self.weight, self.bias, self.eps = module.weight, module.bias, module.eps

    def __call__(self, x: Tensor, scale_y: Tensor | None) -> Tensor:
        return cast(Tensor, ops.layer_norm(x, self.weight, self.bias, eps=self.eps, scale_y=scale_y))

    def of_sum(self, x: Tensor, residual: Tensor, scale_y: Tensor | None) -> tuple[Tensor, Tensor]:
        """LayerNorm(x + residual), and the sum."""
        found = ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual, scale_y=scale_y)
        return cast("tuple[Tensor, Tensor]", found)


class Attention:
    """One attention's projections; of cross-attention, keys and values are `columns` of the packed product."""

    def __init__(self, module: Any, name: str, *, cross: bool) -> None:
        from diffusers.models.attention_processor import Attention as Stock
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        plain(module, Stock, name)
        if type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
            raise NotPackableError(f"{name} has the processor {type(module.processor).__name__}")
        nothing_set(module, name, "spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
        nothing_set(module, name, "residual_connection", "is_causal", "fused_projections")
        unusual = module.rescale_output_factor != 1 or not module.scale_qk or module.inner_kv_dim != module.inner_dim
        self.q, self.k, self.v = (Linear(getattr(module, f"to_{x}"), f"{name}.to_{x}") for x in "qkv")
        if unusual or any(part.bias is not None for part in (self.q, self.k, self.v)):
            raise NotPackableError(f"{name} scales its output, shares keys between heads or has biases for them")
        self.out = Linear(module.to_out[0], f"{name}.to_out.0")
        self.heads, self.width = module.heads, module.inner_dim
        self.columns = (0, 0)
        self.qkv = self.q if cross else Joined([self.q, self.k, self.v], f"{name}.to_qkv")

    def of_itself(self, x: Tensor) -> Tensor:
        """[N, S, C] -> [N, S, C], out projection included."""
        n, s, _ = x.shape
        q, k, v = self.qkv(x).view(n, s, 3, self.heads, -1).unbind(2)
        return self.out(ops.self_attention(q, k, v).flatten(2))

    def of_prompt(self, x: Tensor, kv: Tensor) -> Tensor:
        """[N, S, C] over the prompt's packed keys and values [N, L, all columns] -> [N, S, C]."""
        first, second = self.columns
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k = kv[..., first : first + self.width].unflatten(-1, (self.heads, -1))
        v = kv[..., second : second + self.width].unflatten(-1, (self.heads, -1))
        return self.out(ops.cross_attention(q, k, v).flatten(2))


class _Block:
    """diffusers' `BasicTransformerBlock`."""

    def __init__(self, module: Any, name: str) -> None:
        from diffusers.models.activations import GEGLU
        from diffusers.models.attention import BasicTransformerBlock

        plain(module, BasicTransformerBlock, name)
        if module.norm_type != "layer_norm" or module.attn2 is None or module.only_cross_attention:
            raise NotPackableError(f"{name} is not SDXL's kind of transformer block")
        nothing_set(module, name, "pos_embed", "fuser", "_chunk_size")
        self.norms = [_Norm1d(getattr(module, f"norm{i}"), f"{name}.norm{i}") for i in (1, 2, 3)]
        self.itself = Attention(module.attn1, f"{name}.attn1", cross=False)
        self.prompt = Attention(module.attn2, f"{name}.attn2", cross=True)
        gate = plain(module.ff.net[0], GEGLU, f"{name}.ff.net.0")
        self.ff1 = Linear(gate.proj, f"{name}.ff.net.0.proj")
        self.ff2 = Linear(module.ff.net[2], f"{name}.ff.net.2")

    def __call__(self, x: Tensor, kv: Tensor) -> Tensor:
        h = self.itself.of_itself(self.norms[0](x, self.itself.qkv.scale_x))
        h, x = self.norms[1].of_sum(h, x, self.prompt.q.scale_x)
        h, x = self.norms[2].of_sum(self.prompt.of_prompt(h, kv), x, self.ff1.scale_x)
        return self.ff2(self.ff1.geglu(h, self.ff2.scale_x), x)

    def products(self) -> list[Linear]:
        """Its linear layers, but for the prompt's keys and values."""
        return [self.itself.qkv, self.itself.out, self.prompt.q, self.prompt.out, self.ff1, self.ff2]

    def produced(self) -> list[Linear]:
        """Those whose input a norm or the gate writes in float8 if they take it."""
        return [self.itself.qkv, self.prompt.q, self.ff1, self.ff2]


class _Transformer:
    """diffusers' `Transformer2DModel` over a map."""

    def __init__(self, module: Any, name: str) -> None:
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        plain(module, Transformer2DModel, name)
        if not module.is_input_continuous:
            raise NotPackableError(f"{name} does not read a map")
        self.norm = Norm(module.norm, f"{name}.norm", activation="none")
        self.proj_in, self.proj_out = (Linear(getattr(module, p), f"{name}.{p}") for p in ("proj_in", "proj_out"))
        self.blocks = [_Block(b, f"{name}.transformer_blocks.{i}") for i, b in enumerate(module.transformer_blocks)]

    def __call__(self, x: Tensor, kv: Tensor) -> Tensor:
        h = self.proj_in(tokens(self.norm(x, scale_y=self.proj_in.scale_x)))
        for block in self.blocks:
            h = block(h, kv)
        return mapped(self.proj_out(h, tokens(x)), x)


class _Stage:
    """One level on the way down or up, or the middle: residual blocks, each with a transformer after it or not."""

    def __init__(self, module: Any, name: str) -> None:
        self.resnets = [Resnet(r, f"{name}.resnets.{i}") for i, r in enumerate(module.resnets)]
        attentions = getattr(module, "attentions", None)
        found = (
            [] if attentions is None else [_Transformer(a, f"{name}.attentions.{i}") for i, a in enumerate(attentions)]
        )
        self.transformers: Sequence[_Transformer | None] = found or [None] * len(self.resnets)
        down, up = getattr(module, "downsamplers", None), getattr(module, "upsamplers", None)
        for resamplers in (down, up):
            if resamplers is not None and len(resamplers) != 1:
                raise NotPackableError(f"{name} resamples {len(resamplers)} times")
        self.down = None if down is None else _downsampler(down[0], f"{name}.downsamplers.0")
        self.up = None if up is None else UpsampledConv(up[0], f"{name}.upsamplers.0")

    def descend(self, x: Tensor, shifts: Iterator[Tensor], kv: Tensor, skips: list[Tensor]) -> Tensor:
        """Down one level; every intermediate map is added to `skips`."""
        for resnet, transformer in zip(self.resnets, self.transformers, strict=True):
            x = resnet(x, next(shifts))
            x = x if transformer is None else transformer(x, kv)
            skips.append(x)
        if self.down is not None:
            x = self.down(x)
            skips.append(x)
        return x

    def turn(self, x: Tensor, shifts: Iterator[Tensor], kv: Tensor) -> Tensor:
        """The middle: a residual block, then transformer and residual block in turn."""
        x = self.resnets[0](x, next(shifts))
        for transformer, resnet in zip(self.transformers, self.resnets[1:], strict=True):
            x = x if transformer is None else transformer(x, kv)
            x = resnet(x, next(shifts))
        return x

    def ascend(self, x: Tensor, shifts: Iterator[Tensor], kv: Tensor, skips: list[Tensor]) -> Tensor:
        """Up one level; takes its maps from the end of `skips`."""
        for resnet, transformer in zip(self.resnets, self.transformers, strict=True):
            x = resnet(x, next(shifts), skips.pop())
            x = x if transformer is None else transformer(x, kv)
        return x if self.up is None else self.up(x)


def _downsampler(module: Any, name: str) -> Conv:
    from diffusers.models.downsampling import Downsample2D

    plain(module, Downsample2D, name)
    nothing_set(module, name, "norm")
    if not module.use_conv or module.padding == 0:
        raise NotPackableError(f"{name} pools, or pads on one side")
    return Conv(module.conv, f"{name}.conv")


_STAGES = ("CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D")


class UNetProgram:
    """A UNet2DConditionModel of SDXL's kind, packed.

    Raises:
        NotPackableError: some part of it does something that this does not.
    """

    def __init__(self, unet: Any) -> None:
        _check(unet)
        self._unet = unet
        self.dtype, self.device = unet.conv_in.weight.dtype, unet.conv_in.weight.device
        self._conv_in, self._conv_out = Conv(unet.conv_in, "conv_in"), Conv(unet.conv_out, "conv_out")
        self._norm_out = Norm(unet.conv_norm_out, "conv_norm_out", activation="silu")
        self._downs = [_Stage(b, f"down_blocks.{i}") for i, b in enumerate(unet.down_blocks)]
        self._middle = _Stage(unet.mid_block, "mid_block")
        self._ups = [_Stage(b, f"up_blocks.{i}") for i, b in enumerate(unet.up_blocks)]
        self._factor = 2 ** sum(stage.up is not None for stage in self._ups)
        stages = [*self._downs, self._middle, *self._ups]
        times = [cast(Linear, r.time) for stage in stages for r in stage.resnets]
        self._time_weight = pack([t.weight for t in times])
        self._time_bias = pack([t.bias for t in times])
        self._time_widths = [len(t.weight) for t in times]
        self._kv_weight = self._pack_prompt(stages)
        self._transformers = [t for stage in stages for t in stage.transformers if t is not None]
        resnets = [resnet for stage in stages for resnet in stage.resnets]
        self._inner_convolutions: list[Product] = [c for resnet in resnets for c in (resnet.conv1, resnet.conv2)]
        self._folded: dict[float, Tensor] = {}
        self._prompts: ByteLru[tuple[Tensor, int, Tensor]] = ByteLru(PROMPT_BUDGET)

    def refresh(self) -> None:
        """Forget what was made of weights that have changed since, or make it again."""
        self._folded.clear()
        self._prompts.clear()
        refresh_parts(self)

    def float8_products(self) -> list[Product]:
        """What may be put into float8: the transformers' linear layers and the residual blocks' two convolutions."""
        found: list[Product] = []
        for t in self._transformers:
            found += [t.proj_in, *(product for block in t.blocks for product in block.products()), t.proj_out]
        return found + self._inner_convolutions

    def check_scales(self, scales: Scales) -> None:
        """Raises ModelError for the scales of another model."""
        known = [product for product in self.float8_products() if suits(product) and product.name in scales.inputs]
        if fingerprint(known) != scales.model:
            raise ModelError("these float8 scales belong to another model, or to this one without its LoRAs")

    def quantise(self, scales: Scales | None) -> None:
        """Put layers into float8, or all back; float8 gives bfloat16, so weights of another dtype stay."""
        wanted = {} if scales is None or self.dtype != torch.bfloat16 else scales.used
        for product in self.float8_products():
            found = wanted.get(product.name) if suits(product) else None
            product.float8 = None if found is None else product.in_float8(found)

    @property
    def float8_inputs(self) -> tuple[int, int]:
        """How many products in float8 read what the operation before wrote in it, and how many there are."""
        products = [*self._inner_convolutions]
        for t in self._transformers:
            products += [t.proj_in, *(product for block in t.blocks for product in block.produced())]
        used = sum(product.float8 is not None for product in self.float8_products())
        return sum(product.float8 is not None for product in products), used

    @property
    def float8_bytes(self) -> int:
        """Bytes of weights in float8, beside those they were rounded from."""
        return sum(product.float8.nbytes for product in self.float8_products() if product.float8 is not None)

    @property
    def cached_bytes(self) -> int:
        """Bytes of keys and values held for prompts."""
        return self._prompts.used

    def fits(self, sample: Tensor) -> bool:
        """Whether the map can be halved as often as the UNet does; others need diffusers' odd upsampling."""
        return sample.shape[-2] % self._factor == 0 and sample.shape[-1] % self._factor == 0

    def keys_and_values(self, prompt_embeds: Tensor) -> Tensor:
        """Keys and values of every cross-attention, [N, L, columns], kept while the tensor stays as it is."""
        key = id(prompt_embeds)
        found = self._prompts.get(key)
        if found is not None and found[0] is prompt_embeds and found[1] == prompt_embeds._version:
            return found[2]
        kv = linear(prompt_embeds, self._kv_weight)
        nbytes = sum(t.numel() * t.element_size() for t in (kv, prompt_embeds))
        self._prompts.put(key, (prompt_embeds, prompt_embeds._version, kv), nbytes)
        return kv

    def shifts(self, timestep: Tensor | float | int, batch: int, added: dict[str, Tensor]) -> Tensor:
        """What the time embedding adds to the maps of all residual blocks, [N, all channels]."""
        unet, text, ids = self._unet, added["text_embeds"], added["time_ids"]
        emb = self._time_embedding(timestep, batch)
        numbers = unet.add_time_proj(ids.flatten()).reshape(len(text), -1)
        emb = emb + unet.add_embedding(torch.cat((text, numbers), -1).to(emb.dtype))
        return linear(F.silu(emb), self._time_weight, self._time_bias)

    def __call__(self, sample: Tensor, shifts: Tensor, kv: Tensor, *residuals: Tensor) -> Tensor:
        """The UNet's output [N, C, H, W] for a noisy latent, `shifts` and `keys_and_values`; legal in a CUDA graph.

        `residuals` are a ControlNet's: one for every skip connection in order, then that of the middle.
        """
        parts = iter([part.contiguous() for part in shifts.split(self._time_widths, 1)])
        x = self._conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for stage in self._downs:
            x = stage.descend(x, parts, kv, skips)
        if residuals:
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
        x = self._middle.turn(x, parts, kv)
        if residuals:
            x = x + residuals[-1]
        for stage in self._ups:
            x = stage.ascend(x, parts, kv, skips)
        return self._conv_out(self._norm_out(x))

    def _time_embedding(self, timestep: Tensor | float | int, batch: int) -> Tensor:
        """[1 or N, T]; of a timestep that the host knows, computed once."""
        known = float(timestep) if not isinstance(timestep, Tensor) or _on_host(timestep) else None
        if known is not None and known in self._folded:
            return self._folded[known]
        t = torch.as_tensor(timestep, device=self.device).reshape(-1)
        emb: Tensor = self._unet.time_embedding(self._unet.time_proj(t).to(self.dtype))
        if known is not None:
            if len(self._folded) >= _MAX_FOLDED:
                self._folded.clear()
            self._folded[known] = emb
        return emb

    def _pack_prompt(self, stages: Sequence[_Stage]) -> Tensor:
        """The weight that makes all keys and values; every cross-attention is told its columns."""
        attentions = [
            block.prompt
            for stage in stages
            for transformer in stage.transformers
            if transformer is not None
            for block in transformer.blocks
        ]
        if not attentions:
            raise NotPackableError("it has no cross-attention")
        column = 0
        for attention in attentions:
            attention.columns = (column, column + attention.width)
            column += 2 * attention.width
        return pack([part.weight for attention in attentions for part in (attention.k, attention.v)])


def _on_host(t: Tensor) -> bool:
    return t.numel() == 1 and t.device.type == "cpu"


def _check(unet: Any) -> None:
    """Raises NotPackableError unless the UNet as a whole is SDXL's kind."""
    config = unet.config
    if "forward" in unet.__dict__ or hasattr(unet, "_hf_hook"):
        raise NotPackableError("its weights are moved about (offloading)")
    if config.addition_embed_type != "text_time":
        raise NotPackableError(f"addition_embed_type is {config.addition_embed_type!r}, not SDXL's 'text_time'")
    if config.time_cond_proj_dim is not None:
        raise NotPackableError("it takes a guidance embedding")
    nothing_set(unet, "unet", "class_embedding", "encoder_hid_proj", "time_embed_act", "position_net")
    if config.center_input_sample or unet.mid_block is None or unet.conv_norm_out is None:
        raise NotPackableError("it centres its input, or lacks the middle block or the last norm")
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        name = type(block).__name__
        if name not in _STAGES or not type(block).__module__.startswith("diffusers."):
            raise NotPackableError(f"{name} is not a block of SDXL's UNet")
        plain(block, type(block), name)
        if any(getattr(block, attribute, None) for attribute in ("s1", "s2", "b1", "b2")):
            raise NotPackableError("FreeU is on")
