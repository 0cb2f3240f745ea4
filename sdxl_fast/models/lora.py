"""Few-step LoRA files: which modules they touch, the dialects they are written in, and merging them into a UNet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..files import replacing
from .safetensors_check import check_safetensors

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

NUM_STEPS_KEY = "sdxl_fast.num_inference_steps"
PREDICTION_KEY = "modelspec.prediction_type"


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


def stated_prediction_type(metadata: Mapping[str, str]) -> str | None:
    """The prediction type in a weight file's metadata, in diffusers' words; None when there is none."""
    value = metadata.get(PREDICTION_KEY)
    return {"v": "v_prediction", "x0": "sample"}.get(value, value) if value else None


def target_modules(unet: nn.Module) -> list[str]:
    """Names of the modules of `unet` that a few-step LoRA adapts, in the model's order."""
    endings = tuple("." + target for target in LORA_TARGETS)
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ("." + name).endswith(endings)
    ]


def lora_file_name(name: str, num_steps: int) -> str:
    """The file name that users of few-step checkpoints search for, as SDXL-Lightning's."""
    return f"{name}_{num_steps}step_lora.safetensors"


def find_loras(folder: str | Path) -> dict[int, Path]:
    """The few-step LoRA files lying in a pipeline folder, by step count."""
    found = {}
    for path in sorted(Path(folder).glob("*step_lora.safetensors")):
        digits = path.name.removesuffix("step_lora.safetensors").rpartition("_")[2]
        if digits.isdecimal():
            found[int(digits)] = path
    return found


def write_lora(
    path: str | Path,
    pairs: dict[str, tuple[Tensor, Tensor]],
    *,
    alpha: float,
    num_inference_steps: int,
    prediction_type: str,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a LoRA in the peft dialect that diffusers' `load_lora_weights` reads, whole or not at all.

    alpha / rank is folded into the up matrices, so that readers which ignore alpha (and those which take it to be the
    rank) get the right strength. Step count and prediction type go into the metadata: what users most often lose.
    """
    from safetensors.torch import save_file

    rank = next(iter(pairs.values()))[0].shape[0]
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"unet.{module}.lora_A.weight"] = down.detach().cpu().contiguous()
        tensors[f"unet.{module}.lora_B.weight"] = (up.detach().float() * (alpha / rank)).to(up.dtype).cpu().contiguous()
    facts = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        PREDICTION_KEY: {"v_prediction": "v", "sample": "x0"}.get(prediction_type, prediction_type),
        NUM_STEPS_KEY: str(num_inference_steps),
        "sdxl_fast.scheduler": "EulerDiscreteScheduler, timestep_spacing=trailing",
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=facts | (metadata or {}))


def read_lora(path: str | Path, unet: nn.Module) -> Lora:
    """Read a LoRA for `unet` in the peft, the older diffusers or the kohya dialect.

    Raises:
        ModelError: the file is unsafe or broken, or holds keys that match no module of `unet` (all are listed by count,
            the first by name), or a pair whose shapes do not fit.
    """
    from safetensors import safe_open

    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    modules = dict(unet.named_modules())
    flat = {name.replace(".", "_"): name for name in modules}
    halves: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        module, half = _split_key(key, flat)
        if module not in modules or half is None:
            unmatched.append(key)
        else:
            halves.setdefault(module, {})[half] = tensor
    if unmatched:
        raise ModelError(f"{path}: {len(unmatched)} LoRA keys match no module of the UNet, the first is {unmatched[0]}")
    default_alpha = _metadata_alpha(metadata)
    pairs, scales = {}, {}
    for module, parts in halves.items():
        if "down" not in parts or "up" not in parts:
            raise ModelError(f"{path}: {module} has only one half of its LoRA pair")
        down, up = parts["down"], parts["up"]
        _check_pair(path, module, down, up, modules[module])
        alpha = float(parts["alpha"]) if "alpha" in parts else default_alpha
        pairs[module], scales[module] = (down, up), 1.0 if alpha is None else alpha / down.shape[0]
    return Lora(pairs, scales, metadata)


@torch.no_grad()
def merge_lora(unet: nn.Module, lora: Lora, *, strength: float = 1.0) -> None:
    """W += strength · scale · up · down for every module, in float32, rounded once to the weight's dtype."""
    for name, (down, up) in lora.pairs.items():
        weight: Tensor = unet.get_submodule(name).weight  # type: ignore[assignment]
        delta = up.to(weight.device, torch.float32).flatten(1) @ down.to(weight.device, torch.float32).flatten(1)
        weight.copy_(weight.float() + (strength * lora.scales[name]) * delta.reshape(weight.shape))


def _split_key(key: str, flat: dict[str, str]) -> tuple[str, str | None]:
    """(module, "down" | "up" | "alpha" or None) of a key in any of the three dialects."""
    endings = {
        ".lora_A.weight": "down",
        ".lora_B.weight": "up",
        ".lora.down.weight": "down",
        ".lora.up.weight": "up",
        ".lora_down.weight": "down",
        ".lora_up.weight": "up",
        ".alpha": "alpha",
    }
    for ending, half in endings.items():
        if key.endswith(ending):
            module = key.removesuffix(ending)
            if module.startswith("lora_unet_"):
                return flat.get(module.removeprefix("lora_unet_"), module), half
            return module.removeprefix("unet."), half
    return key, None


def _check_pair(path: str | Path, name: str, down: Tensor, up: Tensor, module: Any) -> None:
    weight = module.weight
    fits = (
        up.shape[0] == weight.shape[0]
        and up.flatten(1).shape[1] == down.shape[0]
        and down[0].numel() == weight[0].numel()
    )
    if not fits:
        raise ModelError(
            f"{path}: LoRA of {name} is {tuple(up.shape)} x {tuple(down.shape)}, its weight {tuple(weight.shape)}"
        )


def _metadata_alpha(metadata: dict[str, str]) -> float | None:
    """alpha as diffusers' `save_lora_weights` records it; None means alpha = rank."""
    facts = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if facts.get("unet.alpha_pattern") or facts.get("unet.rank_pattern"):
        raise ModelError("LoRA files with one alpha or rank per module in their metadata are not supported")
    return facts.get("unet.lora_alpha")
