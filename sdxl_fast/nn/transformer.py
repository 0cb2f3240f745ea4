"""The transformer block of SDXL's UNet."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock as StockBlock
from torch import Tensor, nn

from .classes import kind
from .norm import LayerNorm
from .norm import why_not_fused as why_not_the_norm

# Arguments of cross-attention that mean more than plain attention inside the block.
_MORE = {"gligen", "scale"}


class BasicTransformerBlock(StockBlock):
    """diffusers' `BasicTransformerBlock`: each residual is added in the LayerNorm that follows it.

    Attention and feed-forward are the modules they were. The stock forward runs for what SDXL's blocks do not have:
    other norms, positional embeddings, GLIGEN, a chunked feed-forward, or a norm that something has taken the place of.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """[N, S, C] and the text [N, T, C'] to [N, S, C]; the other arguments as the stock block has them."""
        options = cross_attention_kwargs or {}
        if hidden_states.ndim != 3 or options.keys() & _MORE or not self._norms_are_fused():
            stock: Tensor = super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
            return stock
        context = encoder_hidden_states if self.only_cross_attention else None
        y = self.attn1(
            self.norm1(hidden_states), encoder_hidden_states=context, attention_mask=attention_mask, **options
        )
        if self.attn2 is not None:
            normed, hidden_states = self.norm2(y, hidden_states)
            y = self.attn2(
                normed,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **options,
            )
        normed, hidden_states = self.norm3(y, hidden_states)
        return self.ff(normed) + hidden_states

    def _norms_are_fused(self) -> bool:
        """Whether the block is still what it was when it was fused; models are changed after that too."""
        norms = (self.norm2, self.norm3) if self.attn2 is not None else (self.norm3,)
        return all(isinstance(norm, LayerNorm) for norm in norms) and _why_another(self) is None


def why_not_fused(block: StockBlock) -> str | None:
    """Returns why the fused block does not do what this one does, or None when it does."""
    norms: list[Any] = [norm for norm in (block.norm1, block.norm2, block.norm3) if norm is not None]
    for norm in norms:
        if kind(norm) not in (nn.LayerNorm, LayerNorm) or "forward" in vars(norm):
            return f"its norm is {type(norm).__name__}, or one whose forward is overridden, not LayerNorm"
        if reason := why_not_the_norm(norm):
            return f"of its norm: {reason}"
    return _why_another(block)


def _why_another(block: StockBlock) -> str | None:
    if block.norm_type != "layer_norm":
        return f"norm_type is {block.norm_type!r}, only 'layer_norm' is fused"
    if block.pos_embed is not None or getattr(block, "fuser", None) is not None:
        return "it has positional embeddings or GLIGEN's layers"
    return "its feed-forward is chunked" if block._chunk_size is not None else None
