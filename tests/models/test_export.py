"""Exports and imports: folder, single file and UNet hold the same values bit for bit; stock diffusers reads them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sdxl_fast import OneStepPipeline
from sdxl_fast.errors import ModelError
from sdxl_fast.models import export, loading, source
from sdxl_fast.models.config import TOY, TextEncoderConfig
from sdxl_fast.models.facts import Facts
from sdxl_fast.models.lora import merge_lora, read_lora
from sdxl_fast.models.networks import NETWORKS
from sdxl_fast.models.safetensors_check import check_safetensors
from sdxl_fast.models.source import Model, completed, form_of, open_model, rescheduled, undistilled
from sdxl_fast.models.weights import Lazy
from sdxl_fast.testing.toy import toy_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose text encoders differ in width, as SDXL's do: diffusers tells them apart by it."""
    config = dataclasses.replace(TOY, text_encoder_2=TextEncoderConfig(width=48, layers=2, heads=4, projection=40))
    return toy_pipeline(tmp_path_factory.mktemp("model") / "toy", config=config)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(folder)


@pytest.fixture(scope="module")
def single(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.export_single_file(model, tmp_path_factory.mktemp("single"), dtype=None)


def _same_networks(found: Any, wanted: Any, parts: tuple[str, ...] = NETWORKS) -> None:
    for name in parts:
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (found, wanted))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), f"{name}: {key}"


def _alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal weights at other addresses: oneDNN picks its loops by alignment, which moves the sixth digit."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def _picture(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 32, "width": 32, "output_type": "pt"}
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe("red apple", generator=generator, **settings).images)


# ---- formats ----


def test_diffusers_reads_the_single_file(folder: Path, single: Path) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    found = StableDiffusionXLPipeline.from_single_file(single, config=str(folder))
    _same_networks(found, stock)
    _alike(_picture(found), _picture(stock))


def test_we_read_the_single_file(folder: Path, single: Path) -> None:
    assert single.name == "toy_1step_x0.safetensors"
    ours = loading.load(single, dtype=torch.float32, device="cpu")
    stock = loading.load(folder, dtype=torch.float32, device="cpu")
    _same_networks(ours, stock)
    for name in NETWORKS:
        buffers = zip(getattr(ours, name).named_buffers(), getattr(stock, name).named_buffers(), strict=True)
        assert all(one[0] == two[0] and torch.equal(one[1], two[1]) for one, two in buffers)
    assert ours.own_scheduler
    assert ours.scheduler == stock.scheduler
    assert ours.tokenizer("red apple").input_ids == stock.tokenizer("red apple").input_ids
    settings: dict[str, Any] = {"seed": 7, "output_type": "pt"}
    pictures = [
        OneStepPipeline.from_pretrained(path, device="cpu")("cat", **settings).images for path in (single, folder)
    ]
    _alike(*pictures)


def test_encoders_of_one_width_are_told_apart_by_us(toy_folder: Path, tmp_path: Path) -> None:
    """As in the embedded pipeline; diffusers alone would read the first one's weights into the second."""
    path = export.export_single_file(open_model(toy_folder), tmp_path, dtype=None)
    stock = loading.load(toy_folder, dtype=torch.float32, device="cpu")
    _same_networks(loading.load(path, dtype=torch.float32, device="cpu"), stock)
    found = StableDiffusionXLPipeline.from_single_file(
        path, config=str(toy_folder), text_encoder_2=stock.text_encoder_2
    )
    _same_networks(found, stock)


def test_metadata_of_the_single_file(single: Path) -> None:
    metadata = check_safetensors(single)["__metadata__"]
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.implementation"] == "sgm"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base-shrunken"
    assert metadata["modelspec.title"] == "toy 1-step"
    assert metadata["modelspec.resolution"] == "32x32"
    assert metadata["modelspec.prediction_type"] == "x0"
    assert metadata["sdxl_fast.num_inference_steps"] == "1"
    assert metadata["modelspec.usage_hint"] == (
        "1 step, guidance scale 0, EulerDiscreteScheduler, timestep_spacing=trailing"
    )


def test_the_folder_is_what_diffusers_wrote(folder: Path, model: Model, tmp_path: Path) -> None:
    found = export.export_folder(model, tmp_path / "out", dtype=None)
    _same_networks(StableDiffusionXLPipeline.from_pretrained(found), StableDiffusionXLPipeline.from_pretrained(folder))
    wanted = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()} == wanted
    for name in ("unet/config.json", "vae/config.json", "text_encoder_2/config.json", "model_index.json"):
        ours, theirs = (json.loads((path / name).read_text()) for path in (found, folder))
        assert {**ours, "_name_or_path": None} == {**theirs, "_name_or_path": None}, name
    assert os.listdir(tmp_path) == ["out"]
    parts, other = (loading.load(path, dtype=torch.float32, device="cpu") for path in (found, folder))
    for steps in (2, 4, 8):
        ours, theirs = (loading.load_few_step_unet(p, steps, dtype=torch.float32)[0] for p in (parts, other))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_round_trips_are_bitwise(folder: Path, model: Model, single: Path, tmp_path: Path) -> None:
    """Folder to single file to folder to UNet and single file."""
    again = export.export_folder(open_model(single), tmp_path / "again", dtype=None)
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    _same_networks(StableDiffusionXLPipeline.from_pretrained(again), stock)
    back = export.export_single_file(open_model(again), tmp_path / "b.safetensors", dtype=None)
    found, wanted = load_file(back), load_file(single)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    halves = [
        export.export_unet(open_model(path), tmp_path / f"{k}.safetensors") for k, path in enumerate((again, back))
    ]
    assert halves[0].read_bytes() == halves[1].read_bytes()


def test_the_unet_file_is_as_published(model: Model, folder: Path, tmp_path: Path) -> None:
    path = export.export_unet(model, tmp_path)
    assert path.name == "toy_1step_x0_unet.safetensors"
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    save_file({name: tensor.half() for name, tensor in unet.state_dict().items()}, tmp_path / "theirs")
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert "__metadata__" not in check_safetensors(path)


def test_a_unet_file_comes_back_with_its_base(folder: Path, tmp_path: Path) -> None:
    path = export.export_unet(open_model(folder, steps=4), tmp_path, dtype=None)
    parts = loading.load(path, dtype=torch.float32, device="cpu", base=folder)
    wanted, _ = loading.load_few_step_unet(
        loading.load(folder, dtype=torch.float32, device="cpu"), 4, dtype=torch.float32
    )
    assert all(torch.equal(a, b) for a, b in zip(parts.unet.parameters(), wanted.parameters(), strict=True))
    assert parts.scheduler["timestep_spacing"] == "trailing"
    pipe = OneStepPipeline.from_pretrained(path, base=folder, device="cpu")
    assert (pipe.num_inference_steps, pipe.preset.sampler) == ((4,), "euler")


# ---- students ----


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_a_lora_on_its_base_is_the_merged_student(folder: Path, tmp_path: Path, dialect: str) -> None:
    base = UNet2DConditionModel.from_pretrained(folder, subfolder="unet_base")
    merge_lora(base, read_lora(folder / "toy_8step_lora.safetensors", base))
    lora = export.read_lora_file(folder / "toy_8step_lora.safetensors")
    facts = Facts.of(folder / "toy_8step_lora.safetensors", lora.metadata)
    path = export.export_lora(lora, tmp_path, dialect=dialect, facts=facts, dtype=None)
    for found in (open_model(path, base=folder), open_model(folder, steps=8)):
        assert (found.facts.num_steps, found.facts.prediction_type) == (8, "epsilon")
        assert found.extras == {}
        for name, tensor in base.state_dict().items():
            assert torch.equal(found.tensors["unet"][name].read(), tensor), name
    drawn = OneStepPipeline.from_pretrained(path, base=folder, device="cpu")
    assert drawn.num_inference_steps == (8,)
    whole = OneStepPipeline.from_pretrained(folder, device="cpu")
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 8, "output_type": "latent"}
    _alike(drawn("cat", **settings).images, whole("cat", **settings).images)


def test_a_student_gets_its_own_scheduler(folder: Path, tmp_path: Path) -> None:
    """The folder's says x0 for its one-step UNet; the 4-step student predicts ε."""
    found = export.export_folder(open_model(folder, steps=4), tmp_path / "out")
    pipe = StableDiffusionXLPipeline.from_pretrained(found)
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert (pipe.scheduler.config.prediction_type, pipe.scheduler.config.timestep_spacing) == ("epsilon", "trailing")
    assert not list(found.glob("*lora*"))
    assert OneStepPipeline.from_pretrained(found, device="cpu").num_inference_steps == (4,)
    assert {tensor.dtype for tensor in load_file(found / loading_file("unet")).values()} == {torch.float16}


def loading_file(part: str) -> str:
    return f"{part}/diffusion_pytorch_model.safetensors"


def test_merging_rounds_once(folder: Path, tmp_path: Path) -> None:
    """To the file's dtype, from float32: not to the base's first."""
    whole = open_model(folder, steps=4)
    half = export.export_folder(open_model(folder), tmp_path / "half", dtype=torch.float16)
    wide = open_model(half, steps=4, dtype=torch.float32).tensors["unet"]["mid_block.resnets.0.conv1.weight"]
    assert wide.dtype == torch.float32
    assert not torch.equal(wide.read(), wide.read().half().float())
    assert whole.tensors["unet"]["mid_block.resnets.0.conv1.weight"].dtype == torch.float32


def test_steps_that_a_folder_has_not(folder: Path, toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no student of 3 steps; it draws in 1, 2, 4, 8"):
        open_model(folder, steps=3)
    plain = toy_pipeline(tmp_path / "plain", few_steps=(), prediction_type="epsilon")
    assert open_model(plain).facts.num_steps is None
    told = open_model(plain, steps=4)
    assert told.facts.file_name("unet") == "plain_4step_unet.safetensors"


def test_facts_change_the_scheduler(model: Model) -> None:
    found = rescheduled(model, model.facts.but(num_steps=4, prediction_type="v_prediction"))
    assert found.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert found.facts.num_steps == 4
    assert rescheduled(model, model.facts.but(name="other")).configs == model.configs
    assert undistilled(model).facts.prediction_type == "epsilon"


# ---- mistakes ----


SINGLE_DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (
        lambda t: [t.pop(name) for name in list(t) if name.endswith("label_emb.0.0.bias")],
        r"unet: 1 tensors are missing: model\.diffusion_model\.label_emb\.0\.0\.bias$",
    ),
    "extra": (
        lambda t: t.update({"first_stage_model.decoder.x": torch.zeros(1)}),
        r"vae: 1 tensors match no parameter: first_stage_model\.decoder\.x$",
    ),
    "foreign": (lambda t: t.update({"control_model.x": torch.zeros(1)}), r"no network of SDXL: control_model\.x$"),
    "shape": (
        lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}),
        r"unet: 1 tensors have another shape .* conv_out\.bias \(5,\) for \(4,\)",
    ),
}


@pytest.mark.parametrize("damage", SINGLE_DAMAGES)
def test_single_files_that_do_not_fit_name_what(single: Path, tmp_path: Path, damage: str) -> None:
    change, message = SINGLE_DAMAGES[damage]
    tensors = load_file(single)
    change(tensors)
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path, metadata=check_safetensors(single)["__metadata__"])
    with pytest.raises(ModelError, match=message):
        open_model(path)


def test_a_single_file_that_says_nothing(single: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy_1step_x0.safetensors"
    save_file(load_file(single), path)
    with pytest.raises(ModelError, match="tensors are missing"):  # of SDXL, which it is taken for
        open_model(path)
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    _same_networks(loading.load(path, dtype=torch.float32, device="cpu", base=folder), stock)


def test_forms(folder: Path, single: Path, tmp_path: Path) -> None:
    assert form_of(folder) == "folder"
    assert form_of(folder / "unet") == form_of(folder / loading_file("unet")) == "unet"
    assert form_of(folder / "toy_2step_lora.safetensors") == "lora"
    assert form_of(single) == "single file"
    for path, message in (
        (folder / "vae", "holds a AutoencoderKL"),
        (folder / "text_encoder", "neither"),
        (folder / loading_file("vae"), "not an SDXL checkpoint"),
        (tmp_path, "not a diffusers pipeline folder"),
    ):
        with pytest.raises(ModelError, match=message):
            open_model(path)


def test_what_is_missing_is_asked_for(folder: Path, tmp_path: Path) -> None:
    unet = open_model(folder / "unet")
    assert unet.tensors.keys() == {"unet"}
    for act in (
        lambda: export.export_folder(unet, tmp_path / "out"),
        lambda: export.export_single_file(unet, tmp_path / "out.safetensors"),
        lambda: open_model(folder / "toy_4step_lora.safetensors"),
    ):
        with pytest.raises(ModelError, match="give --base"):
            act()
    assert not list(tmp_path.iterdir())


def test_a_unet_of_another_size_does_not_fit_the_base(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / loading_file("unet"))
    tensors["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(tensors, tmp_path / "inpaint_4step_unet.safetensors")
    with pytest.raises(ModelError, match=r"conv_in\.weight \(32, 9, 3, 3\) for \(32, 4, 3, 3\)"):
        open_model(tmp_path / "inpaint_4step_unet.safetensors", base=folder)


def test_a_lora_of_another_size_does_not_fit_the_base(folder: Path, tmp_path: Path) -> None:
    stem = "unet.mid_block.resnets.0.conv1"
    tensors = {f"{stem}.lora_A.weight": torch.zeros(2, 9, 3, 3), f"{stem}.lora_B.weight": torch.zeros(64, 2, 1, 1)}
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(ModelError, match=r"LoRA of unet\.mid_block\.resnets\.0\.conv1"):
        open_model(tmp_path / "l.safetensors", base=folder)


def test_sdxls_own_configuration_comes_from_the_hub(
    single: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = dataclasses.replace(open_model(single), configs={"scheduler": {"prediction_type": "sample"}}, tokenizers={})
    with pytest.raises(ModelError, match="not of SDXL's size"):
        completed(bare)
    monkeypatch.setattr(source, "is_sdxl", lambda _: True)
    monkeypatch.setattr(source, "_download_configs", lambda: folder)
    found = completed(bare)
    assert found.configs["unet"] == json.loads((folder / "unet" / "config.json").read_text())
    assert found.configs["scheduler"]["prediction_type"] == "sample"
    assert set(found.tokenizers) == {"tokenizer", "tokenizer_2"}


def test_no_hub_is_one_line(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"not to be had from .* \(no network\): give --base"):
        source._download_configs()


# ---- whole or not at all ----


def _failing(model: Model) -> Model:
    def full() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    last = max(model.tensors["vae"])
    broken = Lazy(torch.float32, model.tensors["vae"][last].shape, full)
    return dataclasses.replace(model, tensors=model.tensors | {"vae": model.tensors["vae"] | {last: broken}})


def test_a_full_disk_leaves_the_old_single_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        export.export_single_file(_failing(model), path)
    assert (os.listdir(tmp_path), path.read_bytes()) == (["m.safetensors"], b"old")


def test_a_full_disk_leaves_the_old_folder(model: Model, folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "out"))
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="No space"):
        export.export_folder(_failing(model), target)
    assert os.listdir(tmp_path) == ["out"]
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    export.export_folder(model, target)
    assert os.listdir(tmp_path) == ["out"]
    assert {tensor.dtype for tensor in load_file(target / loading_file("vae")).values()} == {torch.float16}


def test_a_file_may_be_exported_onto_itself(folder: Path, tmp_path: Path) -> None:
    path = export.export_unet(open_model(folder), tmp_path, dtype=None)
    before = path.read_bytes()
    whole = open_model(path, base=folder)
    assert export.export_unet(whole, path, dtype=None) == path
    assert path.read_bytes() == before
