# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines that draw the same picture: diffusers' own, faster ones made of it, and this package's.

All are told the same prompts and unit noise, and their time ends with uint8 pictures on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sdxl_fast import OneStepPipeline, calibrate, optimize
from sdxl_fast.inference.timing import StageClock

STAGES = ("text_encoders", "unet", "vae", "post_processing")
STOCK = ("diffusers, contiguous", "diffusers, channels-last")
COMPILED = "diffusers, compiled"
THIRD_PARTIES = ("stable-fast", "OneDiff", "Torch-TensorRT")
OURS = ("sdxl_fast.optimize", "OneStepPipeline")
FLOAT8 = "OneStepPipeline, fp8"
CALIBRATION = ("a red apple", "a sailboat at dusk", "a cat on a chair", "a house with a garden", "a guitar", "the sun")

Size = tuple[int, int]


class Contestant(Protocol):
    """A pipeline that can be judged and timed."""

    def picture(self, prompts: list[str], latents: torch.Tensor) -> np.ndarray:
        """Returns pictures [N, H, W, 3] in 0..1 of unit noise [N, C, h, w]."""

    def sample(self, prompts: list[str], latents: torch.Tensor) -> dict[str, float]:
        """Draws to uint8 on the device; returns the seconds of each stage, and in all as "total"."""


@dataclass(frozen=True)
class Setting:
    """What all contestants share: the folder, the dtype, the device, height and width in pixels (None: native)."""

    folder: Path
    dtype: torch.dtype
    device: str
    size: Size | None = None

    @property
    def sides(self) -> dict[str, int]:
        """Returns the arguments of a call that say the size."""
        return {} if self.size is None else dict(zip(("height", "width"), self.size, strict=True))

    def wait(self) -> None:
        """Waits for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def quiet() -> None:
    """Turns off the libraries' progress bars and advice, among which results would be lost; before they load models."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def stock(setting: Setting, *, channels_last: bool = False) -> Any:
    """Returns diffusers' pipeline of the folder, silent."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(setting.folder, torch_dtype=setting.dtype).to(setting.device)
    pipe.set_progress_bar_config(disable=True)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def compiled(setting: Setting) -> Any:
    """Returns diffusers' pipeline as its documentation makes it fast: channels-last, fused projections, torch.compile.

    On a GPU that is max-autotune, with CUDA graphs; on a CPU, which has none, the default mode.
    """
    pipe = stock(setting, channels_last=True)
    pipe.fuse_qkv_projections()
    mode = "max-autotune" if setting.device == "cuda" else None
    pipe.unet = torch.compile(pipe.unet, mode=mode)
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, mode=mode)
    return pipe


def _stable_fast(setting: Setting) -> Any:
    from sfast.compilers.diffusion_pipeline_compiler import CompilationConfig
    from sfast.compilers.diffusion_pipeline_compiler import compile as compile_pipeline

    config = CompilationConfig.Default()
    config.enable_cuda_graph = True
    return compile_pipeline(stock(setting, channels_last=True), config)


def _onediff(setting: Setting) -> Any:
    from onediffx import compile_pipe

    return compile_pipe(stock(setting))


def _tensorrt(setting: Setting) -> Any:
    import torch_tensorrt  # noqa: F401  (registers the backend)

    pipe = stock(setting)
    pipe.unet = torch.compile(pipe.unet, backend="torch_tensorrt")
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, backend="torch_tensorrt")
    return pipe


class ByDiffusers:
    """A pipeline with diffusers' interface, its stages timed from outside."""

    def __init__(self, pipe: Any, setting: Setting, *, channels_last: bool = False) -> None:
        self._pipe, self._setting = pipe, setting
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._clock: StageClock | None = None
        pipe.encode_prompt = self._timed("text_encoders", pipe.encode_prompt)
        pipe.vae.decode = self._timed("vae", pipe.vae.decode)
        pipe.image_processor.postprocess = self._timed("post_processing", pipe.image_processor.postprocess)
        # past the pipeline's own setter, which takes models only
        pipe.__dict__["unet"] = _TimedNetwork(pipe.unet, self._timed("unet", pipe.unet))

    def picture(self, prompts: list[str], latents: torch.Tensor) -> np.ndarray:
        """See `Contestant`."""
        return np.asarray(self._draw(prompts, latents, "np"))

    def sample(self, prompts: list[str], latents: torch.Tensor) -> dict[str, float]:
        """See `Contestant`."""
        self._setting.wait()
        self._clock = clock = StageClock(torch.device(self._setting.device))
        start = time.perf_counter()
        pictures = self._draw(prompts, latents, "pt")
        with clock.stage("post_processing"):
            pictures = (pictures.permute(0, 2, 3, 1) * 255.0).round_().to(torch.uint8).contiguous()
        self._setting.wait()
        total = time.perf_counter() - start
        self._clock = None
        seconds = clock.seconds()
        return {**{stage: seconds[stage] for stage in STAGES}, "total": total}

    def _draw(self, prompts: list[str], latents: torch.Tensor, output_type: str) -> Any:
        noise = latents.to(self._setting.dtype).contiguous(memory_format=self._layout)
        call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": output_type, **self._setting.sides}
        return self._pipe(prompts, latents=noise, **call).images

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._clock is None:
                return call(*args, **kwargs)
            with self._clock.stage(stage):
                return call(*args, **kwargs)

        return run


class _TimedNetwork:
    """A network whose calls go through `call`; everything else is its own."""

    def __init__(self, network: Any, call: Callable[..., Any]) -> None:
        self._network, self._call = network, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class ByOurs:
    """A `OneStepPipeline`, which times its stages itself."""

    def __init__(self, pipe: OneStepPipeline, setting: Setting) -> None:
        self._pipe, self._setting = pipe, setting

    def picture(self, prompts: list[str], latents: torch.Tensor) -> np.ndarray:
        """See `Contestant`."""
        return np.asarray(self._draw(prompts, latents, "np"))

    def sample(self, prompts: list[str], latents: torch.Tensor) -> dict[str, float]:
        """See `Contestant`."""
        self._setting.wait()
        start = time.perf_counter()
        self._draw(prompts, latents, "uint8")
        self._setting.wait()
        total = time.perf_counter() - start
        if "unet" not in self._pipe.timings:  # one graph held all of it; a second call tells its stages apart
            self._pipe.one_graph = False
            self._draw(prompts, latents, "uint8")
            self._pipe.one_graph = True
        return {**{stage: self._pipe.timings[stage] for stage in STAGES}, "total": total}

    def _draw(self, prompts: list[str], latents: torch.Tensor, output_type: str) -> Any:
        call: dict[str, Any] = {"num_inference_steps": 1, "output_type": output_type, **self._setting.sides}
        return self._pipe(prompts, latents=latents.to(self._setting.dtype), **call).images


def _optimized(setting: Setting) -> ByDiffusers:
    return ByDiffusers(optimize(stock(setting), shapes=()), setting)


def _ours(setting: Setting) -> ByOurs:
    folder, dtype, device = setting.folder, setting.dtype, setting.device
    return ByOurs(OneStepPipeline.from_pretrained(folder, dtype=dtype, device=device), setting)


def _float8(setting: Setting) -> ByOurs:
    pipe = OneStepPipeline.from_pretrained(setting.folder, dtype=setting.dtype, device=setting.device)
    calibrate(pipe, CALIBRATION, num_inference_steps=1, **setting.sides)
    return ByOurs(pipe, setting)


def makers(*, compile: bool, float8: bool, third_parties: bool) -> dict[str, Callable[[Setting], Contestant]]:
    """Returns how each contestant is made; each has weights of its own."""
    found: dict[str, Callable[[Setting], Contestant]] = {
        STOCK[0]: lambda setting: ByDiffusers(stock(setting), setting),
        STOCK[1]: lambda setting: ByDiffusers(stock(setting, channels_last=True), setting, channels_last=True),
    }
    if compile:
        found[COMPILED] = lambda setting: ByDiffusers(compiled(setting), setting, channels_last=True)
    if third_parties:
        for name, make in zip(THIRD_PARTIES, (_stable_fast, _onediff, _tensorrt), strict=True):
            found[name] = lambda setting, make=make: ByDiffusers(make(setting), setting)  # type: ignore[misc]
    found[OURS[0]], found[OURS[1]] = _optimized, _ours
    if float8:
        found[FLOAT8] = _float8
    return found
