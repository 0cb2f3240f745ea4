"""Discriminators: SDXL-Lightning's, which is the UNet's own encoder with a head (§3.3), ADD's heads on the features of
a frozen network (§3.2), and a patch one for the VAE."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .. import ops
from ..nn.norm import GroupNorm, GroupNormSiLU


class UNetEncoder(nn.Module):
    """A trainable copy of a `UNet2DConditionModel` without its decoder; the feature is the mid block's output.

    Args:
        unet: the network to copy; it is left as it is.
        bases: how many base models the latents come from; with several, `condition` holds the sample's own as "base",
            int64 [N], whose learnt embedding is added to the time's (AnimateDiff-Lightning, arXiv 2403.12706, §3.3).
    """

    def __init__(self, unet: Any, bases: int = 1) -> None:
        super().__init__()
        self.base_embedding: nn.Embedding | None = None
        if bases > 1:
            self.base_embedding = nn.Embedding(bases, unet.time_embedding.linear_2.out_features)
            nn.init.zeros_(self.base_embedding.weight)
        self.unet = copy.deepcopy(unet, {id(unet.up_blocks): nn.ModuleList()})  # the decoder is not even copied
        self.unet.conv_norm_out = self.unet.conv_out = None
        self.unet.requires_grad_(True)
        self.out_channels: int = self.unet.mid_block.resnets[-1].out_channels
        self.num_groups: int = self.unet.config.norm_num_groups

    def forward(self, latents: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """latents [N, C, h, w], timesteps int64 [N], and prompt_embeds, pooled, time_ids -> [N, C_mid, h', w']."""
        unet = self.unet
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
        embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
        text = condition["prompt_embeds"]
        embedding = embedding + unet.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added)
        if self.base_embedding is not None:
            embedding = embedding + self.base_embedding(condition["base"]).to(embedding.dtype)
        x = unet.conv_in(latents)
        for block in [*unet.down_blocks, unet.mid_block]:
            arguments = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            x = block(x, embedding, **arguments)
            x = x[0] if isinstance(x, tuple) else x
        return x


class DiscriminatorHead(nn.Module):
    """Blocks of 4×4 stride-2 convolution, GroupNorm, SiLU down to one position, then a projection to one logit.

    What follows the last convolution is one operation, `ops.disc_head`, the loss included. How many blocks there are,
    how wide, and how they end is not published. DMD2's head, of the same family, has three of them for SDXL's 32×32 and
    an unpadded convolution of the 4×4 left; here the same block halves them to the last, five times, so that maps of
    every `side`, and larger ones in several places, are judged by one rule.

    Args:
        in_channels: channels of the feature map, twice the mid block's for the conditional discriminator.
        channels: width of the blocks.
        side: shortest side of the feature maps, a power of two (32 for SDXL at 1024 px).
        num_groups: of the normalisation; 32 in the paper.
    """

    def __init__(self, in_channels: int, channels: int, side: int, num_groups: int = 32) -> None:
        super().__init__()
        if side < 2 or side & (side - 1):
            raise ValueError(f"side is {side}; the head halves it down to 1, so it must be a power of two from 2")
        widths = [in_channels] + [channels] * int(math.log2(side))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 4, stride=2, padding=1), GroupNormSiLU(num_groups, b))
                for a, b in itertools.pairwise(widths)
            )
        )
        self.projection = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor, loss: str = "non_saturating_real") -> tuple[Tensor, Tensor]:
        """[N, in_channels, h, w] to logits [N] and their losses [N], float32 (float64 for float64).

        A map larger than `side` is judged in several places, on average. `loss` is one of `ops.disc_head`'s.
        """
        *blocks, (convolution, norm) = cast(Any, self.blocks)
        for block in blocks:
            features = block(features)
        bias = cast(Tensor, self.projection.bias)
        return ops.disc_head(
            convolution(features),
            norm.weight,
            norm.bias,
            self.projection.weight.flatten(),
            bias,
            num_groups=norm.num_groups,
            eps=norm.eps,
            loss=loss,
        )


class LightningDiscriminator(nn.Module):
    """D(x_t, x_{t-ns}, t, t-ns, c), or with `conditional=False` the relaxed D'(x_{t-ns}, t-ns, c).

    `encoder` is a `UNetEncoder` or one of `encoders`. The clean latent (timestep -1) is shown to it as timestep 0;
    logits are unbounded (apply a sigmoid for D).
    """

    def __init__(self, encoder: Any, *, conditional: bool, side: int, head_channels: int | None = None) -> None:
        super().__init__()
        channels, groups = encoder.out_channels, encoder.num_groups
        self.encoder = encoder
        self.conditional = conditional
        self.head = DiscriminatorHead(channels * (2 if conditional else 1), head_channels or channels, side, groups)

    def features(self, latents: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Mid-block features of latents at `timesteps`."""
        feature: Tensor = self.encoder(latents, timesteps.clamp(min=0), condition)
        return feature

    def verdict(self, features: Tensor, features_t: Tensor | None, loss: str) -> tuple[Tensor, Tensor]:
        """Logits [N] and their losses [N], of the kind that `ops.disc_head` calls `loss`.

        From the features of x_{t-ns} and, for the conditional discriminator, those of x_t.
        """
        if self.conditional:
            if features_t is None:
                raise ValueError("features_t is None; the conditional discriminator also judges x_t: pass its features")
            features = torch.cat([features, features_t], dim=1)
        logits, losses = self.head(features, loss)
        return logits, losses

    def judge(self, features: Tensor, features_t: Tensor | None) -> Tensor:
        """The logits alone, of :meth:`verdict`."""
        return self.verdict(features, features_t, "non_saturating_real")[0]


class TokenHead(nn.Module):
    """A logit per token of one feature layer: StyleGAN-T's discriminator head, which ADD takes over (ADD §3.2).

    Convolutions along the token sequence with spectral norm: k = 1, a residual one with k = 9 and circular padding,
    and the last to 64 channels, whose product with a linear map of the condition is the logit. Normalisation is over
    groups of 8 channels within a sample where StyleGAN-T has virtual batches, so that a logit depends on its own
    picture alone.

    Args:
        channels: of the layer, a multiple of 8.
        condition: width of the conditioning vector.
    """

    PROJECTION = 64

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(f"channels is {channels}; allowed: multiples of 8, the size of a group")

        def block(kernel: int) -> nn.Sequential:
            conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
            return nn.Sequential(spectral_norm(conv), GroupNorm(channels // 8, channels), nn.LeakyReLU(0.2))

        self.lift = block(1)
        self.residual = block(9)
        self.projection = spectral_norm(nn.Conv1d(channels, self.PROJECTION, 1))
        self.condition = nn.Linear(condition, self.PROJECTION)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """tokens [N, C, L], condition [N, width] -> logits [N, L]."""
        x = self.lift(tokens)
        (convolution, norm, _), projection = cast(Any, self.residual), cast(Any, self.projection)
        # Circular padding goes around once: a shorter sequence is repeated, which changes nothing of what is kept.
        length, reach = x.shape[2], convolution.padding[0]
        hidden = convolution(x.repeat(1, 1, -(-reach // length)))[..., :length] if length < reach else convolution(x)
        # (projection(x) · mapped) is linear in x: the two make one direction per sample. The residual block's 1/√2 and
        # the 1/√64 of the product go along.
        mapped = self.condition(condition) / math.sqrt(self.PROJECTION)
        direction = mapped @ projection.weight.squeeze(2).to(mapped.dtype) / math.sqrt(2.0)
        offset = mapped @ projection.bias.to(mapped.dtype)
        return ops.token_head(
            *(hidden, x.to(hidden.dtype), norm.weight, norm.bias),
            direction=direction,
            offset=offset,
            num_groups=norm.num_groups,
            eps=norm.eps,
        )


class AddDiscriminator(nn.Module):
    """One `TokenHead` per feature layer, conditioned on the text's and the real picture's embedding (ADD §3.2).

    How the two embeddings merge is not published: here they are normalised each and joined.
    """

    def __init__(self, widths: Sequence[int], text: int, image: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(TokenHead(width, text + image) for width in widths)

    def forward(self, tokens: list[Tensor], text: Tensor, image: Tensor) -> list[Tensor]:
        """Logits [N, L_k] per layer."""
        wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in (text, image)]
        condition = torch.cat([F.layer_norm(part, part.shape[1:]) for part in wide], dim=1)
        return [head(layer, condition) for head, layer in zip(self.heads, tokens, strict=True)]


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of pictures: three 4×4 stride-2 convolutions, then a logit per position.

    [N, 3, H, W] in -1..1 -> [N, 1, H/8, W/8]. Instance statistics are GroupNorm's with one group per 8 channels.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = [channels, 2 * channels, 4 * channels]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.SiLU()]
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), GroupNormSiLU(b // 8, b)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits per patch."""
        logits: Tensor = self.layers(pictures)
        return logits
