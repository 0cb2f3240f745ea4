"""IP-Adapter on an optimized pipeline: as on a stock one, by the UNet's modules, which the report says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

import sdxl_fast


def _load(folder: Path) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_ip_adapter_runs_by_the_modules_and_is_named(toy_folder: Path) -> None:
    fast, stock = sdxl_fast.optimize(_load(toy_folder)), _load(toy_folder)
    weights, embeds = _ip_adapter(stock.unet)
    draw: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    without = fast("cat", generator=_noise(), **draw).images
    images = []
    for pipe in (fast, stock):
        pipe.unet._load_ip_adapter_weights([copy.deepcopy(weights)])
        pipe.set_ip_adapter_scale(0.8)
        images.append(pipe("cat", ip_adapter_image_embeds=[embeds], generator=_noise(), **draw).images)
    assert np.abs(images[0] - images[1]).max() < 1e-4
    assert np.abs(images[0] - without).max() > 0.02
    assert not sdxl_fast.report(fast).parts["unet"].packed
    assert "encoder_hid_proj" in sdxl_fast.report(fast).parts["unet"].reason
    fast.unload_ip_adapter()
    assert np.allclose(fast("cat", generator=_noise(), **draw).images, without, atol=1e-6)
    assert sdxl_fast.report(fast).parts["unet"].packed


def _ip_adapter(unet: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """An IP-Adapter of four tokens for a UNet, as its files hold it, and the embedding of a picture."""
    torch.manual_seed(0)
    width, tokens = unet.config.cross_attention_dim, 4
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    layers = {}
    for number, name in zip(range(1, 2 * len(names), 2), names, strict=True):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        layers |= {f"{number}.to_{part}_ip.weight": torch.randn(inner, width) * 0.3 for part in "kv"}
    projection = {
        "proj.weight": torch.randn(tokens * width, 16),
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}, torch.randn(1, 1, 16)
