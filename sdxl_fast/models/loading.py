"""From a folder, a hub id or a single file to the networks of an SDXL pipeline; safetensors only, checked first."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ModelError
from ..text import one_line
from .facts import NUM_STEPS_KEY
from .lora import base_prediction_type, find_loras, merge_lora, read_lora
from .networks import NETWORKS, filled
from .safetensors_check import check_safetensors
from .source import TOKENIZERS, Model, completed, form_of, open_model, read_json
from .weights import dtype_of, read_tensor, start_of, weight_files

__all__ = [
    "EMBEDDED",
    "NETWORKS",
    "Components",
    "Opened",
    "load",
    "load_base_unet",
    "load_few_step_unet",
    "open_pipeline",
    "resolve",
    "vae_folder",
]

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "emoji"
"""The pipeline that comes with the package."""

_LARGEST_FIRST = ("unet", "text_encoder_2", "text_encoder", "vae")
"""The order of loading: a network takes twice its memory while its file is open."""

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


class Place(NamedTuple):
    """What weights are loaded as, and where to."""

    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class Components:
    """The parts of a loaded pipeline, as diffusers and transformers objects in eval mode on one device.

    `source` is the folder or file they came from, `few_step_loras` the LoRA files beside it by step count, for the
    UNet in its subfolder `unet_base`. `own_scheduler` is False for a single file that does not say how to sample it.
    """

    tokenizer: Any
    tokenizer_2: Any
    scheduler: dict[str, Any]
    source: Path
    text_encoder: Any = None
    text_encoder_2: Any = None
    unet: Any = None
    vae: Any = None
    metadata: dict[str, str] = field(default_factory=dict)
    few_step_loras: dict[int, Path] = field(default_factory=dict)
    own_scheduler: bool = True

    @property
    def base_prediction_type(self) -> str | None:
        """What the UNet under `unet_base` predicts, as its LoRA files say; None when there is no base UNet."""
        if not self.few_step_loras:
            return None
        return base_prediction_type(self.few_step_loras.values())

    @property
    def title(self) -> str | None:
        """What the UNet's weight file calls the model, if it says so."""
        return self.metadata.get("modelspec.title")


def resolve(model: str | Path | None) -> Path:
    """The local folder or file for `model`: `owner/name` is a hub id unless it exists here.

    None, or "embedded" where nothing is called so, is the pipeline that comes with the package.
    A hub id is fetched into the hub's cache, safetensors only, the fp16 variant where there is one.
    """
    if model is None or (model == "embedded" and not Path(model).exists()):
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

    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it announces what the exception says again
    try:
        for variant in ("fp16", None):
            try:
                return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, variant=variant))
            except Exception as error:  # the hub client raises a dozen unrelated types; the text is what helps
                failure = one_line(error)
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    raise ModelError(f"{hub_id}: no such folder, and not to be had from the hub ({failure})")


@dataclass(frozen=True, slots=True)
class Opened:
    """A pipeline of which all has been read but its weights: `parts` without networks, and what reads one of them."""

    parts: Components
    read: Callable[[str], Any]

    def load(self, networks: Sequence[str] = NETWORKS) -> Components:
        """The parts with these networks, weights checked before anything opens them; the others stay None.

        Raises:
            ModelError: a pickled, truncated or corrupt weight file, or weights of another architecture.
        """
        with _no_progress_bars():
            for name in (name for name in _LARGEST_FIRST if name in networks):
                setattr(self.parts, name, self.read(name))
        unet = self.parts.unet
        if unet is not None and unet.config.get("time_cond_proj_dim") is not None:
            raise ModelError(
                f"{self.parts.source}: its UNet takes a guidance embedding (a full LCM), which is not supported"
            )
        return self.parts


def open_pipeline(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    base: Path | None = None,
    vae: str | Path | None = None,
) -> Opened:
    """Open what `load` takes, to see how it is sampled before its weights are read.

    Raises:
        ModelError: not an SDXL pipeline, or a part of it is missing; no such VAE, or one with other latent channels.
    """
    place = Place(dtype, torch.device(device))
    model = None if path.is_dir() and base is None else _whole_model(path, base, dtype)
    opened = _open_folder(path, place) if model is None else _open_model(model, place)
    if vae is None:
        return opened
    if model is None:
        own = read_json(path / "vae" / "config.json", f"{path / 'vae'}: this part of the pipeline is missing")
    else:
        own = model.configs["vae"]
    return replace(opened, read=_with_vae(opened.read, vae, own, place))


def load(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    base: Path | None = None,
    vae: str | Path | None = None,
    networks: Sequence[str] = NETWORKS,
) -> Components:
    """Load a diffusers SDXL folder or an all-in-one SDXL file, weights checked before anything opens them.

    With a `base`, which is one of these, also a UNet alone or a LoRA. `vae` is the folder, or a pipeline's, of an
    AutoencoderKL or AutoencoderTiny to take instead of its own. Networks that `networks` leaves out are None.

    Raises:
        ModelError: not an SDXL pipeline, a pickled, truncated or corrupt weight file, weights of another architecture.
    """
    return open_pipeline(path, dtype=dtype, device=device, base=base, vae=vae).load(networks)


def vae_folder(model: str | Path) -> Path:
    """Where the VAE of a folder lies: there, or in the subfolder of a pipeline's."""
    folder = Path(model).expanduser()
    return folder / "vae" if (folder / "model_index.json").is_file() else folder


def load_base_unet(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The undistilled UNet that a pipeline folder has as `unet_base`.

    Raises:
        ModelError: there is none, or its weights are unsafe or broken.
    """
    with _no_progress_bars():
        return _load_network(folder, "unet_base", Place(dtype, torch.device(device)))  # type: ignore[no-any-return]


def load_few_step_unet(parts: Components, num_steps: int, *, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """The base UNet with the LoRA for `num_steps` merged, and what it predicts."""
    unet = load_base_unet(parts.source, dtype=dtype)
    lora = read_lora(parts.few_step_loras[num_steps], unet)
    merge_lora(unet, lora)
    return unet, lora.prediction_type or "epsilon"


def _open_folder(folder: Path, place: Place) -> Opened:
    index = read_json(folder / "model_index.json", f"{folder}: not a diffusers pipeline folder")
    if "StableDiffusionXL" not in str(index.get("_class_name")):
        raise ModelError(f"{folder}: holds a {index.get('_class_name')}, not a Stable Diffusion XL pipeline")
    loras = find_loras(folder)
    parts = Components(
        tokenizer=_load_tokenizer(folder, "tokenizer"),
        tokenizer_2=_load_tokenizer(folder, "tokenizer_2"),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json", f"{folder}: no scheduler config"),
        source=folder,
        metadata=_metadata(folder / "unet"),
        few_step_loras=loras if (folder / "unet_base").is_dir() else {},
    )
    return Opened(parts, functools.partial(_load_network, folder, place=place))


def _with_vae(
    read: Callable[[str], Any], vae: str | Path, own: Mapping[str, Any], place: Place
) -> Callable[[str], Any]:
    """What reads the networks with another VAE in the place of the one that has `own` as its configuration."""
    folder = vae_folder(vae)
    config = read_json(folder / "config.json", f"{vae}: not the folder of a VAE")
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ModelError(f"{vae}: holds a {kind}; a VAE is an AutoencoderKL or an AutoencoderTiny")
    channels, wanted = (known.get("latent_channels", 4) for known in (config, own))  # diffusers' default
    if channels != wanted:
        raise ModelError(f"{vae}: has {channels} latent channels; this pipeline's has {wanted}")
    other = functools.partial(_load_network, folder.parent, folder.name, place, kind=kind)
    return lambda name: other() if name == "vae" else read(name)


def _metadata(network: Path) -> dict[str, str]:
    """Of the first weight file in a network's folder; none where there is no such file, which loading it says."""
    if not any(network.glob("*.safetensors")):
        return {}
    found: dict[str, str] = check_safetensors(weight_files(network)[0][0]).get("__metadata__", {})
    return found


def _load_network(folder: Path, name: str, place: Place, *, kind: str | None = None) -> Any:
    """One network from its subfolder; `kind` is another diffusers class than a pipeline's own."""
    if kind is None and name.startswith("text"):
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        loader: Any = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
        dtype_name = "dtype"
    else:
        import diffusers

        kind = kind or ("AutoencoderKL" if name == "vae" else "UNet2DConditionModel")
        loader, dtype_name = getattr(diffusers, kind), "torch_dtype"
    files, variant = weight_files(folder / name)
    headers = [check_safetensors(file) for file in files]
    try:
        network, info = loader.from_pretrained(
            folder,
            subfolder=name,
            use_safetensors=True,
            variant=variant,
            output_loading_info=True,
            local_files_only=True,
            **{dtype_name: place.dtype},
        )
    except Exception as error:  # loaders raise anything from OSError to SafetensorError on a broken file
        raise ModelError(f"{folder / name}: cannot be loaded ({one_line(error)})") from error
    for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # position_ids: a constant that older transformers saved
        keys = [key for key in info.get(wrong, ()) if not str(key).endswith("position_ids")]
        if keys:
            what = wrong.replace("_", " ")
            raise ModelError(f"{folder / name}: weights do not fit its config: {len(keys)} {what}, first {keys[0]}")
    if place.device.type == "cpu":
        _unmap(network, dict(zip(files, headers, strict=True)))
    return _settled(network, place)


def _unmap(network: nn.Module, headers: Mapping[Path, Mapping[str, Any]]) -> None:
    """Give all weights memory of their own.

    Safetensors leaves them in the mapped file. What is looked at of that counts as this process's memory, beside
    whatever packing makes of it, and another program is free to overwrite it. So they are read, not copied.
    """
    entries: dict[str, tuple[Path, int, Any]] = {}
    for file, header in headers.items():
        start = start_of(file, header)
        entries |= {name: (file, start, entry) for name, entry in header.items()}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        file, start, entry = entries.get(name, (Path(), 0, {}))
        same = dtype_of(entry) == tensor.dtype and tuple(entry["shape"]) == tuple(tensor.shape)
        tensor.data = read_tensor(file, entry, start) if same else tensor.data.clone()


def _settled(network: Any, place: Place) -> Any:
    """The network ready to run."""
    return network.to(place.device).eval().requires_grad_(False)


def _load_tokenizer(folder: Path, name: str) -> Any:
    from transformers import CLIPTokenizer

    if not (folder / name).is_dir():
        raise ModelError(f"{folder / name}: this part of the pipeline is missing")
    try:
        return CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder / name}: cannot be loaded ({one_line(error)})") from error


def _whole_model(path: Path, base: Path | None, dtype: torch.dtype) -> Model:
    what = None if base is not None else {"lora": "a LoRA", "unet": "a UNet alone"}.get(form_of(path))
    if what is not None:
        raise ModelError(
            f"{path}: {what}; give an all-in-one file or the folder of a pipeline, or its base as well (--base)"
        )
    return completed(open_model(path, base=base, dtype=dtype))


def _open_model(model: Model, place: Place) -> Opened:
    """The objects that `model`'s configurations describe, to be filled with its weights."""
    tokenizers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZERS:
            files = Path(folder) / name
            files.mkdir()
            for file, text in model.tokenizers[name].items():
                (files / Path(file).name).write_text(text, encoding="utf-8")
            tokenizers[name] = _load_tokenizer(Path(folder), name)
    steps = {} if model.facts.num_steps is None else {NUM_STEPS_KEY: str(model.facts.num_steps)}
    parts = Components(
        **tokenizers,
        scheduler=model.configs["scheduler"],
        source=model.path,
        metadata=model.metadata | steps,
        own_scheduler=model.own_scheduler,
    )

    def read(name: str) -> Any:
        source = f"{model.path}: {name}"
        return _settled(filled(name, model.configs[name], model.tensors[name], place.dtype, source=source), place)

    return Opened(parts, read)


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
