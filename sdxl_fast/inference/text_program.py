"""SDXL's text encoders as packed code: one product for queries, keys and values, no mask, no layer that nobody reads.

transformers' CLIP towers build a causal mask, record every layer through hooks and copy keyword arguments on each call,
which costs more than the arithmetic of a short batch. `PackedText` is their class with that replaced; whatever else is
asked of it (masks, attention weights, gradients) goes to the modules.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from .. import ops
from .packing import Joined, Linear, NotPackableError, plain, refresh_parts
from .runner import refusal, runner_of

_OLD_EOS = 2
"""The end token that configurations of transformers before 4.31 state, whatever the tokenizer's is."""


class _Norm:
    """LayerNorm."""

    def __init__(self, module: Any, name: str) -> None:
        plain(module, nn.LayerNorm, name)
        self.weight, self.bias, self.eps = module.weight, module.bias, module.eps

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, ops.layer_norm(x, self.weight, self.bias, eps=self.eps))


class _Layer:
    """transformers' `CLIPEncoderLayer`, causal."""

    def __init__(self, module: Any, name: str) -> None:
        _unhooked(module, name)
        attention, mlp = module.self_attn, module.mlp
        parts = [Linear(getattr(attention, f"{x}_proj"), f"{name}.self_attn.{x}_proj") for x in "qkv"]
        if any(part.bias is None for part in parts) or attention.scale != attention.head_dim**-0.5:
            raise NotPackableError(f"{name} has no biases, or scales its attention otherwise")
        self.heads = attention.num_heads
        self.qkv = Joined(parts, f"{name}.self_attn.qkv")
        self.norm1 = _Norm(module.layer_norm1, f"{name}.layer_norm1")
        self.norm2 = _Norm(module.layer_norm2, f"{name}.layer_norm2")
        self.out = Linear(attention.out_proj, f"{name}.self_attn.out_proj")
        self.fc1, self.fc2 = Linear(mlp.fc1, f"{name}.mlp.fc1"), Linear(mlp.fc2, f"{name}.mlp.fc2")
        self.activation = mlp.activation_fn

    def __call__(self, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, s, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.out(y.transpose(1, 2).flatten(2), x)
        return self.fc2(self.activation(self.fc1(self.norm2(x))), x)


class TextProgram:
    """A CLIPTextModel, alone or with its projection, packed.

    Raises:
        NotPackableError: some part of it does something that this does not.
    """

    def __init__(self, model: Any) -> None:
        inner = getattr(model, "text_model", model)
        if "forward" in model.__dict__ or hasattr(model, "_hf_hook"):
            raise NotPackableError("its weights are moved about (offloading)")
        tables = inner.embeddings
        self._tokens = plain(tables.token_embedding, nn.Embedding, "token_embedding").weight
        self._positions = plain(tables.position_embedding, nn.Embedding, "position_embedding").weight
        self._layers = [_Layer(layer, f"encoder.layers.{i}") for i, layer in enumerate(inner.encoder.layers)]
        self._norm = _Norm(inner.final_layer_norm, "final_layer_norm")
        projection = getattr(model, "text_projection", None)
        self._projection = None if projection is None else Linear(projection, "text_projection")
        self._end = model.config.eos_token_id
        self.dtype, self.device = self._tokens.dtype, self._tokens.device

    def refresh(self) -> None:
        """Forget what was made of weights that have changed since."""
        refresh_parts(self)

    def fits(self, ids: Tensor) -> bool:
        """Whether there is a position for every token of ids [B, L]."""
        return ids.ndim == 2 and ids.shape[1] <= len(self._positions)

    def states(self, ids: Tensor, *, skip: int = 0) -> list[Tensor]:
        """The embedded tokens and what every layer but the last `skip` makes of them, each [B, L, D]."""
        x = F.embedding(ids, self._tokens) + self._positions[: ids.shape[1]]
        found = [x]
        for layer in self._layers[: len(self._layers) - skip]:
            found.append(layer(found[-1]))
        return found

    def pooled(self, ids: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised last state [B, L, D], and its row at the first end token, projected if there is a projection.

        Args:
            ids: [B, L].
            last: of `states`.
        """
        normed = self._norm(last)
        ends = ids.argmax(-1) if self._end == _OLD_EOS else (ids == self._end).int().argmax(-1)
        row = normed[torch.arange(len(ids), device=ids.device), ends]
        return normed, row if self._projection is None else self._projection(row)


class _PackedForward:
    """The forward of both kinds of encoder."""

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'."""
        program = _program(self, input_ids, args, kwargs)
        if program is None or input_ids is None:
            return super().forward(input_ids, *args, **kwargs)  # type: ignore[misc]
        states = program.states(input_ids)
        normed, pooled = program.pooled(input_ids, states[-1])
        hidden = tuple(states) if kwargs.get("output_hidden_states") else None
        if isinstance(self, CLIPTextModelWithProjection):
            return CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=normed, hidden_states=hidden)  # type: ignore[arg-type]
        return BaseModelOutputWithPooling(last_hidden_state=normed, pooler_output=pooled, hidden_states=hidden)  # type: ignore[arg-type]


class PackedText(_PackedForward, CLIPTextModel):
    """transformers' CLIPTextModel; its forward takes the same arguments and returns the same."""


class PackedTextWithProjection(_PackedForward, CLIPTextModelWithProjection):
    """transformers' CLIPTextModelWithProjection; its forward takes the same arguments and returns the same."""


STOCK: dict[Any, Any] = {PackedText: CLIPTextModel, PackedTextWithProjection: CLIPTextModelWithProjection}
for _packed, _stock in STOCK.items():
    # the names are what saved configurations say, and by what transformers knows which outputs a class can record
    _packed.__name__, _packed.__qualname__, _packed.__module__ = _stock.__name__, _stock.__qualname__, _stock.__module__


def penultimate(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What SDXL reads of a text encoder: the last state but one [B, L, D], and the projection [B, P] if it has one.

    Args:
        encoder: packed or not.
        ids: tokens [B, L].
    """
    projects = hasattr(encoder, "text_projection")
    program = _program(encoder, ids, (), {}, fall_back=False)
    if program is None:
        output = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0] if projects else None
    if not projects:
        return program.states(ids, skip=1)[-1], None  # nobody reads the last layer
    states = program.states(ids)
    return states[-2], program.pooled(ids, states[-1])[1]


def _program(
    encoder: Any, ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, fall_back: bool = True
) -> TextProgram | None:
    """The packed program if it is to run this call; its use is noted, and with `fall_back` that of the modules."""
    runner = runner_of(encoder)
    if runner is None:
        return None
    program: TextProgram | None = runner.ready()
    reason: str | None = runner.reason
    if program is not None:
        # positional ones are a mask and positions; states by number are none of SDXL's
        given = {"a positional argument": args, **kwargs}
        asked = given.pop("output_hidden_states", None)
        if given.get("return_dict"):
            del given["return_dict"]
        if not isinstance(ids, Tensor) or not program.fits(ids):
            reason = "the tokens are no tensor [B, L], or more than there are positions"
        elif asked is not None and not isinstance(asked, bool):
            reason = "single states are asked for"
        else:
            off = ("output_attentions", "use_cache")
            given = {name: value for name, value in given.items() if not (name in off and value is False)}
            reason = refusal(encoder, program, ids, given)
    if program is None or reason is not None:
        if fall_back:
            runner.by_modules(reason or "")
        return None
    runner.use.packed += 1
    return program


def _unhooked(module: Any, name: str) -> None:
    """Raises NotPackableError for hooks other than transformers' own, by which it records what layers return."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not getattr(hook, "__module__", "").startswith("transformers."):
            raise NotPackableError(f"{name} has forward hooks")
