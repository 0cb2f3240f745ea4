"""Every argument of diffusers' three SDXL pipelines means on an optimized pipeline what it meant on a stock one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from PIL import Image

import sdxl_fast

QUARTER = 0.25 / 255  # of a grey level


def _picture(side: int = 32) -> Image.Image:
    ramp = np.linspace(0, 255, side * side * 3).reshape(side, side, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def _draw(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MASK = Image.fromarray(np.pad(np.full((16, 32), 255, np.uint8), ((0, 16), (0, 0))))
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "text": (StableDiffusionXLPipeline, {"num_inference_steps": 1}),
    "image": (StableDiffusionXLImg2ImgPipeline, {"image": _picture(), "strength": 0.6, "num_inference_steps": 4}),
    "inpaint": (
        StableDiffusionXLInpaintPipeline,
        {"image": _picture(), "mask_image": MASK, "strength": 0.8, "num_inference_steps": 4, "height": 32, "width": 32},
    ),
}


def _dimmer(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": 0.9 * tensors["latents"]}


GUIDED: dict[str, Any] = {"guidance_scale": 3.0}
CASES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": ["cat", "red apple"]},
    "prompt_2": {"prompt_2": "guitar"},
    "image": {"image": _picture().rotate(90)},
    "mask_image": {"mask_image": MASK.rotate(180)},
    "masked_image_latents": {"masked_image_latents": _draw(1, 4, 8, 8)},
    "height": {"height": 48, "width": 24},
    "width": {"height": 40, "width": 24},
    "padding_mask_crop": {"padding_mask_crop": 4, "output_type": "pil"},
    "strength": {"strength": 1.0},
    "num_inference_steps": {"num_inference_steps": 8},
    "timesteps": {"timesteps": [800, 200]},
    "sigmas": {"sigmas": [14.0, 5.0, 2.0, 0.5, 0.0]},
    "denoising_start": {"denoising_start": 0.5},
    "denoising_end": {"denoising_end": 0.5, "num_inference_steps": 8},
    "guidance_scale": GUIDED,
    "guidance_rescale": GUIDED | {"guidance_rescale": 0.5},
    "negative_prompt": GUIDED | {"negative_prompt": "guitar"},
    "negative_prompt_2": GUIDED | {"negative_prompt": "guitar", "negative_prompt_2": "sun"},
    "num_images_per_prompt": {"num_images_per_prompt": 2},
    "eta": {"eta": 0.5},
    "generator": {"generator": 11},
    "latents": {"latents": _draw(1, 4, 8, 8)},
    "prompt_embeds": {"prompt": None, "prompt_embeds": 1.1, "pooled_prompt_embeds": 0.9},
    "pooled_prompt_embeds": {"prompt": None, "prompt_embeds": 0.9, "pooled_prompt_embeds": 1.1},
    "negative_prompt_embeds": GUIDED | {"negative_prompt_embeds": -1.0, "negative_pooled_prompt_embeds": 1.0},
    "negative_pooled_prompt_embeds": GUIDED | {"negative_prompt_embeds": 1.0, "negative_pooled_prompt_embeds": -1.0},
    "output_type": {"output_type": "pil"},
    "output_type pt": {"output_type": "pt"},
    "output_type latent": {"output_type": "latent"},
    "return_dict": {"return_dict": False},
    "cross_attention_kwargs": {"cross_attention_kwargs": {"scale": 0.5}},
    "original_size": {"original_size": (64, 48)},
    "crops_coords_top_left": {"crops_coords_top_left": (3, 5)},
    "target_size": {"target_size": (16, 32)},
    "negative_original_size": GUIDED | {"negative_original_size": (8, 8), "negative_target_size": (64, 64)},
    "negative_crops_coords_top_left": GUIDED
    | {"negative_crops_coords_top_left": (4, 4), "negative_original_size": (8, 8), "negative_target_size": (64, 64)},
    "negative_target_size": GUIDED | {"negative_original_size": (32, 32), "negative_target_size": (8, 8)},
    "aesthetic_score": {"aesthetic_score": 9.0},
    "negative_aesthetic_score": GUIDED | {"negative_aesthetic_score": 1.0},
    "clip_skip": {"clip_skip": 0},
    "callback_on_step_end": {"callback_on_step_end": _dimmer},
    "callback_on_step_end_tensor_inputs": {
        "callback_on_step_end": _dimmer,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    },
}
"""By parameter, perhaps with a word more: what to call with, over `KINDS`; embeddings as multiples of the prompt's."""
ELSEWHERE = {"ip_adapter_image", "ip_adapter_image_embeds"}
"""Tested in test_ip_adapter.py."""


def _parameters(kind: str) -> set[str]:
    return set(inspect.signature(KINDS[kind][0].__call__).parameters) - {"self", "kwargs"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_is_left_out(kind: str) -> None:
    assert _parameters(kind) <= {case.partition(" ")[0] for case in CASES} | ELSEWHERE


@pytest.fixture(scope="module")
def pipes(toy_folder: Path) -> dict[str, tuple[Any, Any]]:
    """(optimized, stock) of each kind, on the same two sets of networks."""
    found: dict[str, tuple[Any, Any]] = {}
    components = [StableDiffusionXLPipeline.from_pretrained(toy_folder).components for _ in range(2)]
    for kind, (cls, _) in KINDS.items():
        pair = tuple(cls(**parts) for parts in components)
        for pipe in pair:
            pipe.set_progress_bar_config(disable=True)
        found[kind] = (sdxl_fast.optimize(pair[0], shapes=()), pair[1])
    return found


def _arrays(images: Any) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        return images.float().numpy()
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images]) / 255.0
    return np.asarray(images)


def _called(pipe: Any, kind: str, case: str) -> Any:
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt("cat", do_classifier_free_guidance=False)
    call = {
        "prompt": "cat",
        "guidance_scale": 0.0,
        "output_type": "np",
        "generator": 7,
        **KINDS[kind][1],
        **CASES[case],
    }
    call = {name: value for name, value in call.items() if name in _parameters(kind)}
    call["generator"] = torch.Generator().manual_seed(call["generator"])
    for name, value in call.items():
        if name.endswith("prompt_embeds"):
            call[name] = value * (pooled if "pooled" in name else embeds)
    return pipe(**call)


SIDED = [(kind, case) for kind in KINDS for case in CASES if case.partition(" ")[0] in _parameters(kind)]


@pytest.mark.parametrize(("kind", "case"), SIDED, ids=[f"{kind}-{case}" for kind, case in SIDED])
def test_it_means_what_it_meant(pipes: dict[str, tuple[Any, Any]], kind: str, case: str) -> None:
    got, wanted = (_called(pipe, kind, case) for pipe in pipes[kind])
    assert type(got) is type(wanted)
    first, second = (found[0] if case == "return_dict" else found.images for found in (got, wanted))
    assert type(first) is type(second)
    bound = {"latent": 10, "pil": 5}.get(CASES[case].get("output_type", ""), 1)  # latents are large, bytes rounded
    first, second = _arrays(first), _arrays(second)
    assert first.shape == second.shape and second.std() > 0.02  # a picture, not a grey field
    assert np.abs(first - second).max() <= bound * QUARTER
