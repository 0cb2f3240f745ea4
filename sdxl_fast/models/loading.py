"""From a folder, a hub id or a single file to the networks of an SDXL pipeline; safetensors only, checked first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .lora import find_loras, merge_lora, read_lora, stated_prediction_type
from .safetensors_check import PICKLE_SUFFIXES, check_safetensors

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "emoji"
"""The pipeline that comes with the package."""

NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(slots=True)
class Components:
    """The parts of a loaded pipeline, as diffusers and transformers objects in eval mode on one device.

    `source` is the folder or file they came from, `few_step_loras` the LoRA files beside it by step count, for the
    UNet in its subfolder `unet_base`.
    """

    tokenizer: Any
    tokenizer_2: Any
    text_encoder: Any
    text_encoder_2: Any
    unet: Any
    vae: Any
    scheduler: dict[str, Any]
    source: Path
    metadata: dict[str, str] = field(default_factory=dict)
    few_step_loras: dict[int, Path] = field(default_factory=dict)

    @property
    def base_prediction_type(self) -> str | None:
        """What the UNet under `unet_base` predicts, as its LoRA files say; None when there is no base UNet."""
        if not self.few_step_loras:
            return None
        header = check_safetensors(next(iter(self.few_step_loras.values())))
        return stated_prediction_type(header.get("__metadata__", {})) or "epsilon"

    @property
    def title(self) -> str | None:
        """What the UNet's weight file calls the model, if it says so."""
        return self.metadata.get("modelspec.title")


def resolve(model: str | Path | None) -> Path:
    """The local folder or file for `model`: None is the embedded pipeline, `owner/name` a hub id unless it exists here.

    A hub id is fetched into the hub's cache, safetensors only, the fp16 variant where there is one.
    """
    if model is None:
        if not (EMBEDDED / "model_index.json").is_file():
            raise ModelError(f"the embedded pipeline is missing from this installation (looked in {EMBEDDED})")
        return EMBEDDED
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model) or path.suffix == ".safetensors":
        raise ModelError(f"{model}: no such folder or file")
    return _download(model)


def _download(hub_id: str) -> Path:
    import diffusers.utils.logging
    from diffusers import DiffusionPipeline

    failure: Exception | None = None
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it announces what the exception says again
    try:
        for variant in ("fp16", None):
            try:
                return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, variant=variant))
            except Exception as error:  # the hub client raises a dozen unrelated types; the text is what helps
                failure = error
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    raise ModelError(f"{hub_id}: no such folder, and not to be had from the hub ({_one_line(failure)})")


def load(
    path: Path, *, dtype: torch.dtype, device: torch.device | str, networks: Sequence[str] = NETWORKS
) -> Components:
    """Load a diffusers SDXL folder or an all-in-one SDXL file, weights checked before anything opens them.

    Networks that `networks` leaves out are None.

    Raises:
        ModelError: not an SDXL pipeline, a pickled, truncated or corrupt weight file, weights of another architecture.
    """
    with _no_progress_bars():
        parts = _load_folder(path, dtype, networks) if path.is_dir() else _load_file(path, dtype, networks)
    if parts.unet is not None and parts.unet.config.get("time_cond_proj_dim") is not None:
        raise ModelError(f"{path}: its UNet takes a guidance embedding (a full LCM), which is not supported")
    for name in networks:
        getattr(parts, name).to(device).eval().requires_grad_(False)
    return parts


def load_few_step_unet(parts: Components, num_steps: int, *, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """The base UNet with the LoRA for `num_steps` merged, and what it predicts."""
    with _no_progress_bars():
        unet, _ = _load_network(parts.source, "unet_base", dtype)
    lora = read_lora(parts.few_step_loras[num_steps], unet)
    merge_lora(unet, lora)
    return unet.eval().requires_grad_(False), lora.prediction_type or "epsilon"


def _load_folder(folder: Path, dtype: torch.dtype, wanted: Sequence[str]) -> Components:
    index = _read_json(folder / "model_index.json", f"{folder}: not a diffusers pipeline folder")
    if "StableDiffusionXL" not in str(index.get("_class_name")):
        raise ModelError(f"{folder}: holds a {index.get('_class_name')}, not a Stable Diffusion XL pipeline")
    loras = find_loras(folder)
    loras = loras if (folder / "unet_base").is_dir() else {}
    networks: dict[str, Any] = dict.fromkeys(NETWORKS)
    metadata: dict[str, str] = {}
    for name in wanted:
        networks[name], facts = _load_network(folder, name, dtype)
        if name == "unet":
            metadata = facts
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", f"{folder}: no scheduler config")
    return Components(
        tokenizer=_load_tokenizer(folder, "tokenizer"),
        tokenizer_2=_load_tokenizer(folder, "tokenizer_2"),
        scheduler=scheduler,
        source=folder,
        metadata=metadata,
        few_step_loras=loras,
        **networks,
    )


def _load_network(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, dict[str, str]]:
    """One network from its subfolder, and the metadata of its first weight file."""
    if name.startswith("text"):
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        loader: Any = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
        dtype_name = "dtype"
    else:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        loader, dtype_name = (AutoencoderKL if name == "vae" else UNet2DConditionModel), "torch_dtype"
    variant, metadata = _check_weights(folder / name)
    try:
        network, info = loader.from_pretrained(
            folder,
            subfolder=name,
            use_safetensors=True,
            variant=variant,
            output_loading_info=True,
            local_files_only=True,
            **{dtype_name: dtype},
        )
    except Exception as error:  # loaders raise anything from OSError to SafetensorError on a broken file
        raise ModelError(f"{folder / name}: cannot be loaded ({_one_line(error)})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # position_ids: a constant that older transformers saved
        keys = [key for key in info.get(kind, ()) if not str(key).endswith("position_ids")]
        if keys:
            what = kind.replace("_", " ")
            raise ModelError(f"{folder / name}: weights do not fit its config: {len(keys)} {what}, first {keys[0]}")
    return network, metadata


def _check_weights(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Check every weight file of a component; returns the variant to load and the first file's metadata."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: this part of the pipeline is missing")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise ModelError(f"{pickles[0]}: a pickled weight file, which could run code; convert it to safetensors")
        raise ModelError(f"{folder}: no .safetensors file")
    plain = [path for path in files if ".fp16." not in path.name]
    headers = [check_safetensors(path) for path in (plain or files)]
    return None if plain else "fp16", headers[0].get("__metadata__", {})


def _load_tokenizer(folder: Path, name: str) -> Any:
    from transformers import CLIPTokenizer

    if not (folder / name).is_dir():
        raise ModelError(f"{folder / name}: this part of the pipeline is missing")
    try:
        return CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder / name}: cannot be loaded ({_one_line(error)})") from error


def _load_file(path: Path, dtype: torch.dtype, wanted: Sequence[str]) -> Components:
    """An all-in-one checkpoint in the original SDXL key layout; configs and tokenizers come from the hub's cache."""
    header = check_safetensors(path)
    if any("lora" in key for key in header):
        raise ModelError(f"{path}: a LoRA, which needs a base model; give the folder of a pipeline")
    if not any(key.startswith("model.diffusion_model.") for key in header):
        what = "a UNet alone" if "conv_in.weight" in header else "not an SDXL checkpoint"
        raise ModelError(f"{path}: {what}; give an all-in-one file or the folder of a pipeline")
    from diffusers import StableDiffusionXLPipeline

    try:
        pipe = StableDiffusionXLPipeline.from_single_file(path, torch_dtype=dtype)
    except Exception as error:
        raise ModelError(f"{path}: cannot be loaded ({_one_line(error)})") from error
    return Components(
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer_2,
        scheduler=dict(pipe.scheduler.config, _class_name=type(pipe.scheduler).__name__),
        source=path,
        metadata=header.get("__metadata__", {}),
        **{name: getattr(pipe, name) if name in wanted else None for name in NETWORKS},
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The libraries draw a bar for every file, gone in milliseconds; leave their setting as it was."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    enabled = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was in zip(libraries, enabled, strict=True):
            if was:
                library.enable_progress_bar()


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{problem} ({path.name} is missing)") from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None


def _one_line(error: Exception | None, limit: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
