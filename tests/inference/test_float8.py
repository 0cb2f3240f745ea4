"""float8: calibrated on prompts, within what rounding costs, kept in a file, refused for another model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

import sdxl_fast
from sdxl_fast import OneStepPipeline, calibrate, ops
from sdxl_fast.errors import ModelError
from sdxl_fast.inference.calibration import use_scales
from sdxl_fast.inference.float8 import MAX_ERROR, Errors, Float8Product, Magnitudes, Scales, psnr
from sdxl_fast.inference.packing import Conv, Linear, Product
from sdxl_fast.inference.runner import runner_of
from sdxl_fast.reference.linear import quantise

PROMPTS = ["a red apple", "a blue house"]
CALL: dict[str, Any] = {"num_inference_steps": 1, "height": 64, "width": 64}


def _pipe(folder: Path | None = None, **arguments: Any) -> OneStepPipeline:
    return OneStepPipeline.from_pretrained(folder, **{"dtype": torch.bfloat16, "device": "cpu", **arguments})


def _draw(pipe: OneStepPipeline) -> torch.Tensor:
    found = pipe(PROMPTS, seed=[0, 1], output_type="pt", **CALL).images
    assert isinstance(found, torch.Tensor)
    return found


@pytest.fixture(scope="module")
def embedded() -> tuple[OneStepPipeline, Scales, torch.Tensor]:
    """The embedded pipeline in float8, its scales, and what it drew before."""
    pipe = _pipe()
    before = _draw(pipe)
    return pipe, calibrate(pipe, PROMPTS, **CALL), before


def test_calibration_puts_layers_into_float8(embedded: tuple[OneStepPipeline, Scales, torch.Tensor]) -> None:
    pipe, scales, before = embedded
    program = runner_of(pipe.unet).ready()  # type: ignore[union-attr]
    used = [product for product in program.float8_products() if product.float8 is not None]
    assert {product.name for product in used} == set(scales.used)
    assert len(used) > 10
    assert all(product.float8.weight.dtype == torch.float8_e4m3fn for product in used)
    after = _draw(pipe)
    assert not torch.equal(after, before)
    assert min(psnr(after.float(), before.float())) > 20.0
    assert "PSNR" in str(pipe.report["unet"])
    assert pipe.memory_report()["float8 weights"] == sum(product.weight.numel() for product in used)


def test_errors_are_those_of_three_bits(embedded: tuple[OneStepPipeline, Scales, torch.Tensor]) -> None:
    _, scales, _ = embedded
    assert set(scales.errors) == set(scales.inputs)
    assert all(error > 0.005 for error in scales.errors.values())
    assert set(scales.excluded) == {name for name, error in scales.errors.items() if error > MAX_ERROR}
    assert sorted(scales.errors.values())[len(scales.errors) // 2] < 0.045


def test_scales_survive_the_file(embedded: tuple[OneStepPipeline, Scales, torch.Tensor], tmp_path: Path) -> None:
    pipe, scales, _ = embedded
    scales.save(tmp_path / "scales.safetensors")
    again = Scales.load(tmp_path / "scales.safetensors")
    assert again.excluded == scales.excluded
    assert (again.model, again.errors, again.psnr) == (scales.model, scales.errors, scales.psnr)
    assert again.inputs == pytest.approx(scales.inputs, rel=1e-6)
    loaded = _pipe(quantization="fp8", scales=tmp_path / "scales.safetensors")
    assert torch.equal(_draw(loaded), _draw(pipe))


def test_infinite_psnr_survives_the_file(tmp_path: Path) -> None:
    Scales("model", {"a": 1.0}, {"a": 0.03}, (), 1, (math.inf,)).save(tmp_path / "s.safetensors")
    assert Scales.load(tmp_path / "s.safetensors").psnr == (math.inf,)


def test_none_takes_it_back(toy_folder: Path) -> None:
    pipe = _pipe(toy_folder)
    before = _draw(pipe)
    calibrate(pipe, PROMPTS, **CALL)
    use_scales(pipe, None)
    assert torch.equal(_draw(pipe), before)


def test_norms_and_gates_write_float8_with_the_same_numbers(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in passes of their own, of all inputs, gives the same pictures; without, only what has no maker does."""
    pipe = _pipe(toy_folder)
    calibrate(pipe, PROMPTS, max_error=1.0, **CALL)
    passes: list[Float8Product] = []
    alone = Float8Product.round
    monkeypatch.setattr(Float8Product, "round", lambda self, x: (passes.append(self), alone(self, x))[1])
    drawn = _draw(pipe)
    part = pipe.report["unet"]
    written, used = part.float8_inputs
    assert 0 < written < used and len(set(map(id, passes))) == used - written
    assert f"{written} of {used} written by the operation before" in str(part)
    blocks = [name for name in part.scales.used if ".transformer_blocks." in name]
    of_norms = [name for name in blocks if name.endswith(("to_qkv", "attn2.to_q", "ff.net.0.proj", "ff.net.2"))]
    others = [name for name in part.scales.used if name.endswith(("proj_in", ".conv1", ".conv2"))]
    assert written == len(of_norms) + len(others)
    passes.clear()
    monkeypatch.setattr(Product, "scale_x", None)
    assert torch.equal(_draw(pipe), drawn)
    assert len(set(map(id, passes))) == used


def test_convolutions_can_be_left_out(toy_folder: Path) -> None:
    """Linear layers alone are in float8 then; scales of either kind fit the same model."""
    pipe = _pipe(toy_folder)
    whole = calibrate(pipe, PROMPTS, max_error=1.0, **CALL)
    linear = calibrate(pipe, PROMPTS, max_error=1.0, convolutions=False, **CALL)
    left_out = set(whole.inputs) - set(linear.inputs)
    assert left_out and all(name.endswith((".conv1", ".conv2")) and ".resnets." in name for name in left_out)
    drawn = []
    for scales in (linear, whole):
        use_scales(pipe, scales)
        program = runner_of(pipe.unet).ready()  # type: ignore[union-attr]
        used = {product.name for product in program.float8_products() if product.float8 is not None}
        assert used == set(scales.used)
        drawn.append(_draw(pipe))
    assert not torch.equal(*drawn)


def test_a_bad_layer_is_excluded_and_named(toy_folder: Path) -> None:
    pipe = _pipe(toy_folder)
    before = _draw(pipe)
    scales = calibrate(pipe, PROMPTS, max_error=0.0, **CALL)
    assert set(scales.excluded) == set(scales.inputs)
    assert scales.psnr == (math.inf, math.inf)
    assert torch.equal(_draw(pipe), before)
    assert scales.excluded[0] in str(scales)


def test_changed_weights_are_rounded_again(toy_folder: Path) -> None:
    pipe = _pipe(toy_folder)
    scales = calibrate(pipe, PROMPTS, max_error=1.0, **CALL)
    other = _pipe(toy_folder)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    assert layer in scales.used
    for changed in (pipe, other):
        with torch.no_grad():
            changed.unet.get_submodule(layer).weight.mul_(2.0)
    runner_of(other.unet).ready()  # type: ignore[union-attr]
    runner_of(other.unet).quantise(scales)  # type: ignore[union-attr]
    assert torch.equal(_draw(pipe), _draw(other))


def test_moved_weights_stay_in_float8(toy_folder: Path) -> None:
    pipe = _pipe(toy_folder)
    calibrate(pipe, PROMPTS, max_error=1.0, **CALL)
    before = _draw(pipe)
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(_draw(pipe), before)
    assert runner_of(pipe.unet).scales is not None  # type: ignore[union-attr]


def test_other_models_are_refused(toy_folder: Path) -> None:
    pipe, other = _pipe(toy_folder), _pipe(toy_folder)
    scales = calibrate(pipe, PROMPTS, max_error=1.0, **CALL)
    with torch.no_grad():
        other.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_v").weight.mul_(1.01)
    before = _draw(other)
    with pytest.raises(ModelError, match="another model"):
        use_scales(other, scales)
    assert torch.equal(_draw(other), before)
    with pytest.raises(ModelError, match="another model"):
        _pipe(quantization="fp8", scales=scales)


def test_diffusers_pipelines_take_scales_too(toy_folder: Path) -> None:
    scales = calibrate(_pipe(toy_folder), PROMPTS, max_error=1.0, **CALL)
    pipe = StableDiffusionXLPipeline.from_pretrained(toy_folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    sdxl_fast.optimize(pipe, shapes=(), quantization="fp8", scales=scales)
    assert sdxl_fast.report(pipe).parts["unet"].scales is scales
    again = calibrate(pipe, PROMPTS, max_error=1.0, **CALL)
    assert set(again.inputs) == set(scales.inputs)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(ModelError, match="cannot be read"):
        Scales.load(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="cannot be read"):
        Scales.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ModelError, match="not a file of float8 scales"):
        Scales.load(path)
    Scales("model", {"a": -1.0}).save(path)
    with pytest.raises(ModelError, match="not positive"):
        Scales.load(path)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no scales": ({"quantization": "fp8"}, "needs scales"),
    "no quantization": ({"scales": Scales("", {})}, "give both"),
    "float32": ({"quantization": "fp8", "scales": Scales("", {}), "dtype": torch.float32}, "bfloat16"),
    "unknown": ({"quantization": "int4"}, "allowed: None, 'fp8'"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(toy_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _pipe(toy_folder, **arguments)


def test_calibration_needs_prompts(toy_folder: Path) -> None:
    pipe = _pipe(toy_folder)
    for prompts in ([], "a red apple"):
        with pytest.raises(ValueError, match="list with at least one"):
            calibrate(pipe, prompts)


@torch.no_grad()
def test_a_product_is_within_its_rounding() -> None:
    layer = torch.nn.Linear(64, 32).to(torch.bfloat16)
    x = torch.randn(4, 7, 64).to(torch.bfloat16)
    product = Linear(layer, "layer")
    errors = Errors({"layer": float(x.abs().max()) / 448})
    errors(product, x)
    assert 0.01 < errors.relative()["layer"] < 0.045
    outliers = x.clone()
    outliers[0, 0, 0] = 3e5  # pushes everything else into e4m3's subnormal numbers
    worse = Errors({"layer": float(outliers.abs().max()) / 448})
    worse(product, outliers[:, 1:])
    assert worse.relative()["layer"] > MAX_ERROR


@torch.no_grad()
def test_inputs_are_scaled_without_rounding() -> None:
    x = torch.randn(64, 32).to(torch.bfloat16) * 37
    seen = Magnitudes()
    layer = Linear(torch.nn.Linear(32, 32).to(torch.bfloat16), "layer")
    seen(layer, x[:32])
    seen(layer, x[32:])
    scale = seen.scales()["layer"]
    assert scale / 2 < float(x.abs().max()) / 448 <= scale
    assert math.log2(scale).is_integer()
    product = Float8Product(layer.weight, scale)
    direct = ops.linear(
        quantise(x, product.scale_x), product.weight, scale_x=product.scale_x, scale_w=product.scale_w
    )  # fmt: skip
    assert torch.equal(product(x, None), direct)


@torch.no_grad()
def test_a_convolution_is_within_its_rounding() -> None:
    layer = torch.nn.Conv2d(32, 16, 3, padding=1).to(torch.bfloat16)
    product = Conv(layer, "layer")
    x = torch.randn(2, 32, 6, 5).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    seen = Magnitudes()
    seen(product, x)
    errors = Errors(seen.scales())
    errors(product, x)
    assert 0.01 < errors.relative()["layer"] < 0.045
    rounded = product.in_float8(seen.scales()["layer"])
    assert rounded.weight.is_contiguous(memory_format=torch.channels_last)
    residual = torch.randn(2, 16, 6, 5).to(torch.bfloat16)
    scales = {"scale_x": rounded.scale_x, "scale_w": rounded.scale_w}
    direct = ops.conv2d(quantise(x, rounded.scale_x), rounded.weight, layer.bias, residual=residual, **scales)
    assert torch.equal(rounded(x, layer.bias, residual), direct)
    before, address = rounded(x, None), rounded.weight.data_ptr()
    layer.weight.mul_(-2.0)
    rounded.refresh()  # where it is: a CUDA graph reads it there
    assert rounded.weight.data_ptr() == address and torch.equal(rounded(x, None), -2 * before)


@torch.no_grad()
def test_what_lies_beyond_the_scale_is_cut_off() -> None:
    product = Float8Product(torch.eye(16, dtype=torch.bfloat16), 1.0 / 448)
    y = product(torch.full((1, 16), 5.0, dtype=torch.bfloat16), None)
    assert torch.allclose(y.float(), torch.ones(1, 16))
