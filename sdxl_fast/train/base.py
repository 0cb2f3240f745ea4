"""The pipeline that a training starts from: found by a run's name, as a folder, in the package or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from ..errors import ModelError
from ..models.config import scheduler_arguments
from ..models.loading import EMBEDDED, resolve
from ..models.lora import base_prediction_type, find_loras
from ..models.weights import weight_files
from .settings import cache_folder

BASE = "unet_base"


def run_folder(name: str) -> Path:
    """The folder of a run by name in the cache, or a path as given."""
    return Path(name) if Path(name).is_dir() else cache_folder() / "runs" / name


def export_of(name: str) -> Path:
    """What a run exported, by the run's name or folder; a folder without `export` is taken as an export itself.

    "embedded", where no run is called so, is the pipeline that comes with the package.
    """
    folder = run_folder(name)
    if name == "embedded" and not folder.is_dir():
        return EMBEDDED
    return folder / "export" if (folder / "export").is_dir() else folder


def base_folder(name: str) -> Path:
    """The folder of a pipeline: a run's export by the run's name, a folder, "embedded", or a hub id, which is fetched.

    Raises:
        ModelError: none of these.
    """
    folder = export_of(name)
    if folder.is_dir():
        return folder
    if "/" in name:
        return resolve(name)
    raise ModelError(
        f"{name!r} is no finished run in {cache_folder() / 'runs'} and no folder; train it first, or name another run, "
        "a folder, a hub id or `embedded`, the base model that comes with the package"
    )


def unet_folder(folder: Path) -> Path:
    """Where a pipeline's base UNet lies: beside a student as `unet_base`, else it is the pipeline's own."""
    return folder / BASE if (folder / BASE).is_dir() else folder / "unet"


def open_unet(folder: Path) -> Any:
    """The base UNet of a pipeline folder, float32."""
    place = unet_folder(folder)
    unet: Any = UNet2DConditionModel.from_pretrained(
        place, use_safetensors=True, variant=weight_files(place)[1], torch_dtype=torch.float32
    )
    return unet


def open_vae(name: str) -> Any:
    """A VAE by the name of its run, as a folder, or as that of a pipeline; float32."""
    folder = base_folder(name)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    vae: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    return vae


def open_pipeline(name: str, vae: str | None = None) -> Any:
    """diffusers' pipeline of a base model, float32.

    Args:
        name: as `base_folder` takes it. Where a student lies beside its base, the base is meant, and the scheduler
            says what that one predicts.
        vae: to be used in place of the pipeline's own, which may then be missing.

    Raises:
        ModelError: there is no such pipeline.
    """
    folder = base_folder(name)
    parts: dict[str, Any] = {} if vae is None else {"vae": open_vae(vae)}
    if (folder / BASE).is_dir():
        kind = base_prediction_type(find_loras(folder).values())
        parts |= {"unet": open_unet(folder), "scheduler": EulerDiscreteScheduler(**scheduler_arguments(kind))}
    variant = weight_files(folder / "unet")[1]
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(
        folder, use_safetensors=True, variant=variant, torch_dtype=torch.float32, **parts
    )
    return pipe
