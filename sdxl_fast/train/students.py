"""Copies of the base UNet that share what does not train, and the LoRA on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from ..models.config import vae_scale_factor
from ..models.lora import Lora, lora_file_name, write_lora
from . import distributed
from .checkpoint import Average
from .config import AddConfig, DistillationConfig, Trains
from .distributed import whole
from .export import new_folder

if TYPE_CHECKING:
    from .bench import Bench

ADAPTER = "distilled"
M = TypeVar("M", bound=nn.Module)


def shared_copy(module: M, *, trainable: bool = True) -> M:
    """A module of its own, to fuse, adapt or cut, whose parameters and buffers are the original's tensors.

    Without `trainable`, parameters that require gradients are copied. `to` on the copy changes the original.
    """
    tensors: Iterator[Tensor] = chain(module.parameters(), module.buffers())
    kept = {id(tensor): tensor for tensor in tensors if trainable or not tensor.requires_grad}
    return copy.deepcopy(module, kept)  # type: ignore[arg-type]


def add_lora(unet: Any, config: DistillationConfig) -> None:
    """Gives the frozen UNet a LoRA that changes nothing yet, in the recipe's precision of what trains.

    Raises:
        ValueError: one of `lora_targets` ends the name of no linear layer or convolution.
    """
    adaptable = ["." + name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    idle = [target for target in config.lora_targets if not any(name.endswith("." + target) for name in adaptable)]
    if idle:
        raise ValueError(f"lora_targets names {', '.join(idle)}, which the UNet has no layer of; leave it out")
    settings = LoraConfig(r=config.lora_rank, lora_alpha=config.alpha, target_modules=list(config.lora_targets))
    unet.requires_grad_(False)
    torch.manual_seed(config.seed)
    unet.add_adapter(settings, adapter_name=ADAPTER)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(config.trained_dtype)


def adapter_layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every adapted module with its name."""
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A") and ADAPTER in module.lora_A:
            yield name, module


def adapter_pairs(unet: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) of each adapted module, float32 unless wider, put together where spread (every process must ask)."""
    return {
        name: (_weight(module.lora_A[ADAPTER]), _weight(module.lora_B[ADAPTER]))
        for name, module in adapter_layers(unet)
    }


def _weight(layer: Any) -> Tensor:
    found = whole(layer.weight.detach())
    return found.float() if found.dtype == torch.bfloat16 else found


@torch.no_grad()
def load_adapter(unet: nn.Module, lora: Lora, source: str) -> None:
    """Copies the pairs of a LoRA, read from `source`, into the adapter.

    Raises:
        ValueError: it has another rank, or adapts other modules, than the recipe's.
    """
    layers = dict(adapter_layers(unet))
    if layers.keys() != lora.pairs.keys():
        raise ValueError(f"{source}: adapts {len(lora.pairs)} modules, lora_targets {len(layers)}, and not the same")
    for name, module in layers.items():
        down, up = lora.pairs[name]
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        if down.shape[0] != a.shape[0]:
            raise ValueError(f"{source}: rank {down.shape[0]}; set lora_rank to it instead of {a.shape[0]}")
        a.copy_(down.reshape(a.shape))
        b.copy_((up * lora.scales[name] / module.scaling[ADAPTER]).reshape(b.shape))


def same_lora_on(unet: Any, student: nn.Module, config: DistillationConfig) -> Any:
    """Another frozen base with the very LoRA of `student`: the same parameters, moved by the gradients of both."""
    add_lora(unet, config)
    own = dict(adapter_layers(student))
    for name, module in adapter_layers(unet):
        module.lora_A[ADAPTER], module.lora_B[ADAPTER] = own[name].lora_A[ADAPTER], own[name].lora_B[ADAPTER]
    return unet


def make_student(bench: Bench[Any], trains: Trains) -> Any:
    """The base UNet with what trains requiring gradients: all of it, or a LoRA on the frozen rest."""
    if trains == "full":
        return bench.base_to_train().requires_grad_(True)
    unet = bench.frozen_base()
    add_lora(unet, bench.config)
    return unet


def reshaped(config: dict[str, Any], *, width: float, text_time: bool) -> dict[str, Any]:
    """A UNet's configuration with `width` times its channels and heads, told its size and pooled text or not."""

    def scaled(value: Any) -> Any:
        return [scaled(v) for v in value] if isinstance(value, list | tuple) else max(1, round(width * value))

    channels = scaled(config["block_out_channels"])
    changes = {"block_out_channels": channels, "norm_num_groups": math.gcd(config["norm_num_groups"], *channels)}
    changes["attention_head_dim"] = scaled(config["attention_head_dim"])  # which for SDXL's UNet counts heads
    if not text_time:
        changes |= {"addition_embed_type": None, "projection_class_embeddings_input_dim": None}
    return {**config, **changes}


def untrained_student(bench: Bench[AddConfig]) -> Any:
    """A UNet of the teacher's architecture, or of the shape that the recipe says, with new weights, to train."""
    config = bench.config
    shape = reshaped(dict(bench.base.config), width=config.student_width, text_time=config.student_text_time)  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    unet: Any = UNet2DConditionModel.from_config(shape)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.to(bench.device, config.trained_dtype, memory_format=torch.channels_last)
    return unet.requires_grad_(True)


def follower_of(student: M, config: DistillationConfig) -> M:
    """A copy of what trains, to be written to by an average; the rest is shared, but for spread networks (FSDP2)."""
    if config.parallel == "fsdp" and distributed.size() > 1:
        return copy.deepcopy(student).requires_grad_(False)
    follower = shared_copy(student, trainable=False)
    for parameter in follower.parameters():
        parameter.requires_grad_(False)
    return follower


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that train collect no gradients inside; a step that is left there leaves them as they were."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def averaged(student: nn.Module, average: Average) -> Iterator[None]:
    """The student holds its averaged weights inside."""
    live = {name: p.detach().clone() for name, p in student.named_parameters() if name in average.values}
    average.copy_to(student)
    try:
        yield
    finally:
        student.load_state_dict(live, strict=False)


@torch.no_grad()
def export_student(
    folder: Path, bench: Bench[Any], student: Any, average: Average, scheduler: Any, *, steps: int
) -> None:
    """Writes a diffusers folder in float16 with the averaged student; a LoRA merged, and beside it as a file.

    The recipe's `resolution` becomes the size that pictures have by default.

    Args:
        folder: target; an earlier export there is replaced.
        bench: its recipe names the pipeline that the other networks come from.
        student: what trained, of this process; every process must call.
        average: the weights to take.
        scheduler: how to sample it.
        steps: what a LoRA's file is called after.
    """
    from .bench import load_teacher

    pipe, config = load_teacher(bench.config), bench.config
    unet = pipe.unet
    with averaged(student, average):
        pairs = adapter_pairs(student)
        weights = {} if pairs else distributed.gathered(student.state_dict())
    if not distributed.is_first():
        return
    for name, (down, up) in pairs.items():
        weight = unet.get_submodule(name).weight
        delta = up.cpu().float().flatten(1) @ down.cpu().float().flatten(1)
        weight += (config.alpha / config.lora_rank) * delta.reshape(weight.shape)
    if weights:
        if student.config != unet.config:
            unet = UNet2DConditionModel.from_config(student.config)
        unet.load_state_dict(weights)
    if config.resolution is not None:
        unet.register_to_config(sample_size=config.resolution // vae_scale_factor(pipe.vae.config))
    pipe.register_modules(unet=unet, scheduler=scheduler)
    with new_folder(folder) as writing:
        pipe.to(torch.float16).save_pretrained(writing, safe_serialization=True)
        if pairs:
            half = {name: (down.half(), up.half()) for name, (down, up) in pairs.items()}
            path = writing / lora_file_name(config.export_name, steps)
            write_lora(
                path,
                half,
                alpha=config.alpha,
                num_inference_steps=steps,
                prediction_type=bench.prediction_type,
                scheduler={"_class_name": type(scheduler).__name__, **scheduler.config},
            )
