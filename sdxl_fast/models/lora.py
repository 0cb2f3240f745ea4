"""Few-step LoRAs: which modules they touch, reading and writing their files, and merging them into a UNet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .facts import NUM_STEPS_KEY, PREDICTION_KEY, Facts, parse_file_name, scheduler_text, stated_prediction_type
from .lora_file import LoraFile, Pair, folded, read_lora_file, write_lora_file
from .safetensors_check import check_safetensors
from .weights import Lazy, listing

__all__ = [
    "LORA_TARGETS",
    "NUM_STEPS_KEY",
    "PREDICTION_KEY",
    "Lora",
    "base_prediction_type",
    "find_loras",
    "is_target",
    "lora_file_name",
    "merge_lora",
    "read_lora",
    "stated_prediction_type",
    "target_modules",
    "write_lora",
]

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Module name endings with a LoRA: every linear and convolution but the input, output and shared time embedding.

SDXL-Lightning §3.6 names LCM-LoRA's list; its released files hold exactly these 788 modules of SDXL's UNet.
"""

_ENDINGS = tuple("." + target for target in LORA_TARGETS)


@dataclass(frozen=True, slots=True)
class Lora:
    """`pairs[module] = (down [r, in, ...], up [out, r, ...])`, what to multiply each up by, and the file's metadata."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    metadata: dict[str, str]

    @property
    def prediction_type(self) -> str | None:
        """What the merged UNet predicts, in diffusers' words; None when the file does not say."""
        return stated_prediction_type(self.metadata)


def is_target(module: str) -> bool:
    """Whether a few-step LoRA adapts the UNet's module of that name."""
    return ("." + module).endswith(_ENDINGS)


def target_modules(unet: nn.Module) -> list[str]:
    """Names of the modules of `unet` that a few-step LoRA adapts, in the model's order."""
    return [
        name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and is_target(name)
    ]


def lora_file_name(name: str, num_steps: int) -> str:
    """The file name that users of few-step checkpoints search for, as SDXL-Lightning's."""
    return Facts(name, num_steps).file_name("lora")


def find_loras(folder: str | Path) -> dict[int, Path]:
    """The few-step LoRA files lying in a pipeline folder, by step count."""
    found = {}
    for path in sorted(Path(folder).glob("*step*_lora*.safetensors")):
        steps = parse_file_name(path.stem).num_steps
        if steps is not None:
            found[steps] = path
    return found


def base_prediction_type(loras: Iterable[Path]) -> str:
    """What the UNet under few-step LoRAs predicts, as the first file that says so has it; epsilon if none does."""
    headers = (check_safetensors(path) for path in loras)
    found = (stated_prediction_type(header.get("__metadata__", {})) for header in headers)
    return next(filter(None, found), "epsilon")


def write_lora(
    path: str | Path,
    pairs: dict[str, tuple[Tensor, Tensor]],
    *,
    alpha: float,
    num_inference_steps: int,
    prediction_type: str,
    scheduler: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the LoRA of a UNet in the peft dialect that diffusers' `load_lora_weights` reads, whole or not at all.

    alpha / rank is folded into the up matrices, so that readers which ignore alpha (and those which take it to be the
    rank) get the right strength. Step count, prediction type and scheduler (a diffusers config with `_class_name`; None
    is a trailing Euler) go into the metadata: what users most often lose.
    """
    whole = LoraFile(
        {f"unet.{name}": Pair(Lazy.of(down), Lazy.of(up), float(alpha)) for name, (down, up) in pairs.items()}, {}
    )
    name, sampler = parse_file_name(Path(path).stem).name, scheduler_text(scheduler or {})
    facts = Facts(name, num_inference_steps, prediction_type, sampler)
    said = facts.metadata("lora", architecture=whole.architecture, implementation="diffusers")
    whole = folded(LoraFile(whole.pairs, {"format": "pt"} | said | (metadata or {})))
    write_lora_file(path, whole, "peft")


def read_lora(path: str | Path, unet: nn.Module) -> Lora:
    """Read the LoRA of a UNet in the peft, diffusers or kohya dialect (see `lora_file`).

    Raises:
        ModelError: the file is unsafe or broken, or holds keys that match no module of `unet` (they are listed), or a
            pair whose shapes do not fit.
    """
    modules = dict(unet.named_modules())
    file = read_lora_file(path, modules=modules)
    pairs, scales = {}, {}
    others = [name for name in file.pairs if not name.startswith("unet.")]
    if others:
        raise ModelError(
            f"{path}: adapts text encoders too; merge it with `sdxl-fast export folder`: {listing(others, 3)}"
        )
    for key, pair in file.pairs.items():
        name = key.removeprefix("unet.")
        check_pair(path, name, pair, getattr(modules[name], "weight", None))
        pairs[name] = (pair.down.read(), pair.up.read())
        scales[name] = pair.alpha / pair.rank
    return Lora(pairs, scales, file.metadata)


def check_pair(path: str | Path, name: str, pair: Pair, weight: Any) -> None:
    """Raises ModelError unless up · down has the shape of `weight`, a tensor, parameter or `Lazy`."""
    if weight is None:
        raise ModelError(f"{path}: {name} has no weight to adapt")
    # a 1×1 convolution's pair may be matrices, and the other way round
    fits = pair.up.shape[0] == weight.shape[0] and math.prod(pair.up.shape[2:]) == 1
    if not fits or math.prod(pair.down.shape[1:]) != math.prod(weight.shape[1:]):
        raise ModelError(
            f"{path}: LoRA of {name} is {pair.up.shape} x {pair.down.shape}, its weight {tuple(weight.shape)}"
        )


@torch.no_grad()
def merge_lora(unet: nn.Module, lora: Lora, *, strength: float = 1.0) -> None:
    """W += strength · scale · up · down for every module, in float32, rounded once to the weight's dtype."""
    for name, (down, up) in lora.pairs.items():
        weight: Tensor = unet.get_submodule(name).weight  # type: ignore[assignment]
        delta = up.to(weight.device, torch.float32).flatten(1) @ down.to(weight.device, torch.float32).flatten(1)
        weight.copy_(weight.float() + (strength * lora.scales[name]) * delta.reshape(weight.shape))
