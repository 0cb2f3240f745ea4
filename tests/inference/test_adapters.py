"""LoRAs come, mix and go in place; the first weights return bit for bit; what does not fit changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from sdxl_fast import OneStepPipeline
from sdxl_fast.errors import ModelError
from sdxl_fast.models.lora_file import LoraFile, Pair, write_lora_file
from sdxl_fast.models.weights import Lazy
from sdxl_fast.testing.toy import random_lora

RANK = 4


def _file(path: Path, network: Any, *, seed: int, dialect: str = "peft", alpha: float = RANK, text: Any = None) -> Path:
    torch.manual_seed(seed)
    pairs = {f"unet.{name}": Pair(Lazy.of(down), Lazy.of(up), alpha)
             for name, (down, up) in random_lora(network, rank=RANK).items()}  # fmt: skip
    if text is not None:
        for name, module in text.named_modules():
            if name.endswith(("q_proj", "fc1")):
                down, up = torch.randn(RANK, module.in_features), torch.randn(module.out_features, RANK)
                full = name if name.startswith("text_model.") else f"text_model.{name}"
                pairs[f"text_encoder.{full}"] = Pair(Lazy.of(down * 0.3), Lazy.of(up * 0.3), alpha)
    write_lora_file(path, LoraFile(pairs, {}), dialect)
    return path


@pytest.fixture
def pipe(toy_folder: Path) -> OneStepPipeline:
    return OneStepPipeline.from_pretrained(toy_folder, device="cpu")


@pytest.fixture(scope="module")
def files(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    unet = UNet2DConditionModel.from_pretrained(toy_folder, subfolder="unet")
    found = {
        d: _file(folder / f"{d}.safetensors", unet, seed=1, dialect=d, alpha=2.0)
        for d in ("kohya", "diffusers", "peft")
    }
    return found | {"other": _file(folder / "other.safetensors", unet, seed=2)}


def _draw(pipe: OneStepPipeline, steps: int = 1) -> torch.Tensor:
    images: torch.Tensor = pipe("cat", seed=1, num_inference_steps=steps, output_type="pt").images
    return images


def _weights(pipe: OneStepPipeline) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_every_dialect_draws_what_diffusers_draws(
    pipe: OneStepPipeline, files: dict[str, Path], toy_folder: Path, dialect: str
) -> None:
    name = pipe.load_lora_weights(files[dialect], weight=0.7)
    assert name == dialect
    stock = StableDiffusionXLPipeline.from_pretrained(toy_folder)
    stock.load_lora_weights(files["peft"], adapter_name="it")
    stock.set_adapters("it", 0.7)
    latents = torch.randn(1, 4, 8, 8)
    wanted = stock("cat", latents=latents, num_inference_steps=1, guidance_scale=0, output_type="pt").images
    got = pipe("cat", latents=latents, output_type="pt").images
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_mixing_swapping_and_removing(pipe: OneStepPipeline, files: dict[str, Path]) -> None:
    before, first = _weights(pipe), _draw(pipe)
    addresses = {name: p.data_ptr() for name, p in pipe.unet.named_parameters()}
    pipe.load_lora_weights(files["peft"], "a")
    alone = _draw(pipe)
    assert (alone - first).abs().max() > 0.01
    pipe.load_lora_weights(files["other"], "b", weight=0.5)
    both = _draw(pipe)
    assert pipe.get_active_adapters() == ["a", "b"]
    pipe.set_adapters("b", 0.5)
    assert pipe.get_active_adapters() == ["b"]
    swapped = _draw(pipe)
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    assert torch.equal(_draw(pipe), both)  # made afresh from the first weights: no drift
    pipe.set_adapters("a")
    assert torch.equal(_draw(pipe), alone)
    assert all((x - y).abs().max() > 0.01 for x, y in ((both, alone), (swapped, alone), (swapped, both)))
    pipe.delete_adapters("a")
    assert torch.equal(_draw(pipe), first)  # "b" is idle
    pipe.unload_lora_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert torch.equal(_draw(pipe), first)
    assert {name: p.data_ptr() for name, p in pipe.unet.named_parameters()} == addresses
    assert pipe.memory_report()["LoRAs and first weights"] == 0


def test_swaps_do_not_add_up_to_anything(pipe: OneStepPipeline, files: dict[str, Path]) -> None:
    first = _draw(pipe)
    for name in ("kohya", "other"):
        pipe.load_lora_weights(files[name], weight=0.0)
    assert torch.equal(_draw(pipe), first)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights = torch.rand(2, generator=generator).tolist()
        pipe.set_adapters(["kohya", "other"], weights)
    memory = pipe.memory_report()
    pipe.set_adapters([])
    assert torch.equal(_draw(pipe), first)
    assert pipe.memory_report()["LoRAs and first weights"] == memory["LoRAs and first weights"]


def test_other_step_counts_get_it_too(pipe: OneStepPipeline, files: dict[str, Path]) -> None:
    early = _draw(pipe, steps=4)
    pipe.load_lora_weights(files["peft"])
    assert (_draw(pipe, steps=4) - early).abs().max() > 0.01
    later = _draw(pipe, steps=2)  # loaded while the LoRA is on
    pipe.unload_lora_weights()
    assert torch.equal(_draw(pipe, steps=4), early)
    assert (_draw(pipe, steps=2) - later).abs().max() > 0.01


def test_text_encoders_are_adapted(pipe: OneStepPipeline, tmp_path: Path) -> None:
    first = _draw(pipe)
    path = _file(tmp_path / "te.safetensors", pipe.unet, seed=5, dialect="kohya", text=pipe.text_encoder)
    pipe.load_lora_weights(path)
    with_text = _draw(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(_draw(pipe), first)
    pipe.load_lora_weights(_file(tmp_path / "unet.safetensors", pipe.unet, seed=5))
    assert (_draw(pipe) - with_text).abs().max() > 0.001  # the same UNet change without the encoder's


def test_it_can_be_given_while_loading(toy_folder: Path, files: dict[str, Path]) -> None:
    one = OneStepPipeline.from_pretrained(toy_folder, device="cpu", lora=files["peft"])
    two = OneStepPipeline.from_pretrained(toy_folder, device="cpu", lora={files["peft"]: 0.5, files["other"]: 2})
    assert one.get_active_adapters() == ["peft"]
    assert two._adapters.strengths == {"peft": 0.5, "other": 2.0}


def _unmatched(folder: Path, pipe: OneStepPipeline) -> Path:
    path = folder / "alien.safetensors"
    pair = Pair(Lazy.of(torch.zeros(2, 8)), Lazy.of(torch.zeros(8, 2)), 2.0)
    write_lora_file(path, LoraFile({"unet.down_blocks.7.attentions.3.proj_in": pair}, {}), "peft")
    return path


def _other_widths(folder: Path, pipe: OneStepPipeline) -> Path:
    path = folder / "wide.safetensors"
    pair = Pair(Lazy.of(torch.zeros(2, 640)), Lazy.of(torch.zeros(640, 2)), 2.0)
    name = next(n for n, m in pipe.unet.named_modules() if n.endswith("attn1.to_q"))
    write_lora_file(path, LoraFile({f"unet.{name}": pair}, {}), "kohya")
    return path


def _nan(folder: Path, pipe: OneStepPipeline) -> Path:
    path = folder / "nan.safetensors"
    name = next(n for n, m in pipe.unet.named_modules() if n.endswith("attn1.to_q"))
    width = pipe.unet.get_submodule(name).in_features
    pair = Pair(Lazy.of(torch.full((2, width), torch.nan)), Lazy.of(torch.zeros(width, 2)), 2.0)
    write_lora_file(path, LoraFile({f"unet.{name}": pair}, {}), "peft")
    return path


def _pickled(folder: Path, pipe: OneStepPipeline) -> Path:
    path = folder / "lora.safetensors"
    torch.save({"x": torch.zeros(1)}, path)
    return path


def _a_unet(folder: Path, pipe: OneStepPipeline) -> Path:
    pipe.unet.save_pretrained(folder / "unet")
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


HOSTILE = {
    "of another architecture": (_unmatched, "2 keys match no module.*down_blocks.7"),
    "of other widths": (_other_widths, r"640.*its weight"),
    "of NaN": (_nan, "not finite"),
    "a pickle": (_pickled, "in disguise"),
    "no LoRA": (_a_unet, "match no module of a LoRA"),
    "not there": (lambda folder, pipe: folder / "nothing.safetensors", "no such file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_does_not_fit_changes_nothing(pipe: OneStepPipeline, tmp_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    before, path = _weights(pipe), make(tmp_path, pipe)
    with pytest.raises(ModelError, match=message):
        pipe.load_lora_weights(path)
    assert pipe.get_active_adapters() == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def test_names_and_numbers_are_checked(pipe: OneStepPipeline, files: dict[str, Path]) -> None:
    pipe.load_lora_weights(files["peft"])
    for call, message in (
        (lambda: pipe.load_lora_weights(files["peft"]), "'peft' is loaded already"),
        (lambda: pipe.set_adapters("x"), "no LoRA called 'x' is loaded; there are: peft"),
        (lambda: pipe.set_adapters(["peft"], [1.0, 2.0]), "2 weights for 1"),
        (lambda: pipe.delete_adapters(["peft", "x"]), "no LoRA called 'x'"),
        (lambda: pipe.load_lora_weights(files["other"], weight=float("nan")), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert pipe.get_active_adapters() == ["peft"]
