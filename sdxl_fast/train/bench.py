"""What every distillation works on: the frozen base with its text conditions, the latents, and noised batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..data.shards import LatentShards
from ..diffusion import sampling, schedule
from ..diffusion.prediction import PredictionType
from ..models.conditioning import encode_prompts, time_ids
from ..models.config import vae_scale_factor
from ..random import generator, image_seeds
from . import distributed
from .base import base_folder, open_pipeline, open_unet, run_folder
from .config import DistillationConfig
from .source import Condition, Drawings, Prefetch, Shards, Source
from .students import shared_copy
from .teacher import latents_of, preview_prompts

LAST = schedule.NUM_TRAIN_TIMESTEPS - 1
C = TypeVar("C", bound=DistillationConfig)


@dataclass
class Renoise:
    """To what levels a batch is noised for the discriminator, and by whose noise (§3.7.2, eq. 25)."""

    timesteps: Tensor
    seeds: Tensor


@dataclass
class Bench(Generic[C]):
    """What all stages of a run share: data, text conditions, schedule, and the frozen base model.

    Everything random is drawn for the global batch, of which `share` is what this process works on at the moment: any
    number of processes and micro-batches sees the same samples.
    """

    config: C
    base: nn.Module
    vae: Any
    source: Source
    previews: Condition  # one row per prompt of the contact sheets
    prompts: Condition  # one row per further prompt that was asked for
    prediction_type: PredictionType
    alphas_cumprod: Tensor
    stage: str = ""  # each draws anew
    share: slice = field(default_factory=lambda: slice(0, None))
    others: tuple[Any, ...] = ()  # further frozen bases that share the student's LoRA
    which: int = 0  # of all bases, the one that this micro-batch works on
    _frozen: dict[int, Any] = field(default_factory=dict)

    def base_to_train(self, which: int = 0) -> Any:
        """A copy of a base UNet, in the precision of what trains."""
        unet: Any = copy.deepcopy((self.base, *self.others)[which])
        return unet.to(self.device, self.config.trained_dtype)

    def frozen_base(self, which: int = 0) -> Any:
        """A base UNet in the precision of what does not train; all that this returns of one shares its weights.

        Spread networks (FSDP2) cannot share: there each is a copy.
        """
        base: Any = (self.base, *self.others)[which]
        if self.config.parallel == "fsdp" and distributed.size() > 1:
            return self.froze(copy.deepcopy(base))
        if which not in self._frozen:
            as_it_is = base.dtype == self.config.frozen_dtype and base.device == self.device
            # `to` writes into parameters, also into those of a shared copy
            self._frozen[which] = self.froze(shared_copy(base) if as_it_is else copy.deepcopy(base))
        return shared_copy(self._frozen[which])

    def froze(self, unet: Any) -> Any:
        """The network itself, in the precision of what does not train."""
        return unet.to(self.device, self.config.frozen_dtype).requires_grad_(False)

    def shares(self) -> Iterator[None]:
        """Goes through the micro-batches of this process; of several bases they take turns."""
        whole, count = self.share, 1 + len(self.others)
        accumulate = self.config.accumulate
        if distributed.size() * accumulate % count:
            raise ValueError(f"{count} bases take turns: processes times accumulate must be a multiple of {count}")
        try:
            for index, share in enumerate(distributed.shares(self.config.batch, accumulate)):
                self.share, self.which = share, (distributed.rank() * accumulate + index) % count
                yield
        finally:
            self.share, self.which = whole, 0

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Inside, threads read the next batches of shards; drawings lie in memory."""
        if not isinstance(self.source, Shards):
            yield
            return
        shards = self.source
        try:
            with Prefetch(shards, pin=self.device.type == "cuda") as self.source:
                yield
        finally:
            self.source = shards

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.alphas_cumprod.device

    def seeds(self, *key: int | str) -> Tensor:
        """One noise seed per sample."""
        seeds = image_seeds(self.config.batch, self.config.seed, self.stage, *key)[self.share]
        return seeds.to(self.device, non_blocking=True)

    def batch(self, images: int, use: str, *, text_of_next: bool = False) -> tuple[Tensor, Condition]:
        """Clean latents and their text, or that of the sample behind, for one use after `images` images."""
        config = self.config
        key = (config.seed, self.stage, use, "batch")
        latents, condition = self.source.batch(config.batch, self.share, key, images, text_of_next=text_of_next)
        # a copy that waits would wait for all that the GPU was given to do before
        latents = latents.to(self.device, config.dtype, non_blocking=True, memory_format=torch.channels_last)
        condition = {name: rows.to(self.device, config.dtype, non_blocking=True) for name, rows in condition.items()}
        if self.others:
            condition["base"] = torch.full((len(latents),), self.which, device=self.device)
        return latents, condition

    def timesteps(self, allowed: Sequence[int], *key: int | str, weights: Sequence[float] = ()) -> Tensor:
        """One of the `allowed` timesteps per sample, a function of `key`; `weights` as many, else equal."""
        draw = generator(self.config.seed, self.stage, *key, "timesteps")
        odds = torch.tensor(weights or [1.0] * len(allowed))
        choice = torch.multinomial(odds, self.config.batch, replacement=True, generator=draw)
        return torch.tensor(allowed)[choice][self.share].to(self.device, non_blocking=True)

    def noised(
        self,
        latents: Tensor,
        timesteps: tuple[int, ...],
        *key: int | str,
        weights: Sequence[float] = (),
        pure: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """x_t and t, drawn from `timesteps` with `weights`; a function of `key`.

        `pure`: x_t is pure noise at the last timestep (SDXL-Lightning §3.5, ADD §3.1).
        """
        t = self.timesteps(timesteps, *key, weights=weights)
        x_t, _ = ops.forward_diffusion(
            latents,
            alphas_cumprod=self.alphas_cumprod,
            timesteps=t,
            seeds=self.seeds(*key),
            stream=sampling.STREAM_TRAIN,
            pure_noise_at=LAST if pure else None,
        )
        return x_t, t

    def inputs(
        self, timesteps: tuple[int, ...], images: int, use: str, *, weights: Sequence[float] = (), pure: bool = True
    ) -> tuple[Tensor, Tensor, Condition]:
        """A batch for one use after `images` images: x_t, t and the text; `weights` and `pure` as in `noised`."""
        latents, condition = self.batch(images, use)
        return *self.noised(latents, timesteps, images, use, weights=weights, pure=pure), condition

    def pure_noise(self, seeds: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Latents of unit normal noise, one per seed; `shape` is C, h, w, that of the contact sheets if left out."""
        channels, height, width = shape or self.source.shapes[0]
        return sampling.pure_noise((channels, height, width), seeds.to(self.device), dtype=self.config.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] of latents as the UNet sees them."""
        pictures: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return pictures

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """`decode` for contact sheets, one at a time: at once they would take as many times the memory."""
        return torch.cat([self.decode(one) for one in latents.split(1)])

    def move(
        self,
        x_t: Tensor,
        output: Tensor,
        levels: tuple[Tensor, Tensor],
        prediction_type: PredictionType,
        renoise: Renoise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One deterministic move between two levels, and that noised anew if told so, else itself; in x_t's dtype."""
        moved = ops.ddim_move(
            x_t,
            output,
            alphas_cumprod=self.alphas_cumprod,
            timesteps=levels[0],
            next_timesteps=levels[1],
            prediction_type=prediction_type,
            renoise_timesteps=None if renoise is None else renoise.timesteps,
            seeds=None if renoise is None else renoise.seeds,
            stream=sampling.STREAM_RENOISE,
        )
        return (moved, moved) if isinstance(moved, Tensor) else moved

    def renoised(self, x: Tensor, renoise: Renoise) -> Tensor:
        """A clean latent, or what stands for one, noised to the levels of `renoise`."""
        noised, _ = ops.forward_diffusion(
            x,
            alphas_cumprod=self.alphas_cumprod,
            timesteps=renoise.timesteps,
            seeds=renoise.seeds,
            stream=sampling.STREAM_RENOISE,
        )
        return noised


def _load_unet(name: str, config: DistillationConfig) -> Any:
    """A further base: the UNet of a pipeline, frozen."""
    unet = open_unet(base_folder(name))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    device = config.torch_device if config.frozen_dtype == config.dtype else "cpu"
    return unet.to(device, config.dtype, memory_format=torch.channels_last).requires_grad_(False)


def load_teacher(config: DistillationConfig) -> Any:
    """The teacher's pipeline, with the recipe's own VAE if it names one."""
    return open_pipeline(config.teacher, config.vae)


def make_bench(config: C, run: Path, *, prompts: tuple[str, ...] = ()) -> Bench[C]:
    """Loads the teacher's pipeline and opens the data; `prompts` are encoded beside those of the contact sheets.

    Raises:
        ValueError: shards without prompts for the contact sheets.
    """
    pipe = load_teacher(config).to(config.torch_device)
    vae = pipe.vae.to(memory_format=torch.channels_last).requires_grad_(False)
    source, previews = _open_source(config, pipe, run)
    pipe.to(dtype=config.dtype)
    encoded = _encode(pipe, previews, config)
    more = _encode(pipe, prompts, config) if prompts else {}
    base = pipe.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    if config.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    if config.frozen_dtype != config.dtype:
        base.to("cpu")  # where training starts from it; on the device its copy in fewer bits will do
    return Bench(
        config=config,
        base=base,
        vae=vae,
        source=source,
        previews=encoded,
        prompts=more,
        prediction_type=cast(PredictionType, pipe.scheduler.config.prediction_type),
        alphas_cumprod=schedule.alphas_cumprod().to(config.torch_device, config.dtype),
        others=tuple(_load_unet(name, config) for name in getattr(config, "bases", ())),
    )


def _open_source(config: DistillationConfig, pipe: Any, run: Path) -> tuple[Source, Sequence[str]]:
    """The data, and the prompts of the contact sheets. Drawn latents are made once, beside the teacher's if any."""
    if config.shards is not None:
        if not config.preview_prompts:
            raise ValueError("preview_prompts is empty; give the prompts of the contact sheets beside `shards`")
        return Shards(LatentShards(config.shards)), config.preview_prompts
    folder = run_folder(config.teacher)
    cache = (folder if (folder / "export").is_dir() else run) / "latents.safetensors"
    seed = config.seed if config.data_seed is None else config.data_seed
    if distributed.is_first():
        latents_of(config.data, cache, pipe.vae, config.draws, seed)
    distributed.barrier()  # the others read what the first has made
    latents = latents_of(config.data, cache, pipe.vae, config.draws, seed)
    conditions = _encode(pipe, latents.captions, config)
    previews = config.preview_prompts or preview_prompts(latents.captions)
    return Drawings(latents, conditions, config.data.category_share), previews


@torch.no_grad()
def _encode(pipe: Any, prompts: Sequence[str], config: DistillationConfig) -> Condition:
    """One row per prompt of what the UNet is told, for square pictures of the recipe's size, or the UNet's own."""
    embeds, pooled = encode_prompts(
        prompts, (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2)
    )
    size = config.resolution or pipe.unet.config.sample_size * vae_scale_factor(pipe.vae.config)
    found = {"prompt_embeds": embeds, "pooled": pooled, "time_ids": time_ids(size, size, batch=len(embeds))}
    return {name: rows.to(config.torch_device, config.dtype) for name, rows in found.items()}


def lay_out(config: DistillationConfig, students: Sequence[Any], others: Sequence[Any]) -> None:
    """Prepares fused networks for training as the recipe says: recomputation, compilation, shards."""
    for student in students if config.gradient_checkpointing else ():
        student.train()  # diffusers recomputes in training mode only; nothing else depends on it
    for network in (*students, *others):
        if config.parallel == "fsdp" and distributed.size() > 1:
            blocks = distributed.unet_blocks(network)
            for block in blocks if config.compile else ():
                block.compile()  # each by itself: its weights come together by hooks, which end a graph
            distributed.spread(network, blocks, computed_in=config.computed_in)
        elif config.compile:
            network.compile()
