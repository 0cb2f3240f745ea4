"""The key names of a single-file SDXL checkpoint, and how diffusers' tensors become its tensors.

Such a file holds the networks of Stability's generative-models code under their names there: the UNet as numbered
input, middle and output blocks, the first text encoder as transformers' CLIP, the second as OpenCLIP with query, key
and value of a layer in one matrix and the projection transposed, the autoencoder with 1×1 convolutions for attention
and its decoder's levels counted from the finest. Every name follows from the diffusers name by rules that know no
sizes, so smaller networks of the same structure have names too.

Source: the module trees of github.com/Stability-AI/generative-models (`openaimodel.py`, `diffusionmodules/model.py`)
and github.com/mlfoundations/open_clip (`transformer.py`); the names of sd_xl_base_1.0 stand in the tests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..errors import ModelError
from .weights import Lazy, listing

PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
"""What the names of each network begin with in a single file."""

POSITION_IDS = PREFIXES["text_encoder"] + "text_model.embeddings.position_ids"
LOGIT_SCALE = PREFIXES["text_encoder_2"] + "logit_scale"

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors by which ComfyUI knows a UNet that predicts v, and betas rescaled to end without any signal."""

_IGNORED = re.compile(
    # constants, training state and noise schedules that checkpoints and merges carry along and no picture needs
    r"model_ema\.|denoiser\.|alphas_cumprod|betas$|sqrt_|log_one_minus|posterior_|lvlb_weights|first_stage_model\.loss\.|"
    rf".*\.position_ids$|.*\.logit_scale$|(?:{V_PREDICTION}|{ZERO_SNR})$"
)

How = Literal["same", "rows", "transposed", "conv"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the single file and the diffusers tensors it is made of.

    `how`: "same"; "rows": the sources one below the other; "transposed"; "conv": a matrix as a 1×1 convolution.
    """

    original: str
    sources: tuple[str, ...]
    how: How = "same"


def table(component: str, keys: Iterable[str]) -> list[Entry]:
    """The entries of one network.

    Args:
        component: a key of `PREFIXES`.
        keys: the parameter names of the network in diffusers or transformers.

    Raises:
        ModelError: a name that has no counterpart in the original layout; all are listed.
    """
    keys = [key for key in keys if not key.endswith(".position_ids")]
    entries: dict[str, Entry] = {}
    unknown = []
    rename = _renamer(component, keys)
    for key in keys:
        found = rename(key)
        if found is None:
            unknown.append(key)
            continue
        name, how = PREFIXES[component] + found[0], found[1]
        before = entries[name].sources if name in entries else ()
        entries[name] = Entry(name, (*before, key), how)
    if unknown:
        raise ModelError(f"{component}: no name in a single-file checkpoint for {listing(unknown)}")
    for name, entry in entries.items():
        if entry.how == "rows":
            entries[name] = Entry(name, tuple(sorted(entry.sources, key=_qkv)), "rows")
    return list(entries.values())


def to_original(networks: Mapping[str, Mapping[str, Lazy]]) -> dict[str, Lazy]:
    """All tensors of a single-file checkpoint, out of those of its networks by component and diffusers name.

    Two of the published names are no weights of diffusers' networks and get their constants: the positions 0..76 of the
    first encoder, and CLIP's logit scale, at the ln 100 where OpenCLIP clamps it.
    """
    result: dict[str, Lazy] = {}
    for component, tensors in networks.items():
        for entry in table(component, tensors):
            result[entry.original] = _joined(entry, tensors)
    positions = PREFIXES["text_encoder"] + "text_model.embeddings.position_embedding.weight"
    if positions in result:
        count = result[positions].shape[0]
        result[POSITION_IDS] = Lazy.of(torch.arange(count).reshape(1, count))
    projection = PREFIXES["text_encoder_2"] + "text_projection"
    if projection in result:
        result[LOGIT_SCALE] = Lazy.of(torch.tensor(math.log(100.0), dtype=result[projection].dtype))
    return result


def from_original(
    tensors: Mapping[str, Lazy], keys: Mapping[str, Iterable[str]], *, source: str = "the file"
) -> dict[str, dict[str, Lazy]]:
    """The networks' tensors by component and diffusers name, out of those of a single-file checkpoint.

    Args:
        tensors: of the file.
        keys: parameter names of each wanted network in diffusers or transformers; other networks are left out.
        source: for the error message.

    Raises:
        ModelError: the file lacks tensors of a wanted network, or has some under its prefix that belong to none.
    """
    result: dict[str, dict[str, Lazy]] = {}
    for component, names in keys.items():
        entries = table(component, names)
        wanted = {entry.original for entry in entries}
        there = {name for name in tensors if name.startswith(PREFIXES[component]) and not _IGNORED.match(name)}
        if wanted != there:
            raise ModelError(f"{source}: {component}: {_difference(wanted, there)}")
        parts = result[component] = {}
        for entry in entries:
            parts |= _parted(entry, tensors[entry.original])
    return result


def check_prefixes(names: Iterable[str], *, source: str = "the file") -> None:
    """Raises ModelError, listing them, for names that belong to no network and are not known to be idle."""
    prefixes = tuple(PREFIXES.values())
    strange = [name for name in names if not name.startswith(prefixes) and not _IGNORED.match(name)]
    if strange:
        raise ModelError(f"{source}: {len(strange)} tensors belong to no network of SDXL: {listing(strange)}")


def original_modules(names: Iterable[str]) -> dict[str, str]:
    """Module names of a UNet in diffusers by their original names: `input_blocks.4.1.proj_in` and so on."""
    names = list(names)
    rename = _unet_renamer(names)
    return {found[0]: name for name in names if (found := rename(name)) is not None}


def known_module(component: str, name: str) -> bool:
    """Whether a module of this name can be in a network of SDXL's structure, of whatever size."""
    rename = _unet_renamer([name]) if component == "unet" else _open_clip_name
    return rename(f"{name}.weight") is not None


def _difference(wanted: set[str], there: set[str]) -> str:
    missing, extra = wanted - there, there - wanted
    texts = []
    if missing:
        texts.append(f"{len(missing)} tensors are missing: {listing(missing)}")
    if extra:
        texts.append(f"{len(extra)} tensors match no parameter: {listing(extra)}")
    return "; ".join(texts)


def _joined(entry: Entry, tensors: Mapping[str, Lazy]) -> Lazy:
    parts = [tensors[name] for name in entry.sources]
    first = parts[0]
    if entry.how == "rows":
        if len(parts) != 3 or len({part.shape for part in parts}) != 1 or len({part.dtype for part in parts}) != 1:
            raise ModelError(f"{entry.original}: query, key and value differ in shape or dtype, or one is missing")
        shape = (3 * first.shape[0], *first.shape[1:])
        return Lazy(first.dtype, shape, lambda: torch.cat([part.read() for part in parts]))
    if entry.how == "transposed":
        return first.map(Tensor.t, first.shape[::-1])
    if entry.how == "conv":
        return first.map(partial(torch.reshape, shape=(*first.shape, 1, 1)), (*first.shape, 1, 1))
    return first


def _parted(entry: Entry, tensor: Lazy) -> dict[str, Lazy]:
    (name, *_), shape = entry.sources, tensor.shape
    if entry.how == "rows":
        rows = shape[0] // len(entry.sources)
        return {
            source: tensor.map(partial(torch.narrow, dim=0, start=k * rows, length=rows), (rows, *shape[1:]))
            for k, source in enumerate(entry.sources)
        }
    if entry.how == "transposed":
        return {name: tensor.map(Tensor.t, shape[::-1])}
    if entry.how == "conv":
        # files from before SDXL's release keep these as matrices
        return {name: tensor.map(partial(torch.reshape, shape=shape[:2]), shape[:2])}
    return {name: tensor}


def _qkv(key: str) -> int:
    return next(place for place, letter in enumerate("qkv") if f".{letter}_proj." in key)


_Rename = Callable[[str], "tuple[str, How] | None"]


def _renamer(component: str, keys: list[str]) -> _Rename:
    if component == "unet":
        return _unet_renamer(keys)
    if component == "vae":
        return partial(_vae_name, levels=_count(keys, r"decoder\.up_blocks\.(\d+)\."))
    return _clip_name if component == "text_encoder" else _open_clip_name


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the beginning of a name."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)


def _unet_renamer(names: list[str]) -> _Rename:
    """Block numbers run through all levels, so they depend on the layers per level; upsamplers follow attention."""
    per_level = 1 + _count(names, r"down_blocks\.\d+\.resnets\.(\d+)\.")
    attended = {found[1] for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}

    def rename(key: str) -> tuple[str, How] | None:
        for ours, theirs in _UNET_TOP.items():
            if key == ours or key.startswith(ours + "."):
                return theirs + key[len(ours) :], "same"
        found = _UNET_BLOCK.fullmatch(key)
        if found is None:
            return None
        kind, index, rest = found["kind"], int(found["index"]), found["rest"]
        if kind in ("downsamplers", "upsamplers"):
            if not rest.startswith("conv") or index:
                return None
            block = per_level * (int(found["level"]) + 1)
            if kind == "downsamplers":
                return f"input_blocks.{block}.0.op{rest[4:]}", "same"
            return f"output_blocks.{block - 1}.{2 if found['level'] in attended else 1}.{rest}", "same"
        if kind == "resnets":
            part, _, parameter = rest.partition(".")
            if part not in _UNET_RESNET:
                return None
            rest = _UNET_RESNET[part] + (f".{parameter}" if parameter else "")
        if found["side"] is None:
            return f"middle_block.{2 * index + (kind == 'attentions')}.{rest}", "same"
        block = per_level * int(found["level"]) + index
        side = f"input_blocks.{1 + block}" if found["side"] == "down" else f"output_blocks.{block}"
        return f"{side}.{int(kind == 'attentions')}.{rest}", "same"

    return rename


def _clip_name(key: str) -> tuple[str, How]:
    # transformers 5 leaves the outermost module out where there is no projection beside it
    return (key if key.startswith("text_model.") else f"text_model.{key}"), "same"


_OPEN_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _open_clip_name(key: str) -> tuple[str, How] | None:
    if key == "text_projection.weight":
        return "text_projection", "transposed"
    key = key.removeprefix("text_model.")
    if key in _OPEN_CLIP_TOP:
        return _OPEN_CLIP_TOP[key], "same"
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if found is None:
        return None
    layer, module, parameter = found.groups()
    if re.fullmatch(r"self_attn\.[qkv]_proj", module):
        return f"transformer.resblocks.{layer}.attn.in_proj_{parameter}", "rows"
    if module not in _OPEN_CLIP_LAYER:
        return None
    return f"transformer.resblocks.{layer}.{_OPEN_CLIP_LAYER[module]}.{parameter}", "same"


_VAE_BLOCK = re.compile(
    r"(?P<coder>encoder|decoder)\.(?:(?:down|up)_blocks\.(?P<level>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"} | {
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"  # diffusers' names until 0.17
}  # fmt: skip


def _vae_name(key: str, *, levels: int) -> tuple[str, How] | None:
    found = _VAE_BLOCK.fullmatch(key)
    if found is None:
        known = re.fullmatch(
            r"(?:(?:encoder|decoder)\.(?:conv_in|conv_norm_out|conv_out)|(?:post_)?quant_conv)\.\w+", key
        )
        return (key.replace("conv_norm_out", "norm_out"), "same") if known else None
    coder, kind, rest = found["coder"], found["kind"], found["rest"].replace("conv_shortcut", "nin_shortcut")
    if found["level"] is None:
        if kind == "resnets":
            return f"{coder}.mid.block_{int(found['index']) + 1}.{rest}", "same"
        module, _, parameter = rest.rpartition(".")
        if kind != "attentions" or found["index"] != "0" or module not in _VAE_ATTENTION:
            return None
        matrix = parameter == "weight" and module != "group_norm"
        return f"{coder}.mid.attn_1.{_VAE_ATTENTION[module]}.{parameter}", "conv" if matrix else "same"
    level = int(found["level"])
    side = f"down.{level}" if coder == "encoder" else f"up.{levels - 1 - level}"
    if kind in ("downsamplers", "upsamplers"):
        return f"{coder}.{side}.{kind.removesuffix('rs')}.{rest}", "same"
    return f"{coder}.{side}.block.{found['index']}.{rest}", "same"
