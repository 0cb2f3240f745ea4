"""Training steps on the meta device: the true shapes and no values, to see what has to be held at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recompute

from ..models.conditioning import time_ids
from ..models.config import vae_scale_factor
from ..models.discriminators import AddDiscriminator, LightningDiscriminator
from ..models.encoders import make_encoder
from ..models.feature_nets import feature_shape, feature_skeleton
from .config import AddConfig, DistillationConfig, LightningConfig, Trains
from .students import add_lora, reshaped, shared_copy
from .teacher import call_unet

TOKENS = 77
COMPUTE = torch.bfloat16


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside and still alive, without `others`; `peak` is the most there ever were."""

    def __init__(self, others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _FlashShape(torch.autograd.Function):
    """What a fused attention keeps: queries, keys, values and its output, never the matrix of weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found: Tensor = _FlashShape.apply(query, key, value)
    return found


@contextmanager
def fused_attention() -> Iterator[None]:
    """Puts `_FlashShape` in place of torch's attention, which on the meta device is plain products.

    By name, since a `TorchFunctionMode` sleeps during backward, where blocks are computed anew.
    """
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class Rehearsal:
    """Networks of a recipe without values, in the precision that it computes in, and the memory of their steps.

    Args:
        config: the recipe.
        unet: of the teacher, on the meta device.
        vae: likewise.
        processes: that share a batch.
    """

    def __init__(self, config: DistillationConfig, unet: Any, vae: Any, processes: int = 1) -> None:
        self.processes = processes
        self.config, self.unet, self.vae = config, unet.requires_grad_(False), vae.requires_grad_(False)
        self._found: dict[Any, int] = {}
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def student(self, trains: Trains) -> Any:
        """With what trains requiring gradients."""
        unet = shared_copy(self.unet) if trains == "lora" else self._copy()
        if trains == "full":
            return unet.requires_grad_(True).train()
        with torch.device("meta"):
            add_lora(unet, self.config)
        return unet.train()

    def _copy(self) -> Any:
        from ..models.networks import skeleton

        config, shape = self.config, dict(self.unet.config)
        if isinstance(config, AddConfig) and config.student == "random":
            shape = reshaped(shape, width=config.student_width, text_time=config.student_text_time)
        unet = skeleton("unet", shape)
        if self.config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet

    @property
    def side(self) -> int:
        """Of a latent: the data's where the recipe draws them, else the network's own."""
        config = self.config
        if config.shards is None:
            return config.data.resolution // self.factor
        return config.resolution // self.factor if config.resolution else int(self.unet.config.sample_size)

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel."""
        return vae_scale_factor(self.vae.config)

    def discriminator(self, conditional: bool) -> Any:
        """Lightning's D, or with False D'."""
        assert isinstance(self.config, LightningConfig)
        levels = len(self.unet.config.down_block_types) - 1
        side = 1 << ((self.side // 2**levels).bit_length() - 1)
        width = self.config.discriminator.head_channels
        with torch.device("meta"):
            encoder = make_encoder(self.config.discriminator.backbone, self.unet, self.vae)
            return LightningDiscriminator(encoder, conditional=conditional, side=side, head_channels=width).train()

    def heads(self) -> AddDiscriminator | None:
        """ADD's heads; None where a feature network's widths are unknown without fetching it."""
        assert isinstance(self.config, AddConfig)
        seen = feature_shape(self.config.feature_network)
        told = feature_shape(self.config.image_encoder) if self.config.image_encoder else seen
        if seen is None or told is None:
            return None
        with torch.device("meta"):
            return AddDiscriminator(seen.widths, self._pooled, told.embedding)

    @property
    def _pooled(self) -> int:
        config = self.unet.config
        return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)

    @property
    def _micro(self) -> int:
        return self.config.batch // (self.processes * self.config.accumulate)

    def _inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        count, config = self._micro, self.unet.config
        with torch.device("meta"):
            x = torch.empty(count, config.in_channels, self.side, self.side, dtype=COMPUTE)
            condition = {
                "prompt_embeds": torch.empty(count, TOKENS, config.cross_attention_dim, dtype=COMPUTE),
                "pooled": torch.empty(count, self._pooled, dtype=COMPUTE),
                "time_ids": time_ids(1, 1, batch=count, device="meta", dtype=COMPUTE),
            }
            return x, torch.zeros(count, dtype=torch.int64), condition

    def _peak(self, key: Any, networks: list[nn.Module], step: Callable[[], Tensor]) -> int:
        """The most bytes that a step's forward and backward hold beside weights and their gradients."""
        if key in self._found:
            return self._found[key]
        for network in networks:
            network.to(COMPUTE)
        counted = LiveBytes(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
        hooks = [
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
            for network in networks
            for parameter in network.parameters()
            if parameter.requires_grad
        ]
        with fused_attention(), counted:
            step().sum().backward()  # type: ignore[no-untyped-call]
        for hook in hooks:
            hook.remove()
        self._found[key] = counted.peak
        return counted.peak

    def lightning(self, trains: Trains, *, adversarial: bool) -> int:
        """The greater of what a student step and a step of the conditional discriminator hold; D' holds less."""
        student, (x, t, condition) = self.student(trains), self._inputs()
        if not adversarial:
            return self._peak((trains,), [student], lambda: call_unet(student, x, t, condition))
        d = self.discriminator(True)

        def judged(latents: Tensor, count: int) -> Tensor:
            texts = {name: torch.cat([value] * count) for name, value in condition.items()}
            feature_t = d.features(x, t, condition)
            features = d.features(latents, t.repeat(count), texts)
            return torch.cat([d.judge(part, feature_t) for part in features.chunk(count)])

        both = self._peak("discriminator", [d], lambda: judged(torch.cat([x, x]), 2))
        d.requires_grad_(False)
        alone = self._peak((trains, "d"), [student, d], lambda: judged(call_unet(student, x, t, condition), 1))
        return max(both, alone)

    def add(self) -> int:
        """What a student step holds from the UNet through the VAE's decoder and the feature network.

        Of a network that is unknown nothing is counted, nor of the heads, which are small beside it.
        """
        config = self.config
        assert isinstance(config, AddConfig)
        student, (x, t, condition) = self.student(config.trains), self._inputs()
        features = feature_skeleton(config.feature_network, config.feature_size)

        def decoded() -> Tensor:
            latents = call_unet(student, x, t, condition)
            if config.checkpoint_decoder:
                pictures: Tensor = recompute(lambda z: self.vae.decode(z).sample, latents, use_reentrant=False)
                return pictures
            picture: Tensor = self.vae.decode(latents).sample
            return picture

        if features is None:
            return self._peak("add", [student, self.vae], decoded)
        looks = features.features
        return self._peak(
            "add", [student, self.vae, features], lambda: torch.stack([x.sum() for x in looks(decoded()).tokens])
        )
