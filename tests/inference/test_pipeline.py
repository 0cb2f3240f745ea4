"""`OneStepPipeline` draws what stock diffusers draws from the same weights and latents, whatever the batch."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm, scheduling_tcd
from diffusers.utils.torch_utils import randn_tensor

from sdxl_fast import OneStepPipeline, use_backend
from sdxl_fast.diffusion import sampling
from sdxl_fast.errors import ModelError
from sdxl_fast.models.lora import lora_file_name
from sdxl_fast.testing.compare import assert_all, compare
from sdxl_fast.testing.toy import toy_pipeline

PROMPTS = ["red apple", "a house with a garden"]
ROWS = 4096  # the accumulated roundings of some hundred operations, as one sum


@pytest.fixture(scope="module")
def pipe(toy_folder: Path) -> OneStepPipeline:
    return OneStepPipeline.from_pretrained(toy_folder, device="cpu")


@functools.cache
def _stock(folder: Path, dtype: torch.dtype, steps: int | None = None) -> Any:
    """Stock diffusers; with `steps`, its UNet replaced by the base one with the LoRA for them."""
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    if steps is not None:
        stock.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet_base")
        stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, prediction_type="epsilon")
        stock.load_lora_weights(folder, weight_name=lora_file_name("toy", steps))
    stock.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        getattr(stock, name).to(dtype)
    return stock


def _renamed(folder: Path, to: Path, **scheduler: Any) -> Path:
    """A copy of a pipeline under another name with other scheduler settings."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("unet_base", "*lora*"))
    config = to / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
    index = to / "model_index.json"
    kind = scheduler.get("_class_name", "EulerDiscreteScheduler")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", kind]}))
    return to


def _assert_same(got: Any, oracle: Any, baseline: Any) -> None:
    outcome = compare(got, oracle.double(), baseline.to(got.dtype), op="pipeline", rows=ROWS)
    assert baseline.std() > 0.05  # a picture, not a grey field
    assert_all([outcome])


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_given_latents_draw_the_stock_picture(pipe: OneStepPipeline, toy_folder: Path, steps: int) -> None:
    latents = torch.randn(2, 4, 8, 8)
    got = pipe(PROMPTS, latents=latents, num_inference_steps=steps, output_type="pt").images
    wanted = [
        _stock(toy_folder, dtype, None if steps == 1 else steps)(
            PROMPTS, latents=latents.to(dtype), num_inference_steps=steps, guidance_scale=0, output_type="pt"
        ).images
        for dtype in (torch.float64, torch.float32)
    ]
    _assert_same(got, *wanted)


SCHEDULERS: dict[str, dict[str, Any]] = {
    "sdxl-turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "my-lcm": {"_class_name": "LCMScheduler", "timestep_spacing": "leading", "original_inference_steps": 50},
    "my-tcd": {"_class_name": "TCDScheduler", "timestep_spacing": "leading", "original_inference_steps": 50},
    "student": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "v-student": {"prediction_type": "v_prediction"},
    "sdxl_lightning_4step": {},
}


@pytest.fixture
def noise_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock schedulers draw fresh noise in the network's dtype; make a float64 run see the numbers of a float32 one."""

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> torch.Tensor:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    for module in (scheduling_lcm, scheduling_euler_ancestral_discrete, scheduling_tcd):
        monkeypatch.setattr(module, "randn_tensor", draw)


@pytest.mark.usefixtures("noise_in_float32")
@pytest.mark.parametrize(
    ("name", "steps"), [(name, steps) for name in SCHEDULERS for steps in (1, 4) if f"{5 - steps}step" not in name]
)
def test_every_sampler_equals_its_stock_scheduler(toy_folder: Path, tmp_path: Path, name: str, steps: int) -> None:
    """From the same latents, and the same generator for the fresh noise of stochastic samplers."""
    folder = _renamed(toy_folder, tmp_path / name, **{"prediction_type": "epsilon"} | SCHEDULERS[name])
    pipe = OneStepPipeline.from_pretrained(folder, device="cpu")
    latents = torch.randn(2, 4, 8, 8)

    def draw(pipe: Any, dtype: torch.dtype) -> torch.Tensor:
        images: torch.Tensor = pipe(
            PROMPTS,
            latents=latents.to(dtype),
            generator=torch.Generator().manual_seed(5),
            num_inference_steps=steps,
            guidance_scale=0,
            output_type="pt",
            **({"eta": 0.3} if name == "my-tcd" and not isinstance(pipe, OneStepPipeline) else {}),
        ).images
        return images

    oracle, baseline = (draw(_stock(folder, dtype), dtype) for dtype in (torch.float64, torch.float32))
    _assert_same(draw(pipe, torch.float32), oracle, baseline)


def test_sizes_besides_the_native_one(pipe: OneStepPipeline, toy_folder: Path) -> None:
    latents = torch.randn(1, 4, 10, 6)
    got = pipe("cat", latents=latents, output_type="pt").images
    assert got.shape == (1, 3, 40, 24)
    wanted = [
        _stock(toy_folder, dtype)(
            "cat", latents=latents.to(dtype), height=40, width=24, num_inference_steps=1, guidance_scale=0,
            output_type="pt",
        ).images
        for dtype in (torch.float64, torch.float32)
    ]  # fmt: skip
    _assert_same(got, *wanted)


def test_bfloat16_is_as_close_to_float32_as_stock_bfloat16(toy_folder: Path) -> None:
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu", dtype=torch.bfloat16)
    latents = torch.randn(2, 4, 8, 8)
    arguments: Any = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
    got = pipe(PROMPTS, latents=latents, **arguments).images
    oracle = _stock(toy_folder, torch.float64)(PROMPTS, latents=latents.double(), **arguments).images
    baseline = _stock(toy_folder, torch.bfloat16)(PROMPTS, latents=latents.bfloat16(), **arguments).images
    error, allowed = ((images.double() - oracle).norm() for images in (got, baseline))
    assert error <= 2 * allowed


def test_a_picture_does_not_depend_on_its_batch(pipe: OneStepPipeline) -> None:
    for steps in (1, 4):
        batch = pipe([*PROMPTS, PROMPTS[0]], seed=[1, 2, 3], num_inference_steps=steps, output_type="np").images
        for index, (prompt, seed) in enumerate(zip([*PROMPTS, PROMPTS[0]], [1, 2, 3], strict=True)):
            alone = pipe(prompt, seed=seed, num_inference_steps=steps, output_type="np").images[0]
            assert np.abs(np.round(255 * batch[index]) - np.round(255 * alone)).max() <= 2
        assert np.abs(batch[0] - batch[2]).max() > 0.1  # the seed matters


def test_a_seed_is_shorthand_for_latents(pipe: OneStepPipeline) -> None:
    latents = sampling.pure_noise((4, 8, 8), torch.tensor([11]))
    by_seed, by_latents = pipe("cat", seed=11, output_type="pt"), pipe("cat", latents=latents, output_type="pt")
    assert torch.equal(by_seed.images, by_latents.images)


def test_several_pictures_of_a_prompt(pipe: OneStepPipeline) -> None:
    many = pipe(PROMPTS, seed=[3, 8], num_images_per_prompt=2, output_type="pt").images
    flat = pipe([p for p in PROMPTS for _ in range(2)], seed=[3, 4, 8, 9], output_type="pt").images
    torch.testing.assert_close(many, flat)  # the text encoders saw two rows there and four here


def test_stochastic_samplers_follow_the_seed(toy_folder: Path, tmp_path: Path) -> None:
    config: Any = {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "epsilon"}
    pipe = OneStepPipeline.from_pretrained(_renamed(toy_folder, tmp_path / "sdxl-turbo", **config), device="cpu")
    arguments: Any = {"num_inference_steps": 4, "output_type": "pt"}
    first, again = (pipe("cat", seed=1, **arguments).images for _ in range(2))
    assert torch.equal(first, again)
    batch = pipe(["cat", "cat"], seed=[2, 1], **arguments).images
    torch.testing.assert_close(batch[1], first[0])


def test_prompt_embeddings_replace_the_prompt(pipe: OneStepPipeline) -> None:
    embeds, pooled = pipe.encode_prompt(PROMPTS)
    got = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, seed=1, output_type="pt").images
    assert torch.equal(got, pipe(PROMPTS, seed=1, output_type="pt").images)


def test_output_types_show_the_same_picture(pipe: OneStepPipeline) -> None:
    kinds = ("pil", "np", "pt", "uint8", "latent")
    found = {kind: pipe(PROMPTS, seed=4, output_type=kind).images for kind in kinds}
    assert found["pt"].shape == (2, 3, 32, 32)
    assert found["np"].shape == (2, 32, 32, 3)
    assert found["np"].dtype == np.float32
    assert np.array_equal(found["pt"].permute(0, 2, 3, 1).numpy(), found["np"])
    assert np.array_equal(np.stack([np.asarray(p) for p in found["pil"]]), np.round(found["np"] * 255).astype(np.uint8))
    assert np.array_equal(found["uint8"].numpy(), np.stack([np.asarray(p) for p in found["pil"]]))
    assert torch.equal(pipe.decode(found["latent"]).mul(0.5).add(0.5).clamp(0, 1), found["pt"])
    (images,) = pipe(PROMPTS, seed=4, output_type="np", return_dict=False)
    assert np.array_equal(images, found["np"])


def test_callbacks_see_what_diffusers_shows_them(pipe: OneStepPipeline, toy_folder: Path) -> None:
    latents = torch.randn(1, 4, 8, 8)
    seen: dict[str, list[Any]] = {"ours": [], "stock": []}

    def note(name: str) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen[name].append((step, int(timestep), {key: value.clone() for key, value in tensors.items()}))
            return {}

        return callback

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    arguments: Any = {"latents": latents, "num_inference_steps": 4, "callback_on_step_end_tensor_inputs": names}
    pipe("cat", callback_on_step_end=note("ours"), **arguments)
    _stock(toy_folder, torch.float32, 4)("cat", guidance_scale=0, callback_on_step_end=note("stock"), **arguments)
    assert [entry[:2] for entry in seen["ours"]] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    for ours, stock in zip(seen["ours"], seen["stock"], strict=True):
        assert ours[:2] == stock[:2]
        for name in names:
            assert_all([compare(ours[2][name], stock[2][name].double(), stock[2][name], op=name, rows=ROWS)])


def test_callbacks_can_replace_tensors_and_stop(pipe: OneStepPipeline) -> None:
    latents = torch.randn(1, 4, 8, 8)
    arguments: Any = {"latents": latents, "num_inference_steps": 4, "output_type": "latent"}
    zero = pipe("cat", callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] * 0 + i}, **arguments).images
    assert torch.equal(zero, torch.full_like(zero, 3.0))
    steps = []

    def stop(p: OneStepPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        p._interrupt = step == 1
        return {}

    pipe("cat", callback_on_step_end=stop, **arguments)
    assert steps == [0, 1]
    assert pipe.interrupt
    pipe("cat", **arguments)
    assert not pipe.interrupt


def test_step_counts_do_not_disturb_each_other(pipe: OneStepPipeline) -> None:
    first = pipe("cat", seed=1, output_type="pt").images
    several = {n: pipe("cat", seed=1, num_inference_steps=n, output_type="pt").images for n in (8, 2, 4)}
    assert not torch.equal(several[2], several[8])
    assert torch.equal(pipe("cat", seed=1, output_type="pt").images, first)


def test_it_says_what_ran_where_and_how_long(toy_folder: Path) -> None:
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    with pytest.raises(RuntimeError, match="nothing has been drawn"):
        pipe.explain()
    with pytest.raises(RuntimeError, match="nothing has been drawn"):
        _ = pipe.timings
    pipe("cat", seed=1)
    ran = pipe.explain()
    assert {"ddim_move", "forward_diffusion", "geglu", "group_norm_silu", "layer_norm", "to_uint8"} <= set(ran)
    unet, vae = str(pipe.fusion["unet"]), str(pipe.fusion["vae"])
    assert "kept" not in unet + vae
    # 12 residual blocks, 6 transformers and the end of the UNet; 11 blocks, one attention and the end of the decoder
    assert sum(ran["group_norm_silu"].values()) == (12 * 2 + 6 + 1) + (8 * 2 + 1 + 1)
    assert sum(ran["geglu"].values()) == 6
    timings = pipe.timings
    assert list(timings) == ["text_encoders", "unet", "vae", "post_processing", "total"]
    assert 0 < sum(timings.values()) - timings["total"] <= timings["total"]


def test_a_forced_backend_runs_and_is_reported(pipe: OneStepPipeline) -> None:
    chosen = pipe("cat", seed=1, output_type="pt").images
    with use_backend("eager"):
        eager = pipe("cat", seed=1, output_type="pt").images
    assert all(set(backends) == {"eager"} for backends in pipe.explain().values())
    torch.testing.assert_close(chosen, eager, rtol=1 / 255, atol=1 / 255)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "step count": ({"num_inference_steps": 3}, "num_inference_steps is 3; a one-step x0 student.* draws in 1, 2, 4, 8"),
    "guidance": ({"guidance_scale": 5.0}, "guidance_scale=0"),
    "no prompts": ({"prompt": []}, "empty list"),
    "size": ({"height": 30}, "multiples of 4"),
    "latents": ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents must be \[1, 4"),
    "latents that are NaN": ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "NaN or infinity"),
    "image alone": ({"image": torch.zeros(1, 3, 32, 32)}, "image without strength"),
    "strength": ({"image": torch.zeros(1, 3, 32, 32), "strength": 0.0}, "strength is 0.0"),
    "pictures": ({"image": torch.zeros(2, 3, 32, 32), "strength": 1.0}, "2 pictures in image for 1 to draw"),
    "a picture that is NaN": ({"image": torch.full((1, 3, 32, 32), torch.nan), "strength": 1.0}, "not finite"),
    "a picture of one channel": ({"image": torch.zeros(1, 1, 32, 32), "strength": 1.0}, "image must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_and_leave_it_usable(pipe: OneStepPipeline, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "cat", **arguments})
    assert len(pipe("cat", seed=1).images) == 1


def test_long_prompts_warn(pipe: OneStepPipeline) -> None:
    with pytest.warns(UserWarning, match="more than 75 tokens"):
        pipe("cat " * 1000, seed=1)


def test_bad_loading_arguments(toy_folder: Path) -> None:
    with pytest.raises(ValueError, match="float16"):
        OneStepPipeline.from_pretrained(toy_folder, device="cpu", dtype=torch.float16)
    with pytest.raises(ValueError, match="allowed: cpu, cuda"):
        OneStepPipeline.from_pretrained(toy_folder, device="toaster")
    with pytest.raises(ValueError, match="preset is 'fast'"):
        OneStepPipeline.from_pretrained(toy_folder, device="cpu", preset="fast")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees 0 GPUs"):
            OneStepPipeline.from_pretrained(toy_folder, device="cuda")


def test_a_preset_overrules_the_folder(tmp_path: Path) -> None:
    folder = toy_pipeline(tmp_path / "anything", prediction_type="epsilon", few_steps=())
    pipe = OneStepPipeline.from_pretrained(folder, device="cpu", preset="dmd2-1step")
    assert pipe.preset.grid(1) == (399,)
    assert pipe.num_inference_steps == (1,)


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("dmd2_sdxl_4step_unet_fp16", "DMD2 4-step"),
        ("Hyper-SDXL-1step-Unet", "Hyper-SD 1-step"),
        ("sdxl_lightning_1step_unet_x0", "SDXL-Lightning 1-step x0"),
        ("sdxl_lightning_4step_unet", "SDXL-Lightning 4-step"),
    ],
)
def test_published_unets_are_known_by_their_files(toy_folder: Path, tmp_path: Path, file: str, preset: str) -> None:
    """Whatever the scheduler of the base they are put on."""
    base = _renamed(toy_folder, tmp_path / "base", timestep_spacing="leading", prediction_type="epsilon")
    weights = tmp_path / f"{file}.safetensors"
    shutil.copy(toy_folder / "unet" / "diffusion_pytorch_model.safetensors", weights)
    pipe = OneStepPipeline.from_pretrained(base, unet=weights, device="cpu")
    assert pipe.preset.name == preset
    assert pipe("cat", seed=1).images[0].size == (32, 32)


def test_bases_and_unets_are_not_mixed_up(toy_folder: Path) -> None:
    with pytest.raises(ValueError, match="either unet"):
        OneStepPipeline.from_pretrained(toy_folder, unet=toy_folder, base=toy_folder)
    with pytest.raises(ModelError, match="no such file"):
        OneStepPipeline.from_single_file(toy_folder)


def test_image_to_image_starts_at_the_noise_level_of_its_strength(pipe: OneStepPipeline) -> None:
    picture = pipe("red apple", seed=3, output_type="uint8").images[0].permute(2, 0, 1) / 255.0
    stay: dict[float, torch.Tensor] = {}

    def first(p: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        assert timestep == {0.05: 49, 0.6: 599, 1.0: 999}[strength]
        return tensors

    for strength in (0.05, 0.6, 1.0):
        arguments: Any = {"image": picture, "strength": strength, "callback_on_step_end": first, "output_type": "pt"}
        stay[strength] = pipe("cat", seed=1, **arguments).images
        assert bool(stay[strength].isfinite().all())
    assert not torch.equal(stay[0.05], stay[0.6])
    noise = sampling.pure_noise((4, 8, 8), torch.tensor([1]))
    by_noise = pipe("cat", latents=noise, image=picture, strength=1.0, output_type="pt").images
    assert torch.equal(pipe("cat", seed=1, image=picture, strength=1.0, output_type="pt").images, by_noise)
    several = pipe(["cat", "cat"], seed=1, image=picture, strength=1.0, output_type="pt").images
    torch.testing.assert_close(several[:1], by_noise)


def test_warming_up_and_what_it_holds(pipe: OneStepPipeline) -> None:
    pipe.warmup([(2, 32, 24)])
    assert pipe.report["unet"].packed and pipe.report["vae"].packed
    held = pipe.memory_report()
    assert held["unet"] == sum(p.nbytes for p in pipe.unet.parameters())
    assert held["prompts"] > 0
    assert held["graphs"] == 0
    with pytest.raises(ValueError, match="multiples of 4"):
        pipe.warmup([(1, 33, 32)])


WRONG_SCHEDULERS = {
    "another noise schedule": ({"beta_schedule": "linear"}, "noise schedule"),
    "zero terminal SNR": ({"rescale_betas_zero_snr": True}, "noise schedule"),
    "clipping": ({"clip_sample": True}, "clips x0"),
    "leading": ({"timestep_spacing": "leading"}, "'trailing'"),
}


@pytest.mark.parametrize("case", WRONG_SCHEDULERS)
def test_schedules_it_does_not_follow_are_refused(toy_folder: Path, tmp_path: Path, case: str) -> None:
    settings, message = WRONG_SCHEDULERS[case]
    with pytest.raises(ModelError, match=message):
        OneStepPipeline.from_pretrained(_renamed(toy_folder, tmp_path / "toy", **settings), device="cpu")
