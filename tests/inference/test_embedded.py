"""The pipeline that comes with the package, trained weights and all, against stock diffusers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

import sdxl_fast
from sdxl_fast import OneStepPipeline
from sdxl_fast.models.loading import EMBEDDED
from sdxl_fast.models.lora import lora_file_name

PROMPTS = ["red apple", "sailboat"]
HIGH = {torch.float32: torch.float64, torch.bfloat16: torch.float32}


@functools.cache
def _ours(dtype: torch.dtype) -> OneStepPipeline:
    return OneStepPipeline.from_pretrained(dtype=dtype, device="cpu")


def _stock(dtype: torch.dtype, steps: int = 1) -> Any:
    """Stock diffusers; in more than one step the base UNet with the LoRA for them."""
    pipe = StableDiffusionXLPipeline.from_pretrained(EMBEDDED)
    if steps > 1:
        prediction = _ours(torch.float32)._sampler(steps).preset.prediction_type
        pipe.unet = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet_base")
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
        pipe.load_lora_weights(EMBEDDED, weight_name=lora_file_name("emoji", steps))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        getattr(pipe, name).to(dtype)
    return pipe


def _latents(count: int) -> torch.Tensor:
    config = _ours(torch.float32).unet.config
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _pictures(pipe: Any, dtype: torch.dtype, low: torch.dtype, steps: int) -> torch.Tensor:
    noise = _latents(2).to(low).to(dtype)  # all from the same numbers
    found = pipe(PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=0.0, output_type="pt").images
    assert isinstance(found, torch.Tensor)
    return found.double()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("low", HIGH, ids=str)
def test_it_is_as_exact_as_stock(low: torch.dtype, steps: int) -> None:
    """At most twice the error that stock makes in that dtype, through both doors."""
    high = HIGH[low]
    wanted = _pictures(_stock(high, steps), high, low, steps)
    assert wanted.std() > 0.1  # a picture, not a grey field
    stock = _stock(low, steps)
    bound = 2 * (_pictures(stock, low, low, steps) - wanted).norm() + torch.finfo(low).eps * wanted.norm()
    assert (_pictures(_ours(low), low, low, steps) - wanted).norm() <= bound
    optimized = sdxl_fast.optimize(stock, shapes=())
    assert (_pictures(optimized, low, low, steps) - wanted).norm() <= bound
    assert sdxl_fast.report(optimized).parts["unet"].use.packed == steps


def test_batches_equal_singles() -> None:
    pipe = _ours(torch.float32)
    prompts, seeds = [*PROMPTS, "cat"], [3, 4, 5]
    batch = pipe(prompts, seed=seeds, output_type="uint8").images.int()
    for prompt, seed, picture in zip(prompts, seeds, batch, strict=True):
        alone = pipe(prompt, seed=seed, output_type="uint8").images[0].int()
        assert int((alone - picture).abs().max()) <= 2


def test_a_lora_changes_it_and_goes_without_a_trace() -> None:
    pipe = _ours(torch.float32)
    draw = {"seed": 1, "output_type": "np"}
    before = pipe("guitar", **draw).images  # a prompt that no batch has encoded, which rounds otherwise
    name = pipe.load_lora_weights(EMBEDDED / lora_file_name("emoji", 4), weight=0.3)
    assert np.abs(pipe("guitar", **draw).images - before).max() > 0.01
    pipe.delete_adapters(name)
    assert np.array_equal(pipe("guitar", **draw).images, before)
