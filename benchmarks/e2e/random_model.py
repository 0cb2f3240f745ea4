# SPDX-License-Identifier: Apache-2.0
"""SDXL's true configuration with random weights, which take the same time and memory as trained ones."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from sdxl_fast import OneStepPipeline
from sdxl_fast.inference import presets
from sdxl_fast.models import config as configs
from sdxl_fast.models.loading import Components
from sdxl_fast.models.tokenizer import save_tokenizer, train_tokenizer

PROMPT = "a red apple"
RANDOM_SDXL = "sdxl-random"


def components(config: configs.PipelineConfig, dtype: torch.dtype, device: str) -> Components:
    """Returns the networks of ``config`` with random weights, made on the device.

    Their tokenizer knows a few hundred tokens: the size of the vocabulary is the one thing that is not SDXL's.
    """
    tokenizer = train_tokenizer([PROMPT], vocab_size=560, max_tokens=config.max_tokens)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[0] if device == "cuda" else []):
            torch.manual_seed(0)
            first, second = configs.build_text_encoders(config, tokenizer, tokenizer)
            networks = {"unet": configs.build_unet(config), "vae": configs.build_vae(config)}
    finally:
        torch.set_default_dtype(before)
    networks |= {"text_encoder": first, "text_encoder_2": second}
    for network in networks.values():
        network.to(device, dtype).eval().requires_grad_(False)
    scheduler = configs.scheduler_arguments("sample")
    return Components(tokenizer, tokenizer, scheduler=scheduler, source=machine.ROOT, **networks)


def pipeline(config: configs.PipelineConfig, dtype: torch.dtype, device: str) -> OneStepPipeline:
    """Returns a one-step pipeline of `components`."""
    return OneStepPipeline(components(config, dtype, device), preset=presets.LIGHTNING_X0)


@contextlib.contextmanager
def folder(config: configs.PipelineConfig, dtype: torch.dtype, device: str) -> Iterator[Path]:
    """A diffusers folder of `components` (7 GB for SDXL in bfloat16), removed at the end; TMPDIR says where."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory(prefix="sdxl-fast-") as temporary:
        found = Path(temporary) / RANDOM_SDXL
        parts = components(config, dtype, device)
        pipe: Any = StableDiffusionXLPipeline(
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            text_encoder_2=parts.text_encoder_2,
            tokenizer=parts.tokenizer,
            tokenizer_2=parts.tokenizer_2,
            unet=parts.unet,
            scheduler=EulerDiscreteScheduler(**parts.scheduler),
            add_watermarker=False,
        )
        pipe.save_pretrained(found)
        for name in ("tokenizer", "tokenizer_2"):
            save_tokenizer(parts.tokenizer, found / name)
        del parts, pipe
        yield found
