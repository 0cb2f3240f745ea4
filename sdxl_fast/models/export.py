"""Writing models in the formats people exchange: UNet file, single file, diffusers folder, LoRA.

All of them are written tensor by tensor under a temporary name and renamed when complete; the largest tensor is all
that is in memory. Loading what is written here gives back the tensors bit for bit, in the dtype they were written in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import ModelError
from ..files import replacing_folder
from .facts import Facts, Kind
from .lora_file import LoraFile, read_lora_file, with_one_alpha, write_lora_file
from .networks import NETWORKS
from .original_keys import V_PREDICTION, ZERO_SNR, to_original
from .source import CONFIG_KEY, TOKENIZERS, Model, completed, embedded_configs, form_of, open_model, undistilled
from .weights import HASH_KEY, Lazy, converted, listing, write_weights

DTYPES: dict[str, torch.dtype | None] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "keep": None,
}
"""By the name to give as `--dtype`; few-step checkpoints are published in float16."""

SUFFIX = ".safetensors"
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")  # .ckpt, .pt, .SAFETENSORS; not the end of a folder called v1.5
# What `export_folder` leaves in a folder, with the model card; few-step LoRAs have names of their own.
_ENTRIES = {*NETWORKS, *TOKENIZERS, "scheduler", "model_index.json", "unet_base", "README.md", "card"}
_STALE = ("sshs_model_hash", "sshs_legacy_hash")  # kohya's hashes, of the file they were read from


def target_file(out: str | Path, facts: Facts, kind: Kind) -> Path:
    """`out` itself if it names a weight file; else the file in the folder `out` that its facts give the name of.

    Raises:
        ValueError: a folder, and the step count for the name is unknown; or a file of another kind.
    """
    out = Path(out)
    if out.suffix == SUFFIX and not out.is_dir():
        return out
    if out.is_file():
        raise ValueError(f"--out {out}: exists and is no {SUFFIX} file")
    if not out.is_dir() and _FILE_SUFFIX.fullmatch(out.suffix):
        raise ValueError(
            f"--out {out}: looks like a file, and {out.suffix} is not written; allowed: a {SUFFIX} file, or a folder "
            "(make one of that name first if that is meant)"
        )
    return out / facts.file_name(kind)


def export_unet(model: Model, out: str | Path, *, dtype: torch.dtype | None = torch.float16) -> Path:
    """Write the UNet as SDXL-Lightning publishes it: diffusers' names, no metadata.

    The true SDXL UNet has 1680 tensors and takes 5,135,149,736 bytes in float16.
    """
    path = target_file(out, model.facts, "unet")
    write_weights(path, converted(model.tensors["unet"], dtype))
    return path


def single_file_tensors(model: Model, dtype: torch.dtype | None) -> dict[str, Lazy]:
    """What a single-file checkpoint of `model` holds: 2515 tensors for SDXL, under the names of sd_xl_base_1.0.

    For v-prediction also the empty ones that say so (see `V_PREDICTION`).
    """
    missing = [name for name in NETWORKS if name not in model.tensors]
    if missing:
        raise ModelError(f"{model.path}: lacks {', '.join(missing)}: give --base, the pipeline that it belongs to")
    tensors = to_original({name: model.tensors[name] for name in NETWORKS})
    if model.facts.prediction_type == "v_prediction":
        rescaled = model.configs.get("scheduler", {}).get("rescale_betas_zero_snr")
        tensors |= {name: Lazy.of(torch.zeros(0)) for name in (V_PREDICTION, *((ZERO_SNR,) if rescaled else ()))}
    return converted(tensors, dtype)


def export_single_file(
    model: Model,
    out: str | Path,
    *,
    dtype: torch.dtype | None = torch.float16,
    metadata: bool = True,
    stated: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an all-in-one checkpoint as diffusers' `from_single_file` and ComfyUI read it.

    Args:
        model: with all four networks.
        out: a file, or a folder for `{name}_{N}step[_x0].safetensors`.
        dtype: of all weights; None leaves them.
        metadata: ModelSpec with a hash and how to sample it; for networks that are not of SDXL's size also their
            configurations and tokenizers, without which nobody could load the file.
        stated: more metadata, which only the person who exports can know: `modelspec.license`, `modelspec.author`.
    """
    tensors = single_file_tensors(model, dtype)
    path = target_file(out, model.facts, "")
    said: dict[str, str] = {}
    if metadata:
        said = model.facts.metadata("", architecture=model.architecture, implementation="sgm", side=model.side)
        said |= {HASH_KEY: "", **stated}
        if model.shrunken:
            said[CONFIG_KEY] = embedded_configs(completed(model))
    write_weights(path, tensors, said)
    return path


def export_folder(
    model: Model,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = torch.float16,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write a diffusers folder, and its few-step LoRAs with the base UNet they are for, if it has any.

    Args:
        model: with all four networks.
        folder: target; an earlier pipeline there is replaced when the new one is complete.
        dtype: of all weights; None leaves them.
        finish: called with the complete folder before it gets its name, to add a model card.

    Raises:
        ModelError: networks or configurations are missing.
        ValueError: `folder` is a file, or a folder with other things than a pipeline of ours in it.
    """
    folder = Path(folder)
    _check_replaceable(folder)
    model = completed(model)
    with replacing_folder(folder) as writing:
        for name in NETWORKS:
            told = model.facts.num_steps is not None and name == "unet"
            said = (
                model.facts.metadata("unet", architecture=model.architecture, implementation="diffusers")
                if told
                else {}
            )
            _write_network(writing / name, name, model.configs[name], converted(model.tensors[name], dtype), said)
        for name in TOKENIZERS:
            for file, text in model.tokenizers[name].items():
                _write_text(writing / name / file, text)
        _write_json(writing / "scheduler" / "scheduler_config.json", model.configs["scheduler"])
        _write_json(writing / "model_index.json", _index(model))
        if model.extras:
            _write_extras(writing, model, dtype)
        if finish is not None:
            finish(writing)
    return folder


def export_lora(
    lora: LoraFile,
    out: str | Path,
    *,
    dialect: str,
    facts: Facts,
    dtype: torch.dtype | None = torch.float16,
    metadata: bool = True,
    side: int | None = None,
    stated: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a LoRA in another dialect with its true alpha; kohya's has one for each network.

    SDXL's 788 modules at rank 64 take 393,854,592 bytes in kohya's dialect without metadata, as SDXL-Lightning's.

    Args:
        lora: as `read_lora_file` gives it.
        out: a file, or a folder for `{name}_{N}step[_x0]_lora.safetensors`.
        dialect: "kohya", "diffusers" or "peft".
        facts: its name and how it is sampled.
        dtype: of the matrices; None leaves them.
        metadata: keep the LoRA's and say how to sample it, if that is known.
        side: the native picture side of its base in pixels; None is SDXL's, if it is for SDXL.
        stated: as for `export_single_file`.

    Raises:
        ValueError: an unknown dialect, or no metadata where the dialect keeps alpha there.
    """
    path = target_file(out, facts, "lora")
    said = {key: value for key, value in lora.metadata.items() if key not in _STALE}
    if facts.sampling:
        said |= facts.metadata("lora", architecture=lora.architecture, implementation="diffusers", side=side)
        said[HASH_KEY] = ""
    said |= stated
    if said and dialect == "kohya":
        said |= _kohya_facts(with_one_alpha(lora))
    write_lora_file(path, replace(lora, metadata=said), dialect, dtype=dtype, bare=not metadata)
    return path


def find_lora(source: str | Path, steps: int | None) -> Path:
    """The LoRA itself, or that of a step count in a pipeline folder.

    Raises:
        ModelError: it is no LoRA, or the folder has none for so many steps.
    """
    source = Path(source)
    form = form_of(source)
    if form == "lora":
        return source
    extras = open_model(source).extras if form == "folder" else {}
    if not extras:
        raise ModelError(f"{source}: no LoRA; to make one of a UNet's difference to its base: export extract-lora")
    if steps not in extras:
        raise ModelError(f"{source}: has LoRAs for {', '.join(map(str, sorted(extras)))} steps: choose with --steps")
    return extras[steps]


def _kohya_facts(lora: LoraFile) -> dict[str, str]:
    """What kohya's tools and A1111 look for; rank and alpha only where all modules agree."""
    facts = {"ss_network_module": "networks.lora"}
    ranks, alphas = {pair.rank for pair in lora.pairs.values()}, {pair.alpha for pair in lora.pairs.values()}
    if len(ranks) == 1 and len(alphas) == 1:
        facts |= {"ss_network_dim": str(ranks.pop()), "ss_network_alpha": f"{alphas.pop():g}"}
    if not lora.shrunken:
        facts["ss_base_model_version"] = "sdxl_base_v1-0"
    return facts


def _check_replaceable(folder: Path) -> None:
    """Raises ValueError unless nothing is lost when a pipeline takes the place of `folder`."""
    if folder.suffix == SUFFIX and not folder.exists():
        raise ValueError(f"--out {folder}: looks like a file, and a folder is written; for a file use single-file")
    entries = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if folder.is_file() or (entries and not (folder / "model_index.json").is_file()):
        raise ValueError(f"--out {folder}: exists and is not a pipeline folder, which would be replaced")
    foreign = [name for name in entries if name not in _ENTRIES and not name.endswith(f"_lora{SUFFIX}")]
    if foreign:
        raise ValueError(
            f"--out {folder}: would be replaced, and with it what is no part of an exported pipeline: "
            f"{listing(foreign)}; move that away, or export to a new folder"
        )


def _write_network(
    folder: Path, name: str, config: dict[str, Any], tensors: dict[str, Lazy], said: dict[str, str]
) -> None:
    """Configuration and weights as `save_pretrained` leaves them, but for the order of metadata."""
    text = name.startswith("text")
    if text:  # transformers before 5.6 knows them by these names alone, later ones by both
        outer = ("text_model.", "text_projection.")
        tensors = {key if key.startswith(outer) else f"text_model.{key}": value for key, value in tensors.items()}
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "torch_dtype")}
    if text:
        config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    stem = "model" if text else "diffusion_pytorch_model"
    write_weights(folder / f"{stem}{SUFFIX}", tensors, {"format": "pt"} | said)


def _write_extras(folder: Path, model: Model, dtype: torch.dtype | None) -> None:
    base = undistilled(model)
    _write_network(folder / "unet_base", "unet", base.configs["unet"], converted(base.tensors["unet"], dtype), {})
    for steps, path in model.extras.items():
        lora = read_lora_file(path)
        write_lora_file(
            folder / replace(Facts.of(path, lora.metadata), num_steps=steps).file_name("lora"),
            lora,
            "peft",
            dtype=dtype,
        )


def _index(model: Model) -> dict[str, Any]:
    from diffusers import __version__

    return {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": __version__,
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", model.configs["scheduler"].get("_class_name", "EulerDiscreteScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
