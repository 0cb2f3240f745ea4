"""The names of a LoRA's tensors in the dialects people exchange; `lora_file` says what the dialects are.

Files of kohya's own trainer name the UNet's blocks as a single-file checkpoint does, and older diffusers its attention
processors: both are read, neither is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Literal

import torch

from .original_keys import known_module, original_modules

Dialect = Literal["kohya", "diffusers", "peft"]

_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_FLAT_PREFIXES = {**{prefix: name for name, prefix in _KOHYA.items()}, "lora_te_": "text_encoder"}
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}


def resolver(modules: Iterable[str] | None) -> Callable[[str], tuple[str, str] | None]:
    """A function of a key: ("component.module", "down" | "up" | "alpha"), or None for a key of no dialect.

    Args:
        modules: module names of the UNet, where they are known; others of it are then matched by no key.
    """
    modules = None if modules is None else tuple(modules)
    flat = None if modules is None else _flat_names(modules)
    dotted = None if modules is None else set(modules)

    def resolve(key: str) -> tuple[str, str] | None:
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        if ending is None:
            return None
        stem, half = key.removesuffix(ending), _ENDINGS[ending]
        prefix = next((prefix for prefix in _FLAT_PREFIXES if stem.startswith(prefix)), None)
        if prefix is not None:
            component = _FLAT_PREFIXES[prefix]
            module = _unflatten(stem.removeprefix(prefix), component, flat)
        else:
            component, module = _dotted(stem, flat, old_processor=ending.startswith("_lora"))
        if module is None or not known_module(component, module):
            return None
        if component == "unet" and dotted is not None and module not in dotted:
            return None
        return f"{component}.{module}", half

    return resolve


def _flat_names(modules: Iterable[str]) -> dict[str, str]:
    """Modules of a UNet by their names with underscores, both diffusers' and the original ones."""
    modules = list(modules)
    names = {original.replace(".", "_"): module for original, module in original_modules(modules).items()}
    return names | {module.replace(".", "_"): module for module in modules}


@cache
def _sdxl_flat_names() -> dict[str, str]:
    from .config import SDXL, build_unet

    with torch.device("meta"):
        return _flat_names(name for name, _ in build_unet(SDXL).named_modules())


# Parts of module names that contain underscores themselves; all others are single words or numbers.
_WORDS = (
    "down_blocks|mid_block|up_blocks|transformer_blocks|time_emb_proj|conv_shortcut|conv_in|conv_out|proj_in|proj_out|"
    "to_q|to_k|to_v|to_out|time_embedding|add_embedding|linear_[12]|text_model|self_attn|[qkv]_proj|out_proj|"
    "text_projection|token_embedding|position_embedding"
)
_PARTS = re.compile(rf"({_WORDS}|[a-z]+\d*|\d+)(?:_|$)")


def _unflatten(name: str, component: str, flat: Mapping[str, str] | None) -> str | None:
    if component == "unet":
        if name.startswith(("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_")):
            flat = _sdxl_flat_names() if flat is None else flat
        if flat is not None:
            return flat.get(name)
    parts, end = [], 0
    while end < len(name):
        found = _PARTS.match(name, end)
        if found is None:
            return None
        parts.append(found[1])
        end = found.end()
    return ".".join(parts)


def _dotted(stem: str, flat: Mapping[str, str] | None, *, old_processor: bool) -> tuple[str, str | None]:
    stem = stem.removeprefix("base_model.model.")
    component = next((name for name in ("text_encoder_2", "text_encoder", "unet") if stem.startswith(name + ".")), None)
    module = stem if component is None else stem.removeprefix(component + ".")
    component = component or "unet"
    if module.startswith("diffusion_model."):
        names = _sdxl_flat_names() if flat is None else flat
        return component, names.get(module.removeprefix("diffusion_model.").replace(".", "_"))
    if old_processor:  # unet...attn1.processor.to_q_lora.down, text_encoder...self_attn.to_q_lora.down
        module = module.replace(".processor.", ".")
        if component == "unet":
            module = re.sub(r"\.to_out$", ".to_out.0", module)
        else:
            module = re.sub(r"\.to_([qkv]|out)$", r".\1_proj", module)
    if component != "unet" and module.startswith("encoder."):
        module = f"text_model.{module}"
    return component, module


def key_names(name: str, dialect: str) -> tuple[str, str]:
    """The keys of a module's down and up matrices."""
    component, _, module = name.partition(".")
    if dialect == "kohya":
        stem = _KOHYA[component] + module.replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
    if dialect == "peft":
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    middle = "lora" if component == "unet" else "lora_linear_layer"
    return f"{name}.{middle}.down.weight", f"{name}.{middle}.up.weight"
