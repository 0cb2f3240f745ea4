"""What can be exported and imported: a pipeline folder, a single file, a UNet or a LoRA with the base it belongs to.

`open_model` finds out which of them a path is and gives the same `Model` for all: names and shapes now, values when
they are written or loaded. Nothing but safetensors, JSON and text is ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import ModelError
from ..text import one_line
from . import facts as fact_names
from .config import scheduler_arguments, vae_scale_factor
from .facts import Facts, architecture_of, scheduler_config, scheduler_text
from .lora import check_pair, find_loras
from .lora_file import LoraFile, read_lora_file
from .networks import CONV_IN, NETWORKS, check_shapes, is_sdxl, parameter_shapes, sdxl_configs
from .original_keys import PREFIXES, V_PREDICTION, ZERO_SNR, check_prefixes, from_original
from .safetensors_check import check_safetensors
from .weights import Lazy, listing, open_network, open_weights

CONFIG_KEY = "sdxl_fast.pipeline"
"""Metadata key of a single file whose networks are not SDXL's own: their configurations and tokenizers, as JSON."""

PUBLISHED = "stabilityai/stable-diffusion-xl-base-1.0"
"""Where the configurations and tokenizers of SDXL itself come from; weights are not fetched."""

Form = Literal["folder", "single file", "unet", "lora"]
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True, slots=True)
class Model:
    """A pipeline in files, or as much of one as there is.

    Attributes:
        path: where it came from.
        tensors: by network and by diffusers' or transformers' parameter name; at least "unet".
        configs: by network, and "scheduler"; empty where the files do not say.
        tokenizers: text of each file by tokenizer and file name.
        facts: how it is sampled.
        extras: few-step LoRAs beside a whole pipeline folder, by step count.
        own_scheduler: whether the scheduler is this checkpoint's own, not just SDXL's.
        adapted: the networks that a LoRA was merged into.
    """

    path: Path
    tensors: dict[str, dict[str, Lazy]]
    configs: dict[str, dict[str, Any]]
    tokenizers: dict[str, dict[str, str]]
    facts: Facts
    metadata: dict[str, str] = field(default_factory=dict)
    extras: dict[int, Path] = field(default_factory=dict)
    own_scheduler: bool = False
    adapted: frozenset[str] = frozenset()

    @property
    def architecture(self) -> str:
        """ModelSpec's name of it."""
        return architecture_of(shrunken=self.shrunken)

    @property
    def shrunken(self) -> bool:
        """Whether its networks are of another size than SDXL's."""
        return not is_sdxl(self.tensors["unet"])

    @property
    def side(self) -> int | None:
        """The native picture side in pixels, where the configurations tell."""
        unet, vae = self.configs.get("unet", {}), self.configs.get("vae", {})
        if "sample_size" not in unet or "block_out_channels" not in vae:
            return None
        return int(unet["sample_size"]) * vae_scale_factor(vae)


def form_of(path: str | Path) -> Form:
    """What lies at `path`.

    Raises:
        ModelError: nothing of SDXL, or unsafe, or broken.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return "folder"
        if (path / "adapter_config.json").is_file():
            return "lora"
        if read_json(path / "config.json", f"{path}: not a diffusers pipeline folder").get("_class_name") is not None:
            return "unet"
        raise ModelError(f"{path}: neither a diffusers pipeline folder nor a UNet's")
    names = check_safetensors(path).keys()
    if any("lora" in name for name in names):
        return "lora"
    if any(name.startswith(PREFIXES["unet"]) for name in names):
        return "single file"
    if CONV_IN in names:
        return "unet"
    raise ModelError(f"{path}: not an SDXL checkpoint, UNet or LoRA (its first tensor is {min(names, default='none')})")


def open_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    steps: int | None = None,
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Open anything that contains an SDXL UNet or changes one.

    Args:
        path: a diffusers folder, a single file, a UNet's file or folder, or a LoRA in any dialect.
        base: a folder or single file for what `path` lacks: needed for a LoRA, and to get a whole pipeline from a UNet.
        steps: of a folder with few-step LoRAs, the student to take.
        alpha: of a LoRA that does not say.
        dtype: merged weights are rounded to it once; None is the base's.

    Raises:
        ModelError: not such a thing, unsafe, broken, or its weights do not fit together; unmatched names are listed.
    """
    path = Path(path)
    form = form_of(path)
    if form == "folder":
        return _open_folder(path, steps, dtype)
    whole = None if base is None else open_model(base, dtype=dtype)
    if form == "single file":
        return _open_single_file(path, whole)
    if form == "unet":
        return _open_unet(path, whole)
    if whole is None:
        raise ModelError(f"{path}: a LoRA, which needs a base model: give --base")
    return _adapted(undistilled(whole), read_lora_file(path, modules=_modules(whole), alpha=alpha), path, dtype)


def read_json(path: Path, problem: str) -> dict[str, Any]:
    """A JSON object from a file; `problem` begins the message when it is missing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{problem} ({path.name} is missing)") from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object")
    return found


def completed(model: Model) -> Model:
    """The same with configurations and tokenizers; those of SDXL itself come from the hub or its cache.

    Raises:
        ModelError: networks are missing, or the configurations are not to be had.
    """
    missing = [name for name in NETWORKS if name not in model.tensors]
    if missing:
        raise ModelError(f"{model.path}: lacks {listing(missing)}: give --base, the pipeline that it belongs to")
    if all(name in model.configs for name in (*NETWORKS, "scheduler")) and model.tokenizers:
        return model
    if not is_sdxl(model.tensors["unet"]):
        raise ModelError(f"{model.path}: is not of SDXL's size and says nothing of its configuration: give --base")
    published = _read_configs(_download_configs())
    configs = published[0] | {"scheduler": published[0]["scheduler"] | model.configs.get("scheduler", {})}
    return replace(model, configs=configs, tokenizers=published[1])


def rescheduled(model: Model, known: Facts) -> Model:
    """The same model, sampled by other facts: its scheduler says what they do."""
    if known == model.facts:
        return model
    if (known.num_steps, known.prediction_type) == (model.facts.num_steps, model.facts.prediction_type):
        return replace(model, facts=known)
    scheduler = _resampled(model.configs.get("scheduler", {}), known)
    known = replace(known, scheduler=scheduler_text(scheduler))
    return replace(model, facts=known, configs=model.configs | {"scheduler": scheduler})


def embedded_configs(model: Model) -> str:
    """The value for `CONFIG_KEY`."""
    configs = {name: model.configs[name] for name in (*NETWORKS, "scheduler")}
    return json.dumps({"configs": configs, "tokenizers": model.tokenizers}, sort_keys=True, ensure_ascii=False)


def undistilled(model: Model) -> Model:
    """The base UNet of a pipeline folder that ships one beside its student; any other model as it is."""
    folder = model.path / "unet_base"
    if not folder.is_dir():
        return model
    unet, _ = open_network(folder)
    stated = [Facts.of(path, open_weights(path)[1]).prediction_type for path in model.extras.values()]
    facts = replace(model.facts, prediction_type=(stated[0] if stated else None) or "epsilon", num_steps=None)
    config = read_json(folder / "config.json", f"{folder}: no configuration")
    return replace(model, tensors=model.tensors | {"unet": unet}, configs=model.configs | {"unet": config}, facts=facts)


# ---- one function per form ----


def _open_folder(folder: Path, steps: int | None, dtype: torch.dtype | None) -> Model:
    index = read_json(folder / "model_index.json", f"{folder}: not a diffusers pipeline folder")
    if "StableDiffusionXL" not in str(index.get("_class_name")):
        raise ModelError(f"{folder}: holds a {index.get('_class_name')}, not a Stable Diffusion XL pipeline")
    configs, tokenizers = _read_configs(folder)
    tensors, metadata = {}, dict[str, str]()
    for name in NETWORKS:
        tensors[name], found = open_network(folder / name)
        metadata = found if name == "unet" else metadata
    scheduler = configs["scheduler"]
    known = Facts.of(folder, metadata)
    prediction = known.prediction_type or scheduler.get("prediction_type", "epsilon")
    one_step = 1 if prediction == "sample" else None  # an x0 student is one of one step
    known = replace(
        known,
        num_steps=known.num_steps or one_step,
        prediction_type=prediction,
        scheduler=known.scheduler or scheduler_text(scheduler),
    )
    loras = find_loras(folder) if (folder / "unet_base").is_dir() else {}
    if loras:  # the files are called after the model, the folder may be called anything
        known = replace(known, name=fact_names.parse_file_name(next(iter(loras.values())).stem).name)
    model = Model(folder, tensors, configs, tokenizers, known, metadata, loras, own_scheduler=True)
    if steps is None or steps == known.num_steps:
        return model
    if steps in loras:
        lora = read_lora_file(loras[steps])
        return _adapted(undistilled(model), lora, loras[steps], dtype)
    if known.num_steps is not None or loras:
        counts = sorted({*loras} | ({known.num_steps} if known.num_steps else set()))
        raise ModelError(f"{folder}: has no student of {steps} steps; it draws in {', '.join(map(str, counts))}")
    return rescheduled(model, known.but(num_steps=steps))


def _read_configs(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    configs = {}
    for name in NETWORKS:
        configs[name] = read_json(
            folder / name / "config.json", f"{folder / name}: this part of the pipeline is missing"
        )
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json", f"{folder}: no scheduler config")
    tokenizers = {}
    for name in TOKENIZERS:
        files = [path for path in sorted((folder / name).glob("*")) if path.suffix in (".json", ".txt")]
        if not files:
            raise ModelError(f"{folder / name}: this part of the pipeline is missing")
        tokenizers[name] = {path.name: path.read_text(encoding="utf-8") for path in files}
    return configs, tokenizers


def _open_single_file(path: Path, base: Model | None) -> Model:
    tensors, metadata = open_weights(path)
    known = Facts.of(path, metadata)
    if V_PREDICTION in tensors:  # ComfyUI goes by it, whatever else a file says
        known = replace(known, prediction_type="v_prediction")
    configs, tokenizers = _stated_configs(path, metadata)
    if base is not None:
        configs, tokenizers = base.configs, base.tokenizers
    shapes = {name: parameter_shapes(name, (configs or sdxl_configs())[name]) for name in NETWORKS}
    check_prefixes(tensors, source=str(path))
    networks = from_original(tensors, shapes, source=str(path))
    for name, parts in networks.items():
        check_shapes(parts, shapes[name], source=f"{path}: {name}")
    own = known.scheduler is not None
    if own or known.prediction_type is not None:
        rescaled = {"rescale_betas_zero_snr": True} if {V_PREDICTION, ZERO_SNR} <= tensors.keys() else {}
        configs = configs | {"scheduler": _resampled(configs.get("scheduler", {}), known) | rescaled}
    return Model(path, networks, configs, tokenizers, known, metadata, own_scheduler=own)


def _stated_configs(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    if CONFIG_KEY not in metadata:
        return {}, {}
    try:
        stated = json.loads(metadata[CONFIG_KEY])
        return stated["configs"], stated["tokenizers"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: its {CONFIG_KEY} cannot be read") from None


def _open_unet(path: Path, base: Model | None) -> Model:
    if path.is_dir():
        tensors, metadata = open_network(path)
        config = read_json(path / "config.json", f"{path}: not a UNet")
        if config.get("_class_name") != "UNet2DConditionModel":
            raise ModelError(f"{path}: holds a {config.get('_class_name')}, not a UNet or a pipeline")
        known = Facts.of(path.absolute().parent if path.name.startswith("unet") else path, metadata)
    else:
        tensors, metadata = open_weights(path)
        config = dict(sdxl_configs()["unet"]) if is_sdxl(tensors) else {}
        known = Facts.of(path, metadata)
    config = config if base is None else base.configs.get("unet", config)
    if config:
        check_shapes(tensors, parameter_shapes("unet", config), source=str(path))
    if base is None:
        return Model(path, {"unet": tensors}, {"unet": config} if config else {}, {}, known, metadata)
    # one that says its step count was distilled from the base; any other takes the place of what the folder draws with
    like = base if known.num_steps is None else undistilled(base)
    return _with_facts(replace(like, path=path, tensors=base.tensors | {"unet": tensors}, metadata=metadata), known)


def _adapted(base: Model, lora: LoraFile, path: Path, dtype: torch.dtype | None) -> Model:
    """The base with a LoRA merged into whichever networks it adapts."""
    tensors = {name: dict(parts) for name, parts in base.tensors.items()}
    for key, pair in lora.pairs.items():
        component, _, module = key.partition(".")
        parts = tensors.get(component, {})
        name = f"{module}.weight"
        if component != "unet" and name not in parts:
            name = name.removeprefix("text_model.")
        check_pair(path, key, pair, parts.get(name))
        weight = parts[name]
        parts[name] = Lazy(
            dtype or weight.dtype, weight.shape, partial(_merge, weight, pair.delta, dtype or weight.dtype)
        )
    adapted = frozenset(key.partition(".")[0] for key in lora.pairs)
    merged = replace(base, path=path, tensors=tensors, metadata=lora.metadata, extras={}, adapted=adapted)
    return _with_facts(merged, Facts.of(path, lora.metadata))


def _merge(weight: Lazy, delta: Any, dtype: torch.dtype) -> torch.Tensor:
    """W + ΔW in float32, rounded once."""
    return (weight.read().float() + delta().reshape(weight.shape)).to(dtype)


def _with_facts(model: Model, known: Facts) -> Model:
    """A student on another model's other networks: sampled by what it says itself, or else as the other was."""
    own = _resampled(model.configs.get("scheduler", {}), known)
    known = replace(
        known,
        num_steps=known.num_steps or model.facts.num_steps,
        prediction_type=known.prediction_type or model.facts.prediction_type,
        scheduler=known.scheduler or (model.facts.scheduler if known.num_steps is None else None),
    )
    scheduler = own if known.num_steps is None else _scheduler(known)
    return replace(model, facts=known, configs=model.configs | {"scheduler": scheduler}, extras={}, own_scheduler=True)


def _resampled(config: Mapping[str, Any], known: Facts) -> dict[str, Any]:
    """A scheduler's config with what the facts decide; where they name its class, no argument is set but by them."""
    decided = _scheduler(known)
    unset = {name for name in fact_names.SCHEDULER_ARGUMENTS if "_class_name" in decided and name not in decided}
    return {name: value for name, value in config.items() if not (value and name in unset)} | decided


def _scheduler(known: Facts) -> dict[str, Any]:
    """What of a scheduler's config the facts decide.

    All of it where the class is known, or follows from a step count: SDXL's noise schedule with that class, its
    arguments and the prediction type. Else the prediction type alone, if that.
    """
    if known.scheduler is None and known.num_steps is None:
        return {} if known.prediction_type is None else {"prediction_type": known.prediction_type}
    stated = scheduler_config(known.scheduler or fact_names.TRAILING_EULER)
    arguments = scheduler_arguments(known.prediction_type or "epsilon")
    if known.num_steps is None:
        del arguments["timestep_spacing"]
    elif stated["_class_name"] != "LCMScheduler":
        stated["timestep_spacing"] = "trailing"  # few-step models are trained on no other grid
    return arguments | stated


def _modules(model: Model) -> list[str]:
    return [name.rpartition(".")[0] for name in model.tensors["unet"] if name.endswith(".weight")]


def _download_configs() -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*/*.json", "*/*.txt"]
    for offline in (True, False):
        try:
            folder = Path(snapshot_download(PUBLISHED, allow_patterns=patterns, local_files_only=offline))
            if (folder / "tokenizer_2").is_dir():
                return folder
        except Exception as error:  # the hub client raises a dozen unrelated types; the text is what helps
            failure = one_line(error)
    raise ModelError(
        f"SDXL's configurations and tokenizers are not to be had from {PUBLISHED} ({failure}): give --base"
    )
