"""Attention as SDXL's UNet and VAE have it."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention as StockAttention
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from .. import ops

# The processors that compute plain attention; whatever else is set, before or after, runs as it is.
_PLAIN = (AttnProcessor, AttnProcessor2_0)
# Arguments that models pass along and plain attention has no use for.
_OF_NO_USE = {"temb", "ip_adapter_masks", "ip_hidden_states"}
# Keys that cross_attention sees all at once; a longer prompt is left to self_attention, which streams them.
_MOST_KEYS = 256


class Attention(StockAttention):
    """diffusers' `Attention` on `ops.self_attention`, `ops.cross_attention` and, with one head, `ops.vae_attention`.

    The projections stay the modules `to_q`, `to_k`, `to_v` and `to_out`, which are called, so LoRA layers on them work.
    The stock forward runs when the processor is another one than diffusers' default, and for a call with a mask. A map
    in channels_last comes in and goes out without a copy.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """[N, S, C] or [N, C, H, W], and for cross-attention [N, T, C'], to the shape of the former."""
        unknown = cross_attention_kwargs.keys() - _OF_NO_USE
        if attention_mask is not None or unknown or why_not_fused(self):
            stock: Tensor = super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
            return stock
        y = self._attend(self._tokens(hidden_states), encoder_hidden_states)
        y = self.to_out[1](self.to_out[0](y))
        if hidden_states.ndim == 4:
            y = y.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        # The input first: where layouts differ, its own is the result's.
        y = hidden_states + y if self.residual_connection else y
        return y if self.rescale_output_factor == 1 else y / self.rescale_output_factor

    def _tokens(self, x: Tensor) -> Tensor:
        """[N, C, H, W] or [N, S, C] to normalised tokens [N, S, C], of channels_last a view."""
        if x.ndim == 4:
            return (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)
        return x if self.group_norm is None else self.group_norm(x.transpose(1, 2)).transpose(1, 2)

    def _attend(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """[N, S, C] and, of another sequence, [N, T, C'] to [N, S, heads * D]."""
        source = tokens if context is None else context
        q, k, v = self.to_q(tokens), self.to_k(source), self.to_v(source)
        k, v = k.to(q.dtype), v.to(q.dtype)  # as autocast would, should an adapter's layers differ
        if self.heads == 1:
            return ops.vae_attention(q, k, v)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        few = context is not None and k.shape[1] <= _MOST_KEYS
        return (ops.cross_attention if few else ops.self_attention)(q, k, v).flatten(2)


def operation(module: StockAttention) -> str:
    """Returns the name of the operation that the module runs on."""
    if module.heads == 1:
        return "vae_attention"
    return "cross_attention" if module.is_cross_attention else "self_attention"


def why_not_fused(module: StockAttention) -> str | None:
    """Returns why the operations do not do what this module does, or None when they do."""
    if type(module.processor) not in _PLAIN:
        return f"its processor is {type(module.processor).__name__}, not diffusers' default"
    norms = (module.spatial_norm, module.norm_q, module.norm_k, module.norm_cross)
    if any(norm is not None for norm in norms):
        return "it has norms of its own between the projections"
    if module.add_k_proj is not None or module.to_k is None or module.to_out is None:
        return "it has other projections than one each for q, k, v and out"
    if module.inner_kv_dim != module.inner_dim or not module.scale_qk or module.is_causal or module.fused_projections:
        return "it shares keys between heads, masks, packs its projections or does not scale"
    return None
