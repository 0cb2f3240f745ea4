"""LoRA files in the dialects people exchange, with the alpha that is true of each.

A LoRA adds (alpha / rank) · up · down to a weight. The dialects name the same two matrices differently, and keep alpha
in different places or nowhere:

    peft       unet.M.lora_A.weight, .lora_B.weight              alpha in the metadata
    diffusers  unet.M.lora.down.weight, .lora.up.weight          alpha in the metadata
    kohya      lora_unet_M.lora_down.weight, .lora_up.weight     alpha beside them, .alpha (ComfyUI, A1111)

with M a module's name, its dots turned into underscores by kohya. Text encoders are `text_encoder`, `text_encoder_2`
and `lora_te1_`, `lora_te2_`. A missing alpha means alpha = rank, in every reader. ComfyUI ignores metadata. diffusers
0.42 loses kohya's alphas of attention layers where those of one network differ, whatever the ranks: kohya files are
written with one alpha for each network (`with_one_alpha`).

Sources: diffusers' `lora_conversion_utils.py` and `state_dict_utils.py`, kohya-ss/sd-scripts `networks/lora.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..errors import ModelError
from .facts import NUM_STEPS_KEY, architecture_of
from .lora_names import Dialect, key_names, resolver
from .weights import Lazy, converted, listing, open_weights, write_weights

ADAPTER_KEY = "lora_adapter_metadata"
"""Where diffusers' `save_lora_weights` keeps the peft configuration, as JSON."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One module's LoRA: `down` [r, in, ...], `up` [out, r, ...] and what alpha / r multiplies their product by."""

    down: Lazy
    up: Lazy
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """(alpha / r) · up · down in float32, [out, in, ...]."""
        down, up = self.down.read().float(), self.up.read().float()
        return (self.alpha / self.rank) * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


@dataclass(frozen=True, slots=True)
class LoraFile:
    """`pairs` by component and module, as in `unet.mid_block.resnets.0.conv1`, and the file's metadata."""

    pairs: dict[str, Pair]
    metadata: dict[str, str]

    @property
    def alphas(self) -> dict[str, list[float]]:
        """Of all modules, by component."""
        found: dict[str, list[float]] = {}
        for name, pair in self.pairs.items():
            found.setdefault(name.partition(".")[0], []).append(pair.alpha)
        return found

    @property
    def architecture(self) -> str:
        """ModelSpec's name of the base."""
        return architecture_of(shrunken=self.shrunken)

    @property
    def shrunken(self) -> bool:
        """Whether the base is not of SDXL's size: none of the widths it meets is SDXL's own."""
        widths = {
            pair.down.shape[1]
            for name, pair in self.pairs.items()
            if name.endswith(("attn2.to_k", "attn2.to_v", "time_emb_proj"))
        }
        return bool(widths) and not widths & {2048, 1280}


def read_lora_file(path: str | Path, *, modules: Iterable[str] | None = None, alpha: float | None = None) -> LoraFile:
    """Read a LoRA in any of the dialects, whatever network it is for.

    Args:
        path: a .safetensors file, or the folder of a peft adapter (adapter_model.safetensors, adapter_config.json).
        modules: module names of the UNet it is for, where they are known. Without them any name is taken that such a
            UNet can have, and names with the blocks of a single-file checkpoint are read as SDXL's.
        alpha: what it was trained with, for a file that does not say.

    Raises:
        ModelError: unsafe or broken; keys that are no LoRA's, or of no network (all are listed); a pair with one half
            or of two ranks; an alpha that contradicts the file's.
    """
    path, adapter = _adapter_folder(Path(path))
    tensors, metadata = open_weights(path)
    resolve = resolver(modules)
    halves: dict[str, dict[str, Lazy]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        found = resolve(key)
        if found is None:
            unmatched.append(key)
        else:
            halves.setdefault(found[0], {})[found[1]] = tensor
    if unmatched or not halves:
        what = (
            f"{len(unmatched)} keys match no module of a LoRA: {listing(unmatched)}" if unmatched else "no LoRA in it"
        )
        raise ModelError(f"{path}: {what}")
    stated = _stated_alphas(path, metadata, adapter)
    return LoraFile({name: _pair(path, name, parts, stated, alpha) for name, parts in halves.items()}, metadata)


def write_lora_file(
    path: str | Path, lora: LoraFile, dialect: str, *, dtype: torch.dtype | None = None, bare: bool = False
) -> int:
    """Write a LoRA, whole or not at all, with its `metadata`; returns the size in bytes.

    Args:
        path: the file.
        lora: what to write; its alphas are kept, in the form of the dialect, and stated also where they are the rank.
            In kohya's, those that differ within a network become one, and the ups are scaled for it.
        dialect: "kohya", "diffusers" or "peft".
        dtype: of the matrices; None leaves it.
        bare: no metadata at all, as the published few-step LoRAs.

    Raises:
        ValueError: an unknown dialect, or a bare file of a dialect that could not say alpha.
    """
    tensors = lora_tensors(lora, dialect, dtype)
    metadata = {key: value for key, value in lora.metadata.items() if key != ADAPTER_KEY}
    if dialect != "kohya":
        if bare and any(pair.alpha != pair.rank for pair in lora.pairs.values()):
            raise ValueError(f"alpha is not the rank, and {dialect} keeps alpha in the metadata: do not leave them out")
        metadata[ADAPTER_KEY] = json.dumps(_adapter_metadata(lora.pairs), sort_keys=True)
    return write_weights(path, tensors, None if bare else metadata)


def lora_tensors(lora: LoraFile, dialect: str, dtype: torch.dtype | None = None) -> dict[str, Lazy]:
    """What a file of the dialect holds; arguments and errors as `write_lora_file`."""
    if dialect not in get_args(Dialect):
        raise ValueError(f"format is {dialect!r}; allowed: {', '.join(get_args(Dialect))}")
    lora = with_one_alpha(lora) if dialect == "kohya" else lora
    tensors: dict[str, Lazy] = {}
    for name, pair in lora.pairs.items():
        down, up = key_names(name, dialect)
        tensors |= {down: pair.down, up: pair.up}
    tensors = converted(tensors, dtype)
    if dialect == "kohya":
        for name, pair in lora.pairs.items():
            stem = key_names(name, dialect)[0].removesuffix(".lora_down.weight")
            tensors[f"{stem}.alpha"] = Lazy.of(_alpha_tensor(pair.alpha, tensors[f"{stem}.lora_down.weight"].dtype))
    return tensors


def _adapter_folder(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The weight file and the configuration of a folder that peft's `save_pretrained` wrote; a file is itself."""
    if not path.is_dir():
        return path, None
    config = path / "adapter_config.json"
    if not config.is_file():
        raise ModelError(f"{path}: a folder without adapter_config.json is no LoRA; give its .safetensors file")
    try:
        return path / "adapter_model.safetensors", json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config}: not valid JSON ({error})") from None


# ---- alpha ----


def _pair(
    path: Path,
    name: str,
    parts: Mapping[str, Lazy],
    stated: Callable[[str, int], float | None],
    given: float | None,
) -> Pair:
    if "down" not in parts or "up" not in parts:
        raise ModelError(f"{path}: {name} has only one half of its LoRA pair")
    down, up = parts["down"], parts["up"]
    if len(down.shape) < 2 or len(up.shape) < 2 or up.shape[1] != down.shape[0]:
        raise ModelError(f"{path}: {name}: up {up.shape} does not follow on down {down.shape}")
    alpha = float(parts["alpha"].read()) if "alpha" in parts else stated(name, down.shape[0])
    if given is not None and alpha is not None and not math.isclose(alpha, given, rel_tol=1e-3):  # float16's rounding
        raise ModelError(f"{path}: alpha is given as {given:g}, but the file says {alpha:g} for {name}")
    alpha = given if alpha is None else alpha
    return Pair(down, up, float(down.shape[0]) if alpha is None else alpha)


def _alpha_tensor(alpha: float, dtype: torch.dtype) -> torch.Tensor:
    """A scalar of the file's dtype, as kohya writes it, or the first wider one that does not round alpha."""
    scalars = (torch.tensor(alpha, dtype=kind) for kind in (dtype, torch.float32, torch.float64))
    return next(scalar for scalar in scalars if float(scalar) == alpha)


def _stated_alphas(
    path: Path, metadata: Mapping[str, str], adapter: dict[str, Any] | None
) -> Callable[[str, int], float | None]:
    """Alpha of a module by its rank, as peft or diffusers' `save_lora_weights` records it; None if they do not."""
    configs: dict[str, dict[str, Any]] = {} if adapter is None else {"unet": adapter}
    try:
        facts = json.loads(metadata.get(ADAPTER_KEY, "{}"))
        for key, value in facts.items():
            component, _, field = key.partition(".")
            configs.setdefault(component, {})[field] = value
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path}: its {ADAPTER_KEY} is not what diffusers writes ({error})") from None

    def stated(name: str, rank: int) -> float | None:
        component, _, module = name.partition(".")
        if component in configs:
            return _peft_alpha(configs[component], module, rank)
        return float(rank) if NUM_STEPS_KEY in metadata else None  # ours: earlier ones left out what was the rank

    return stated


def _peft_alpha(config: Mapping[str, Any], module: str, rank: int) -> float | None:
    """peft's scaling of a module, times its rank."""
    if config.get("use_dora") or config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"a {config.get('peft_type', 'DoRA')} adapter other than plain LoRA cannot be converted")
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    names = (module, module.removeprefix("text_model."))
    alpha = next((patterns[key] for name in names if (key := get_pattern_key(list(patterns), name)) in patterns), None)
    alpha = config.get("lora_alpha") if alpha is None else alpha
    if alpha is None:
        return None
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)


def _adapter_metadata(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """peft's configuration of each component as `save_lora_weights` flattens it; what most have is the rule."""
    result: dict[str, Any] = {}
    components = dict.fromkeys(name.partition(".")[0] for name in pairs)
    for component in components:
        # transformers 5 has text encoders with and without the outer module; a name's end matches both
        own = {
            name.removeprefix(f"{component}.").removeprefix("text_model."): pair
            for name, pair in pairs.items()
            if name.startswith(f"{component}.")
        }
        rank, alpha = (
            _commonest([pair.rank for pair in own.values()]),
            _commonest([pair.alpha for pair in own.values()]),
        )
        config = {
            "r": int(rank),
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "target_modules": sorted(own),
            "rank_pattern": {re.escape(name): pair.rank for name, pair in own.items() if pair.rank != rank},
            "alpha_pattern": {re.escape(name): pair.alpha for name, pair in own.items() if pair.alpha != alpha},
        }
        result |= {f"{component}.{key}": value for key, value in config.items()}
    return result


def _commonest(values: Sequence[float]) -> float:
    return max(sorted(set(values)), key=values.count)


def folded(lora: LoraFile) -> LoraFile:
    """The same LoRA with alpha = rank: alpha / rank multiplied into the ups, for readers that know no alpha."""
    return replace(lora, pairs={name: _rescaled(pair, float(pair.rank)) for name, pair in lora.pairs.items()})


def with_one_alpha(lora: LoraFile) -> LoraFile:
    """The same LoRA with the alpha that most modules of a network have for all of them; the ups make up for it."""
    common = {component: _commonest([a for a in found if a] or found) for component, found in lora.alphas.items()}
    return replace(lora, pairs={name: _rescaled(p, common[name.partition(".")[0]]) for name, p in lora.pairs.items()})


def _rescaled(pair: Pair, alpha: float) -> Pair:
    """The same change of the weight by another alpha, rounded once to the dtype of up."""
    if pair.alpha == alpha:
        return pair
    ratio = pair.alpha / alpha
    return replace(pair, up=pair.up.map(lambda up: (up.float() * ratio).to(up.dtype)), alpha=alpha)
