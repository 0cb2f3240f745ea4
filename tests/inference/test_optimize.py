"""`optimize`: the same pipeline object, the same pictures; test_arguments.py has every argument."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    ControlNetModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from PIL import Image

import sdxl_fast

QUARTER = 0.25 / 255  # of a grey level


def _load(folder: Path) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stock(toy_folder: Path) -> Any:
    return _load(toy_folder)


@pytest.fixture(scope="module")
def fast(toy_folder: Path) -> Any:
    pipe = _load(toy_folder)
    assert sdxl_fast.optimize(pipe, shapes=((1, 32, 32),)) is pipe
    return pipe


def _noise() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _arrays(images: Any) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        return images.float().numpy()
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images]) / 255.0
    return np.asarray(images)


def _same(got: Any, wanted: Any, scale: float = 1.0) -> None:
    got, wanted = _arrays(got), _arrays(wanted)
    assert got.shape == wanted.shape
    assert wanted.std() > 0.02  # a picture, not a grey field
    assert np.abs(got - wanted).max() <= scale * QUARTER


LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def test_one_generator_for_each_picture(stock: Any, fast: Any) -> None:
    draw = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    seeds = [torch.Generator().manual_seed(k) for k in (1, 2)]
    got = fast(["cat", "guitar"], generator=seeds, **draw).images
    _same(got, stock(["cat", "guitar"], generator=[torch.Generator().manual_seed(k) for k in (1, 2)], **draw).images)
    alone = fast("guitar", generator=torch.Generator().manual_seed(2), **draw).images
    assert np.abs(np.round(255 * got[1:]) - np.round(255 * alone)).max() <= 2


SCHEDULERS = {
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "ancestral": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}


def _with(pipe: Any, name: str) -> Any:
    kind, arguments = SCHEDULERS[name]
    known = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
    pipe.scheduler = kind(**known, **arguments)
    return pipe


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(toy_folder: Path, fast: Any, name: str) -> None:
    before = fast.scheduler
    try:
        images = [
            _with(pipe, name)("cat", num_inference_steps=3, guidance_scale=0, generator=_noise(), output_type="np")
            .images
            for pipe in (fast, _load(toy_folder))
        ]  # fmt: skip
    finally:
        fast.scheduler = before
    _same(*images)


def test_callbacks_see_and_change_what_they_did(stock: Any, fast: Any) -> None:
    seen: dict[str, list[Any]] = {"fast": [], "stock": []}

    def note(name: str) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen[name].append((step, float(timestep), tensors["latents"].clone()))
            tensors["prompt_embeds"] = tensors["prompt_embeds"] * 0.5
            return tensors

        return callback

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    for pipe, name in ((fast, "fast"), (stock, "stock")):
        pipe("cat", num_inference_steps=3, guidance_scale=0, generator=_noise(), callback_on_step_end=note(name),
             callback_on_step_end_tensor_inputs=names)  # fmt: skip
    for got, wanted in zip(seen["fast"], seen["stock"], strict=True):
        assert got[:2] == wanted[:2]
        torch.testing.assert_close(got[2], wanted[2], rtol=1e-3, atol=1e-3)


def test_interrupting(fast: Any) -> None:
    steps = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    fast("cat", num_inference_steps=4, guidance_scale=0, callback_on_step_end=stop)
    assert steps == [0, 1]


def test_writing_into_embeddings_does_not_reach_the_next_call(fast: Any) -> None:
    draw = {"num_inference_steps": 2, "guidance_scale": 0, "output_type": "np"}

    def spoil(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        tensors["prompt_embeds"].mul_(5)
        return tensors

    clean = fast("cat", generator=_noise(), **draw).images
    spoilt = fast("cat", generator=_noise(), callback_on_step_end=spoil,
                  callback_on_step_end_tensor_inputs=["prompt_embeds"], **draw).images  # fmt: skip
    assert np.abs(spoilt - clean).max() > 0.01
    assert np.array_equal(fast("cat", generator=_noise(), **draw).images, clean)


def _picture(side: int = 32) -> Image.Image:
    ramp = np.linspace(0, 255, side * side * 3).reshape(side, side, 3)
    return Image.fromarray(ramp.astype(np.uint8))


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (2, 1.0), (1, 1.0)])
def test_image_to_image(stock: Any, fast: Any, steps: int, strength: float) -> None:
    images = []
    for pipe in (fast, stock):
        kind = StableDiffusionXLImg2ImgPipeline(**pipe.components)
        kind.set_progress_bar_config(disable=True)
        kind = sdxl_fast.optimize(kind) if pipe is fast else kind
        images.append(kind("cat", image=_picture(), strength=strength, num_inference_steps=steps, guidance_scale=0,
                           generator=_noise(), output_type="np").images)  # fmt: skip
    _same(*images)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_of_any_strength(toy_folder: Path, name: str) -> None:
    """diffusers walks no step there, and fails or returns nothing. A weaker step stays nearer to the picture."""
    pipe = _with(StableDiffusionXLImg2ImgPipeline(**_load(toy_folder).components), name)
    pipe.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"}
    sdxl_fast.optimize(pipe)
    with torch.no_grad():
        first = pipe.vae.encode(pipe.image_processor.preprocess(_picture())).latent_dist.mode()
    distance = [
        float((pipe("cat", image=_picture(), strength=s, generator=_noise(), **draw).images - first).norm())
        for s in (0.02, 0.3, 0.9)
    ]
    assert distance[0] < distance[1] < distance[2]
    assert np.isfinite(distance).all()
    assert pipe("cat", image=_picture(), strength=0.6, generator=_noise(), num_inference_steps=1).images[0].size == (
        32,
        32,
    )


def test_inpainting(stock: Any, fast: Any) -> None:
    mask = Image.fromarray(np.pad(np.full((16, 32), 255, np.uint8), ((0, 16), (0, 0))))
    images = []
    for pipe in (fast, stock):
        kind = StableDiffusionXLInpaintPipeline(**pipe.components)
        kind.set_progress_bar_config(disable=True)
        kind = sdxl_fast.optimize(kind) if pipe is fast else kind
        images.append(kind("cat", image=_picture(), mask_image=mask, strength=0.9, num_inference_steps=4, height=32,
                           width=32, guidance_scale=0, generator=_noise(), output_type="np").images)  # fmt: skip
        if pipe is fast:
            sides = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
            once = kind("cat", image=_picture(), mask_image=mask, strength=0.5, **sides).images
            assert np.isfinite(once).all()
    _same(*images)


def test_controlnet(stock: Any, fast: Any) -> None:
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(4, 8, 8)).eval()
    for zero in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(zero.weight, std=0.1)
    images = []
    for pipe in (fast, stock):
        kind = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=copy.deepcopy(control))
        kind.set_progress_bar_config(disable=True)
        kind = sdxl_fast.optimize(kind) if pipe is fast else kind
        used = sdxl_fast.report(kind).parts["unet"].use.packed if pipe is fast else 0
        images.append(kind("cat", image=_picture(), num_inference_steps=2, guidance_scale=0, height=32, width=32,
                           generator=_noise(), output_type="np").images)  # fmt: skip
        if pipe is fast:
            assert sdxl_fast.report(kind).parts["unet"].use.packed == used + 2
    _same(*images)


def test_lora_on_fused_and_off(toy_folder: Path) -> None:
    fast, stock = sdxl_fast.optimize(_load(toy_folder)), _load(toy_folder)
    draw = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    name = next(toy_folder.glob("*4step_lora.safetensors")).name
    without = fast("cat", generator=_noise(), **draw).images
    for pipe in (fast, stock):
        pipe.load_lora_weights(toy_folder, weight_name=name)
    _same(*(pipe("cat", generator=_noise(), **draw).images for pipe in (fast, stock)))
    assert "lora" in sdxl_fast.report(fast).parts["unet"].reason
    for pipe in (fast, stock):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    merged = [pipe("cat", generator=_noise(), **draw).images for pipe in (fast, stock)]
    _same(*merged)
    assert np.abs(merged[0] - without).max() > 0.02
    assert sdxl_fast.report(fast).parts["unet"].packed


@pytest.mark.parametrize("cls", [StableDiffusionXLImg2ImgPipeline, AutoPipelineForImage2Image])
def test_another_pipeline_takes_its_networks_over(stock: Any, fast: Any, cls: Any) -> None:
    picture = Image.new("RGB", (32, 32), (200, 60, 40))

    def draw(pipe: Any) -> np.ndarray:
        made = cls.from_pipe(pipe)
        made.set_progress_bar_config(disable=True)
        assert made.unet is pipe.unet and made.vae is pipe.vae
        call = {"prompt": "red apple", "image": picture, "strength": 0.5, "num_inference_steps": 2}
        return _arrays(made(**call, generator=_noise(), output_type="np").images)

    before = sdxl_fast.report(fast).parts["unet"].use.packed
    assert np.abs(draw(fast) - draw(stock)).max() < QUARTER
    assert sdxl_fast.report(fast).parts["unet"].use.packed == before + 1


def test_restoring(stock: Any, toy_folder: Path) -> None:
    pipe = _load(toy_folder)
    sdxl_fast.optimize(pipe)
    assert isinstance(pipe, StableDiffusionXLPipeline)
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert sdxl_fast.optimize(pipe) is pipe  # twice is once
    assert sdxl_fast.restore(pipe) is pipe
    assert type(pipe) is StableDiffusionXLPipeline
    draw = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    _same(pipe("cat", generator=_noise(), **draw).images, stock("cat", generator=_noise(), **draw).images)
    for name in ("unet", "vae"):
        for got, wanted in zip(getattr(pipe, name).parameters(), getattr(stock, name).parameters(), strict=True):
            assert torch.equal(got, wanted)
            assert got.stride() == wanted.stride()
    with pytest.raises(ValueError, match="not optimized"):
        sdxl_fast.report(pipe)
    assert sdxl_fast.restore(pipe) is pipe


def test_a_copy_is_a_stock_pipeline(fast: Any, stock: Any) -> None:
    other = copy.deepcopy(fast)
    draw = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    _same(other("cat", generator=_noise(), **draw).images, stock("cat", generator=_noise(), **draw).images)
    with pytest.raises(ValueError, match="not optimized"):
        sdxl_fast.report(other)


def test_it_saves_what_a_stock_pipeline_saves(fast: Any, toy_folder: Path, tmp_path: Path) -> None:
    fast.save_pretrained(tmp_path)
    again = _load(tmp_path)
    assert type(again) is StableDiffusionXLPipeline
    assert all(
        torch.equal(a, b) for a, b in zip(again.unet.parameters(), _load(toy_folder).unet.parameters(), strict=True)
    )


def test_a_prompt_is_encoded_once(toy_folder: Path) -> None:
    pipe = sdxl_fast.optimize(_load(toy_folder))
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    draw = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    first, again = (pipe("cat", generator=_noise(), **draw).images for _ in range(2))
    assert np.array_equal(first, again)
    assert len(calls) == 1
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(2)
    changed = pipe("cat", generator=_noise(), **draw).images
    assert len(calls) == 2
    assert np.abs(changed - first).max() > 0.001
    assert sdxl_fast.report(pipe).prompt_hits == 1


def test_bfloat16_is_as_close_to_float32_as_stock_bfloat16(toy_folder: Path, stock: Any) -> None:
    draw = {"latents": LATENTS, "num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
    oracle = stock("cat", **draw).images.double()
    errors = []
    for change in (sdxl_fast.optimize, lambda pipe: pipe):
        pipe = change(_load(toy_folder).to(torch.bfloat16))
        errors.append((pipe("cat", **{**draw, "latents": LATENTS.bfloat16()}).images.double() - oracle).norm())
    assert errors[0] <= 2 * errors[1]


def test_batches_equal_their_singles(fast: Any) -> None:
    draw = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    latents = torch.randn(3, 4, 8, 8)
    batch = fast(["cat", "guitar", "sun"], latents=latents, **draw).images
    for index, prompt in enumerate(["cat", "guitar", "sun"]):
        alone = fast(prompt, latents=latents[index : index + 1], **draw).images[0]
        assert np.abs(np.round(255 * batch[index]) - np.round(255 * alone)).max() <= 2


def test_other_networks_stay_and_are_named(toy_folder: Path) -> None:
    pipe = _load(toy_folder)
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3,
                               num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3)  # fmt: skip
    sdxl_fast.optimize(pipe)
    assert pipe("cat", num_inference_steps=1, guidance_scale=0).images[0].size == (32, 32)
    parts = sdxl_fast.report(pipe).parts
    assert "AutoencoderTiny" in parts["vae"].reason
    assert parts["unet"].use.packed == 1


MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no pipeline": (torch.nn.Linear(1, 1), {}, "has no UNet and VAE"),
    "shape": (None, {"shapes": ((1, 32),)}, "batch, height, width"),
    "size": (None, {"shapes": ((1, 33, 32),)}, "multiples of 4"),
    "fp8": (None, {"quantization": "fp8"}, "needs scales"),
    "quantization": (None, {"quantization": "int3"}, "allowed: None"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_change_nothing(toy_folder: Path, case: str) -> None:
    given, arguments, message = MISTAKES[case]
    pipe = _load(toy_folder) if given is None else given
    with pytest.raises(ValueError, match=message):
        sdxl_fast.optimize(pipe, **arguments)
    assert given is not None or type(pipe) is StableDiffusionXLPipeline
