"""`optimize`: the same diffusers pipeline, faster; `restore` takes it back.

What changes is where a call begins. UNet, VAE and text encoders get packed code in front of their modules
(`accelerated`), prompts that were encoded before are not encoded again, a float16 VAE is decoded in bfloat16 instead of
being cast to float32 on every call, and one step of image-to-image takes any strength (`start`). Whatever packed code
does not know runs in the modules as before, and `report` says so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import restore as restore_modules
from .calibration import check_quantization, use_scales
from .float8 import Scales
from .graphs import GraphStats
from .prompts import PromptCache
from .runner import Runner, Use
from .start import single_step
from .texts import TextWatch, adapted

Shape = tuple[int, int, int]

_SLOT, _STOCK = "_sdxl_fast", "_sdxl_fast_stock"
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""Attributes of a pipeline that get packed code."""
_SIZES = (64, 4096)  # pixels of a side that make sense


@dataclass(slots=True)
class PartReport:
    """One network: whether it runs packed, why not, how its calls ran, and its CUDA graphs."""

    packed: bool
    reason: str
    use: Use
    graphs: GraphStats | None = None
    graph_bytes: int = 0
    cached_bytes: int = 0
    scales: Scales | None = None
    float8_inputs: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        lines = ["packed" if self.packed else f"runs by its modules: {self.reason}", *str(self.use).splitlines()]
        if self.scales is not None:
            lines += str(self.scales).splitlines()
            written, used = self.float8_inputs
            lines.append(f"float8 inputs: {written} of {used} written by the operation before, others rounded alone")
        if self.graphs is not None:
            g = self.graphs
            lines.append(f"{g.captures} graphs captured, {g.replays} replays, {self.graph_bytes >> 20} MB")
            lines += [f"not captured: {name}: {why}" for name, why in g.reasons.items()]
        return "\n  ".join(lines)


@dataclass(slots=True)
class Report:
    """What `optimize` did to a pipeline and how its calls have run since."""

    parts: dict[str, PartReport] = field(default_factory=dict)
    prompts_held: int = 0
    prompt_bytes: int = 0
    prompt_hits: int = 0

    def __str__(self) -> str:
        lines = [f"{name}: {part}" for name, part in self.parts.items()]
        return "\n".join([*lines, f"prompts: {self.prompts_held} held, {self.prompt_hits} found again"])


class Optimized:
    """What `optimize` keeps beside a pipeline: its networks' runners, and the prompts it has encoded."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.runners: dict[str, Runner[Any]] = {}
        self.prompts = PromptCache()
        self._texts = TextWatch()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied pipeline runs as a stock one."""
        return None

    def remembers(self) -> bool:
        """Whether prompts that were encoded may be used again; forgets them if the encoders have changed."""
        encoders = [getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
        if self._texts.changed(encoders):
            self.prompts.clear()
        return not any(adapted(encoder) for encoder in encoders)

    def settle(self) -> None:
        """Note the state of the text encoders after a run."""
        self._texts.settle()


def optimize(
    pipe: Any,
    *,
    shapes: Sequence[Shape] = ((1, 1024, 1024),),
    quantization: str | None = None,
    scales: Scales | str | Path | None = None,
) -> Any:
    """Make a diffusers SDXL pipeline faster, in place; every feature of it keeps its meaning.

    Text-to-image, image-to-image (with one step: any strength), inpainting, ControlNet, IP-Adapter, LoRA, schedulers,
    callbacks and all arguments work as before. `report(pipe)` says what runs packed and what does not.

    Args:
        pipe: any StableDiffusionXL pipeline of diffusers.
        shapes: (batch, height, width) in pixels to make CUDA graphs for now, where there is a GPU; others are captured
            on first use.
        quantization: "fp8" puts the UNet's layers into float8, with the scales that `calibrate` found.
        scales: those, or the file they were saved in.

    Returns:
        the same object.

    Raises:
        ValueError: not an SDXL pipeline, a shape that makes no sense, an unknown quantization, or one without scales.
        ModelError: broken scales, or those of another model.
    """
    unet, vae = getattr(pipe, "unet", None), getattr(pipe, "vae", None)
    if not isinstance(unet, nn.Module) or not isinstance(vae, nn.Module):
        raise ValueError(f"{type(pipe).__name__} has no UNet and VAE; optimize takes diffusers' SDXL pipelines")
    check_shapes(shapes, pipe)
    check_quantization(quantization, scales)
    from .accelerated import attach, packable

    state: Optimized = pipe.__dict__.get(_SLOT) or _install(pipe)
    networks = {name: getattr(pipe, name, None) for name in NETWORKS}
    state.runners = {name: attach(network) for name, network in networks.items() if packable(network)}
    if quantization is not None:
        use_scales(pipe, scales)
    if unet.device.type == "cuda" and "unet" in state.runners:
        for shape in shapes:
            warm(pipe, shape)
    return pipe


def restore(pipe: Any) -> Any:
    """Undo `optimize` on a pipeline, or `nn.fuse` on a module.

    The weights are bit for bit what they were, apart from what was done to them since. Networks that another optimized
    pipeline shares are restored too.

    Returns:
        the pipeline; of a module, how many of its modules went back to their stock class.
    """
    from .accelerated import detach

    if isinstance(pipe, nn.Module):
        count = restore_modules(pipe)
        detach(pipe)
        return count
    pipe.__dict__.pop(_SLOT, None)
    pipe.__class__ = getattr(type(pipe), _STOCK, type(pipe))
    for name in NETWORKS:
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            detach(network)
    return pipe


def report(pipe: Any) -> Report:
    """What `optimize` did to a pipeline; raises ValueError for one that it was not applied to."""
    state: Optimized | None = pipe.__dict__.get(_SLOT)
    if state is None:
        raise ValueError(f"this {type(pipe).__name__} was not optimized; call sdxl_fast.optimize first")
    parts = describe(state.runners)
    for name in NETWORKS:
        network = getattr(pipe, name, None)
        runner = state.runners.get(name)
        if network is None and name not in ("unet", "vae"):
            parts.pop(name, None)  # a refiner has one text encoder
        elif runner is None or runner.network is not network:
            parts[name] = PartReport(False, f"a {type(network).__name__} that optimize does not know", Use())
    found = Report(
        parts=parts,
        prompts_held=len(state.prompts),
        prompt_bytes=state.prompts.nbytes,
        prompt_hits=state.prompts.hits,
    )
    return found


def describe(runners: dict[str, Runner[Any]]) -> dict[str, PartReport]:
    """A report of every runner, by the same names."""
    return {
        name: PartReport(
            packed=runner.program is not None,
            reason=runner.reason,
            use=runner.use,
            graphs=None if runner.graphs is None else runner.graphs.stats,
            graph_bytes=0 if runner.graphs is None else runner.graphs.nbytes,
            cached_bytes=getattr(runner.program, "cached_bytes", 0),
            scales=runner.scales,
            float8_inputs=getattr(runner.program, "float8_inputs", (0, 0)),
        )
        for name, runner in runners.items()
    }


def check_shapes(shapes: Sequence[Shape], pipe: Any) -> None:
    """Raises ValueError unless every shape is (batch, height, width) that the pipeline can draw."""
    factor = pipe.vae_scale_factor
    for shape in shapes:
        if len(shape) != 3 or not all(type(number) is int and number > 0 for number in shape):
            raise ValueError(f"shapes has {shape!r}; give (batch, height, width) in pixels")
        _, *sides = shape
        if any(side % factor or side > _SIZES[1] for side in sides):
            raise ValueError(f"shapes has {shape!r}; sides are multiples of {factor} up to {_SIZES[1]} pixels")


@torch.no_grad()
def warm(pipe: Any, shape: Shape) -> None:
    """Run UNet and VAE once at a shape, which captures their graphs on a GPU."""
    batch, height, width = shape
    unet, factor = pipe.unet, pipe.vae_scale_factor
    dtype, device, config = unet.dtype, unet.device, unet.config
    sample = torch.zeros(batch, config.in_channels, height // factor, width // factor, dtype=dtype, device=device)
    text = torch.zeros(batch, 77, config.cross_attention_dim, dtype=dtype, device=device)
    ids = torch.zeros(batch, 6, dtype=dtype, device=device)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(batch, pooled_width, dtype=dtype, device=device), "time_ids": ids}
    unet(sample, 999, text, added_cond_kwargs=added)
    latents = sample[:, : pipe.vae.config.latent_channels]
    pipe.vae.decode(latents)


def _install(pipe: Any) -> Optimized:
    state = Optimized(pipe)
    pipe.__dict__[_SLOT] = state
    if not hasattr(type(pipe), _STOCK):
        stock: Any = type(pipe)
        pipe.__class__ = _optimized_class(stock)
    return state


@functools.cache
def _optimized_class(stock: type) -> type:
    """A pipeline class of the same name with the few methods replaced that `optimize` changes."""
    methods = {name: make(getattr(stock, name)) for name, make in _METHODS.items() if hasattr(stock, name)}
    about = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock,), {**methods, **about, _STOCK: stock})


def _encode_once(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`encode_prompt` that remembers what it returned for the same texts and options."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: Optimized | None = self.__dict__.get(_SLOT)
        asked = _text_key(signature, (self, *args), kwargs)
        if state is None or asked is None or torch.is_grad_enabled() or not state.remembers():
            return stock(self, *args, **kwargs)
        key = (asked, _tokenizers(self))
        found = state.prompts.get(key)
        if found is not None:
            state.prompts.hits += 1
            return found
        made = stock(self, *args, **kwargs)
        state.settle()
        if isinstance(made, tuple) and all(t is None or isinstance(t, Tensor) for t in made):
            state.prompts.misses += 1
            state.prompts.put(key, made)
        return made

    return encode_prompt


def _text_key(signature: inspect.Signature, args: Any, kwargs: Any) -> Hashable | None:
    """What an encoding depends on; None for a call with embeddings or a LoRA scale, which is not kept."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    key = []
    for name, value in list(given.items())[1:]:
        if isinstance(value, Tensor) or (name == "lora_scale" and value is not None):
            return None
        if isinstance(value, list | tuple):
            if not all(isinstance(text, str) for text in value):
                return None
            value = (type(value).__name__, *value)
        elif not isinstance(value, str | int | float | bool | torch.device | None):
            return None
        key.append((name, value))
    return tuple(key)


def _tokenizers(pipe: Any) -> Hashable:
    """Which tokenizers there are and how many words they know, which textual inversion changes."""
    found = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
    return tuple((id(t), len(t)) for t in found if t is not None)


def _without_upcast(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`upcast_vae` that leaves the VAE alone where it is decoded in a dtype of its own."""

    @functools.wraps(stock)
    def upcast_vae(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: Optimized | None = self.__dict__.get(_SLOT)
        runner = None if state is None else state.runners.get("vae")
        if runner is None or runner.network is not self.vae or runner.ready() is None:
            return stock(self, *args, **kwargs)
        return None

    return upcast_vae


def _at_least_one_step(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`get_timesteps` of image-to-image and inpainting, for steps x strength below one too."""

    @functools.wraps(stock)
    def get_timesteps(self: Any, num_inference_steps: int, strength: float, *args: Any, **kwargs: Any) -> Any:
        start = args[1] if len(args) > 1 else kwargs.get("denoising_start")
        if start is None and strength > 0 and int(num_inference_steps * strength) < 1:
            return single_step(self.scheduler, strength), 1
        return stock(self, num_inference_steps, strength, *args, **kwargs)

    return get_timesteps


_METHODS: dict[str, Callable[[Any], Any]] = {
    "encode_prompt": _encode_once,
    "upcast_vae": _without_upcast,
    "get_timesteps": _at_least_one_step,
}
