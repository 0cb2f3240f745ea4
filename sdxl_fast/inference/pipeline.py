"""Text to pictures in one step, or a few, on the fused operations."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..diffusion.prediction import PredictionType
from ..errors import ModelError
from ..models import loading
from ..models.conditioning import time_ids, truncated
from ..models.config import vae_scale_factor
from ..models.facts import place_name
from ..nn import FuseReport
from . import pictures, presets
from .accelerated import attach, packable
from .adapters import Adapters, LoraVerbs
from .calibration import check_quantization, use_scales
from .float8 import Scales
from .graphs import cache_on
from .install import NETWORKS, PartReport, check_shapes, describe
from .presets import Preset
from .prompts import PromptCache
from .request import check_device, check_latents, check_noise, check_output, check_prompts, check_size, rows_of
from .runner import runner_of
from .sampler import OnStep, Sampler, noise_schedule
from .start import remaining
from .texts import TextWatch, encode_texts
from .timing import StageClock, on_its_gpu
from .whole import WholeCall

DTYPES = (torch.float32, torch.bfloat16)

Walk = Callable[..., Tensor]
Callback = Callable[["OneStepPipeline", int, int, dict[str, Any]], "dict[str, Any] | None"]


class OneStepPipeline(LoraVerbs):
    """A few-step SDXL checkpoint, ready to draw; made by `from_pretrained`.

    Components are diffusers and transformers modules, the UNet and the VAE with fused operations swapped in (`fusion`
    reports which) and packed code in front (`report`). LoRAs are merged in place (`load_lora_weights`, `set_adapters`).
    Calling it takes diffusers' arguments:

        prompt: one text or several; or `prompt_embeds` [B, L, D] and `pooled_prompt_embeds` [B, P].
        seed: one per prompt (further pictures of a prompt count up from it), one per picture, or one for all. The noise
            of a picture depends on its seed and size alone, whatever else is in the batch.
        num_inference_steps: one of the property of that name; None is the preset's.
        guidance_scale: 0, or 1, which means the same: these checkpoints are distilled to need none.
        height, width: in pixels, multiples of the VAE's factor; None is the native size.
        num_images_per_prompt: pictures of each prompt, side by side in the output.
        generator: draws the initial noise as diffusers does, instead of `seed`.
        latents: the initial noise, unit normal [N, C, height/f, width/f], with diffusers' meaning: an Euler sampler
            scales it. `seed` is shorthand for the latents that `diffusion.sampling.pure_noise` draws.
        image: pictures to start from instead of noise: PIL, arrays, or tensors [N, 3, H, W] in 0..1, resized to height
            and width where those are given; `latents` is then the noise to add.
        strength: how much of such a picture is drawn anew, above 0 and at most 1. Of n steps the last ⌊n·strength⌋ are
            walked, as in diffusers, and where that is none, one from the timestep round(1000·strength) - 1.
        output_type: "pil"; "np": float32 [N, H, W, 3] in 0..1; "pt": [N, 3, H, W] in 0..1 on the device; "uint8":
            [N, H, W, 3] on the device; "latent".
        return_dict: False returns the tuple (images,).
        callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after every step, with the tensors
            that `callback_on_step_end_tensor_inputs` names ("latents", "prompt_embeds", "add_text_embeds",
            "add_time_ids"); those it returns replace them. Setting `pipe._interrupt` stops after the step.

    Attributes:
        preset: how the checkpoint is sampled.
        default_size: native picture side in pixels.
        vae_scale_factor: picture pixels per latent pixel.
        one_graph: on a GPU, whether calls from noise to uint8 or PIL pictures without a callback run as one CUDA graph;
            others, and all where it is False, have one each for the UNet and the decoder.
    """

    def __init__(self, parts: loading.Components, *, preset: Preset) -> None:
        self.tokenizer, self.tokenizer_2 = parts.tokenizer, parts.tokenizer_2
        self.text_encoder, self.text_encoder_2 = parts.text_encoder, parts.text_encoder_2
        self.unet, self.vae = parts.unet, parts.vae
        self.preset = preset
        self.device, self.dtype = parts.unet.device, parts.unet.dtype
        self.vae_scale_factor = vae_scale_factor(parts.vae.config)
        self.default_size: int = parts.unet.config.sample_size * self.vae_scale_factor
        self.fusion: dict[str, FuseReport] = {"unet": attach(self.unet).fusion}
        if packable(self.vae):
            self.fusion["vae"] = attach(self.vae).fusion
        attach(self.text_encoder)
        attach(self.text_encoder_2)
        self._parts = parts
        self._prompts, self._texts = PromptCache(), TextWatch()
        self._text_graphs, images = cache_on(self.device), cache_on(self.device)
        self._whole = None if images is None else WholeCall(images)
        networks = {name: getattr(self, name) for name in ("unet", "text_encoder", "text_encoder_2")}
        self._adapters = Adapters(networks, changed=self._prompts.clear)
        table = noise_schedule(parts.scheduler, parts.source)
        self._levels: list[float] = table.tolist()
        self._alphas_cumprod = table.to(self.device)
        # kept on the device: a copy of six numbers would wait for everything that is queued
        self._time_ids = functools.lru_cache(64)(time_ids)
        self._variants: dict[int, tuple[Any, Preset]] = {}
        self._clock: StageClock | None = None
        self._ran: dict[str, dict[str, int]] = {}
        self._interrupt, self.one_graph = False, True

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        preset: str | None = None,
        base: str | Path | None = None,
        unet: str | Path | None = None,
        vae: str | Path | None = None,
        lora: str | Path | Mapping[str, float] | Mapping[Path, float] | None = None,
        quantization: str | None = None,
        scales: Scales | str | Path | None = None,
    ) -> OneStepPipeline:
        """Load a pipeline.

        Args:
            model: a diffusers SDXL folder, a hub id, or an all-in-one `.safetensors` file; None is the pipeline that
                comes with the package. With a `base`, also a UNet alone or a LoRA in any dialect.
            dtype: torch.float32 or torch.bfloat16; None is float32 on a CPU and bfloat16 on a GPU.
            device: None is the GPU if there is one.
            preset: which published checkpoint this is (a key of `presets.PRESETS`), where neither its name nor its
                scheduler config tells.
            base: the pipeline that a UNet belongs to or a LoRA is merged into: a folder, a hub id or a file.
            unet: a UNet's file or folder to take instead of the model's own; the same as giving it as `model` and the
                model as `base`.
            vae: the folder of a VAE to take instead of the model's own: an AutoencoderKL, or an AutoencoderTiny, which
                is small, decodes to a coarser picture, and runs as it is.
            lora: a LoRA to load on top, or several with their strengths; see `load_lora_weights`. One whose name says
                that it makes a few-step model of SDXL tells how to sample, too.
            quantization: "fp8" puts the UNet's layers into float8, with the scales that `calibrate` found.
            scales: those, or the file they were saved in.

        Raises:
            ModelError: no such model, not an SDXL pipeline, unsafe or broken weights, or a checkpoint whose sampling
                settings are unknown or contradictory.
            ValueError: an unknown preset, or a dtype that does not work.
        """
        check_quantization(quantization, scales)
        if unet is not None:
            if base is not None:
                raise ValueError("give either unet, which belongs to model, or base, which model belongs to")
            model, base = unet, model or "embedded"
        device = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # Drawing one picture with the embedded pipeline on one thread of a CPU that has bf16 instructions takes as long
        # in bfloat16 as in float32 (UNet 92 and 69 ms, VAE 49 and 69 ms); on most CPUs bfloat16 is emulated.
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" or quantization else torch.float32)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; allowed: torch.float32, torch.bfloat16 (SDXL's VAE overflows float16)")
        chosen = None if preset is None else presets.by_key(preset)
        path = loading.resolve(model)
        origin = None if base is None else loading.resolve(base)
        opened = loading.open_pipeline(path, dtype=dtype, device=device, base=origin, vae=vae)
        loras: dict[Any, float] = dict(lora) if isinstance(lora, Mapping) else {} if lora is None else {lora: 1.0}
        if chosen is None:  # a model that cannot be told is refused before its gigabytes are read
            said = opened.parts
            is_hub_id = model is not None and not Path(model).expanduser().exists()
            name = " ".join(filter(None, (str(model) if is_hub_id else place_name(path), said.title)))
            scheduler = said.scheduler if said.own_scheduler else None
            named = [Path(file).name for file in loras]
            chosen = presets.recognise(name, scheduler, said.metadata, borrowed=origin is not None, loras=named)
        pipe = cls(opened.load(), preset=chosen)
        if quantization is not None:
            use_scales(pipe, scales)
        for file, strength in loras.items():
            pipe.load_lora_weights(file, weight=strength)
        return pipe

    @classmethod
    def from_single_file(cls, path: str | Path, **arguments: Any) -> OneStepPipeline:
        """Load an all-in-one `.safetensors` file; `arguments` are those of `from_pretrained`.

        Raises:
            ModelError: no such file, or not one of an SDXL pipeline.
        """
        if not Path(path).expanduser().is_file():
            raise ModelError(f"{path}: no such file")
        return cls.from_pretrained(path, **arguments)

    @property
    def base_prediction_type(self) -> PredictionType | None:
        """What the undistilled UNet beside the few-step LoRAs predicts; None when the pipeline has none."""
        stated = self._parts.base_prediction_type
        return None if stated is None else presets.prediction_type(stated)

    @property
    def num_inference_steps(self) -> tuple[int, ...]:
        """The step counts this pipeline draws in, ascending."""
        return tuple(sorted({*self.preset.steps, *self._parts.few_step_loras}))

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop."""
        return self._interrupt

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of the last call by stage, and in all; waits for the GPU.

        "text_encoders", "unet", "vae" (image-to-image encodes there too), "post_processing" (to PIL or floats, with the
        copy from the GPU where that is asked for) and "total". For latents nothing is decoded. On a GPU a call that is
        one graph has "image" in place of "unet" and "vae".
        """
        if self._clock is None:
            raise RuntimeError("nothing has been drawn yet")
        return self._clock.seconds()

    def explain(self) -> dict[str, dict[str, int]]:
        """Which backend ran each fused operation in the last call, and how often: `{op: {backend: calls}}`."""
        if self._clock is None:
            raise RuntimeError("nothing has been drawn yet")
        return self._ran

    @property
    def report(self) -> dict[str, PartReport]:
        """Whether the networks run packed, why not, how their calls ran, and their CUDA graphs; on a GPU also "image",
        the calls from noise to pictures that were one graph."""
        found = {name: runner_of(getattr(self, name)) for name in NETWORKS}
        parts = describe({name: runner for name, runner in found.items() if runner is not None})
        return parts if self._whole is None else parts | {"image": self._whole.report}

    def memory_report(self) -> dict[str, int]:
        """Bytes held, by what holds them: networks, UNets of other step counts, LoRAs, caches and CUDA graphs."""
        networks = {name: [getattr(self, name)] for name in loading.NETWORKS}
        networks["other step counts"] = [unet for unet, _ in self._variants.values()]
        held = {name: sum(t.nbytes for n in found for t in n.parameters()) for name, found in networks.items()}
        parts = self.report.values()
        held["float8 weights"] = getattr(getattr(runner_of(self.unet), "program", None), "float8_bytes", 0)
        held["LoRAs and first weights"] = self._adapters.nbytes
        held["prompts"] = self._prompts.nbytes + sum(part.cached_bytes for part in parts)
        texts = 0 if self._text_graphs is None else self._text_graphs.nbytes
        held["graphs"] = sum(part.graph_bytes for part in parts) + texts
        return held

    def warmup(self, shapes: Sequence[tuple[int, int, int]] | None = None) -> None:
        """Draw once at every (batch, height, width), so that the first real call finds everything ready.

        None is one picture of the native size. On a GPU this captures the CUDA graphs.
        """
        shapes = ((1, self.default_size, self.default_size),) if shapes is None else shapes
        check_shapes(shapes, self)
        for batch, height, width in shapes:
            self([""] * batch, seed=0, height=height, width=width, output_type="uint8")

    @on_its_gpu
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        strength: float | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw pictures; the class describes the arguments. Raises ValueError for one that makes no sense."""
        check_output(output_type, callback_on_step_end_tensor_inputs, num_images_per_prompt)
        prompts = check_prompts(prompt, prompt_embeds, pooled_prompt_embeds)
        presets.check_guidance(self.preset, guidance_scale)
        per_prompt, count = num_images_per_prompt, len(prompts) if prompt_embeds is None else len(prompt_embeds)
        channels, factor, total = self._parts.vae.config.latent_channels, self.vae_scale_factor, count * per_prompt
        pixels = pictures.to_start_from(image, strength, (height, width), total, factor)
        if pixels is not None:
            height, width = pixels.shape[2], pixels.shape[3]
        if latents is not None:
            height, width = check_latents(latents, total, channels, (height, width), factor)
        height, width = check_size(height, width, self.default_size, factor)
        noise = check_noise(seed, generator, latents, num_prompts=count, per_prompt=per_prompt)
        sampler = self._sampler(num_inference_steps, strength)
        clock, self._interrupt = StageClock(self.device), False
        with dispatch.record() as counts:
            with clock.stage("text_encoders"):
                given = (prompt_embeds, pooled_prompt_embeds)
                embeds = rows_of(given, per_prompt, self.unet) or self._encoded(prompts, per_prompt)
                state = self._state(embeds, (height, width))
            shape = (total, channels, height // factor, width // factor)
            alone = callback_on_step_end is None and pixels is None and output_type in pictures.AS_BYTES
            whole = self._whole if alone and self.one_graph else None
            noises, drawn = sampler.noises(shape, noise), None
            if whole is not None:
                with clock.stage("image"):
                    drawn = whole.draw(sampler, self.vae, noises, state)
            if drawn is None:
                on_step = self._on_step(callback_on_step_end, callback_on_step_end_tensor_inputs, state)
                walk = functools.partial(sampler.run, sampler.by_network(state), noises, on_step=on_step)
                drawn = self._by_network(walk, pixels, output_type, clock)
            with clock.stage("post_processing"):
                images = pictures.finish(drawn, output_type)
        clock.stop()
        self._note(clock, counts)
        return pictures.output(images) if return_dict else (images,)

    def _by_network(self, walk: Walk, pixels: Tensor | None, output_type: str, clock: StageClock) -> Tensor:
        """Pictures [N, 3, H, W] in -1..1, or latents where they are asked for, network by network."""
        first = None
        if pixels is not None:
            with clock.stage("vae"):
                first = pictures.encode(self.vae, pixels)
        with clock.stage("unet"):
            latents = walk(first=first).to(self.dtype)
        if output_type == "latent":
            return latents
        with clock.stage("vae"):
            return self.decode(latents)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """prompt_embeds [B, L, D] and pooled_prompt_embeds [B, P] of texts, on the device in the pipeline's dtype.

        They come from a cache: whoever wants to change them in place should do so on a copy.
        """
        return self._encoded(prompts, 1)

    def _encoded(self, prompts: list[str], per_prompt: int) -> tuple[Tensor, Tensor]:
        """The embeddings with `per_prompt` rows of each text."""
        for text in truncated(self.tokenizer, prompts):
            limit = self.tokenizer.model_max_length - 2
            message = f"the prompt beginning {text[:40]!r} has more than {limit} tokens; the rest is not read"
            warnings.warn(message, stacklevel=4)
        encoders = (self.text_encoder, self.text_encoder_2)
        if self._texts.changed(encoders):
            self._prompts.clear()
        tokenizers = (self.tokenizer, self.tokenizer_2)
        graphs, weights = self._text_graphs, self._texts.identity
        found = self._prompts.encode(
            prompts, per_prompt, lambda texts: encode_texts(texts, tokenizers, encoders, graphs, weights)
        )
        self._texts.settle()
        return found

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, H, W], nominally in -1..1, of clean latents [N, C, H/f, W/f]."""
        return pictures.decode(self.vae, latents)

    def _sampler(self, num_steps: int | None, strength: float | None = None) -> Sampler:
        """The UNet that draws in `num_steps`: the main one, or the base with the LoRA for them, loaded on first use."""
        num_steps = self.preset.steps[0] if num_steps is None else num_steps
        unet, preset = self.unet, self.preset
        if num_steps not in preset.steps:
            if num_steps not in self._parts.few_step_loras:
                allowed = ", ".join(map(str, self.num_inference_steps))
                raise ValueError(f"num_inference_steps is {num_steps}; {preset.name} draws in {allowed}")
            if num_steps not in self._variants:
                unet, prediction = loading.load_few_step_unet(self._parts, num_steps, dtype=self.dtype)
                attach(unet.to(self.device))
                self._adapters.add_network("unet", unet)
                found = Preset(f"the {num_steps}-step LoRA", "euler", presets.prediction_type(prediction), (num_steps,))
                self._variants[num_steps] = (unet, found)
            unet, preset = self._variants[num_steps]
        grid = preset.grid(num_steps)
        grid = grid if strength is None else remaining(grid, strength)
        return Sampler(unet, preset, grid, self._alphas_cumprod, self._levels)

    def _state(self, embeds: tuple[Any, ...], size: tuple[int, int]) -> dict[str, Tensor]:
        """The UNet's conditions, one row per picture, under the names diffusers gives them in callbacks."""
        prompt_embeds, pooled = (e.to(self.device, self.dtype) for e in embeds)
        ids = self._time_ids(*size, dtype=self.dtype, device=self.device).repeat(len(pooled), 1)
        return {"prompt_embeds": prompt_embeds, "add_text_embeds": pooled, "add_time_ids": ids}

    def _on_step(self, callback: Callback | None, tensor_inputs: Sequence[str], state: dict[str, Tensor]) -> OnStep:
        def on_step(index: int, timestep: int, latents: Tensor) -> tuple[Tensor, bool]:
            state["latents"] = latents
            if callback is not None:
                replaced = callback(self, index, timestep, {name: state[name] for name in tensor_inputs})
                state.update({key: value for key, value in (replaced or {}).items() if key in state})
            return state["latents"], self._interrupt

        return on_step

    def _note(self, clock: StageClock, counts: dict[tuple[str, str], int]) -> None:
        ran: dict[str, dict[str, int]] = {}
        for (op, backend), calls in sorted(counts.items()):
            ran.setdefault(op, {})[backend] = calls
        self._clock, self._ran = clock, ran
