"""Loading: what is whole and safe loads, everything else is one clear error and runs no code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sdxl_fast.errors import ModelError
from sdxl_fast.models import loading
from sdxl_fast.models.safetensors_check import check_safetensors

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy_of_toy(toy_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_folder, tmp_path / "copy"))


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> loading.Components:
    return loading.load(loading.resolve(folder), dtype=dtype, device="cpu")


class _Payload:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 100)


def _lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _pickle_inside(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Payload(path.parent / "executed")))


def _zip_inside(path: Path) -> None:
    torch.save({"x": _Payload(path.parent / "executed")}, path)


def _pickle_by_name(path: Path) -> None:
    torch.save({"x": _Payload(path.parent / "executed")}, path.with_suffix(".bin"))
    path.unlink()


def _missing(path: Path) -> None:
    path.unlink()


def _another_architecture(path: Path) -> None:
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(8, 4, 3, 3)
    save_file(tensors, path)


def _a_tensor_short(path: Path) -> None:
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path)


def _a_tensor_too_many(path: Path) -> None:
    save_file(load_file(path) | {"extra": torch.zeros(1)}, path)


DAMAGES: dict[Callable[[Path], None], str] = {
    _truncate: "truncated",
    _cut_in_header: "truncated",
    _flip_header: "corrupt",
    _empty: "corrupt or truncated",
    _noise: "corrupt",
    _lfs_pointer: "git lfs pull",
    _pickle_inside: "pickled weight file in disguise",
    _zip_inside: "pickled weight file in disguise",
    _pickle_by_name: "pickled weight file",
    _missing: r"no \.safetensors file",
    _another_architecture: "conv_in.weight",
    _a_tensor_short: "conv_in.bias",
    _a_tensor_too_many: "extra",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damaged_weights_are_refused_and_nothing_runs(copy_of_toy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy_of_toy / WEIGHTS)
    with pytest.raises(ModelError, match=DAMAGES[damage]) as caught:
        _load(copy_of_toy)
    assert "\n" not in str(caught.value)
    assert not list(copy_of_toy.rglob("executed"))


def test_the_payload_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae", "unet_base"])
def test_every_network_is_checked(copy_of_toy: Path, part: str) -> None:
    _truncate(next((copy_of_toy / part).glob("*.safetensors")))
    with pytest.raises(ModelError, match=f"{part}.*truncated"):
        loading.load_few_step_unet(_load(copy_of_toy), 4, dtype=torch.float32)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer", "vae", "scheduler"])
def test_a_missing_part_is_named(copy_of_toy: Path, part: str) -> None:
    shutil.rmtree(copy_of_toy / part)
    with pytest.raises(ModelError, match=part if part != "scheduler" else "no scheduler config"):
        _load(copy_of_toy)


def test_not_a_pipeline(tmp_path: Path, copy_of_toy: Path) -> None:
    with pytest.raises(ModelError, match="no such folder or file"):
        loading.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="not a diffusers pipeline folder"):
        _load(tmp_path)
    index = copy_of_toy / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "FluxPipeline"))
    with pytest.raises(ModelError, match="FluxPipeline, not a Stable Diffusion XL"):
        _load(copy_of_toy)
    index.write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        _load(copy_of_toy)


def test_dtype_and_frozen_eval_mode(toy_folder: Path) -> None:
    parts = _load(toy_folder, torch.bfloat16)
    for name in loading.NETWORKS:
        network = getattr(parts, name)
        assert not network.training
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in network.parameters())


def test_weights_stay_when_their_files_are_overwritten(copy_of_toy: Path) -> None:
    parts = _load(copy_of_toy)
    networks = [getattr(parts, name) for name in loading.NETWORKS]
    before = [{name: t.clone() for name, t in network.state_dict().items()} for network in networks]
    for file in copy_of_toy.glob("*/*.safetensors"):
        with file.open("r+b") as opened:
            opened.write(b"\xff" * file.stat().st_size)
    for network, values in zip(networks, before, strict=True):
        assert all(torch.equal(t, values[name]) for name, t in network.state_dict().items())


def test_weights_in_shards_and_in_the_fp16_variant_load(copy_of_toy: Path) -> None:
    expected = _load(copy_of_toy).unet.state_dict()
    unet = UNet2DConditionModel.from_pretrained(copy_of_toy, subfolder="unet")
    shutil.rmtree(copy_of_toy / "unet")
    unet.save_pretrained(copy_of_toy / "unet", max_shard_size="1MB")
    assert len(list((copy_of_toy / "unet").glob("*.safetensors"))) > 1
    assert torch.equal(_load(copy_of_toy).unet.state_dict()["conv_in.weight"], expected["conv_in.weight"])
    shutil.rmtree(copy_of_toy / "unet")
    unet.half().save_pretrained(copy_of_toy / "unet", variant="fp16")
    loaded = _load(copy_of_toy).unet.state_dict()["conv_in.weight"]
    assert torch.equal(loaded, expected["conv_in.weight"].half().float())


def test_hub_ids_are_fetched_as_safetensors(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(hub_id: str, *, use_safetensors: bool, variant: str | None) -> str:
        asked.append((hub_id, use_safetensors, variant))
        if variant == "fp16":
            raise ValueError("no such variant")
        return str(toy_folder)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert loading.resolve("someone/model") == toy_folder
    assert asked == [("someone/model", True, "fp16"), ("someone/model", True, None)]


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, **_: object) -> str:
        raise OSError("first line\nsecond line " + "x" * 1000)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    with pytest.raises(ModelError, match="first line second line") as caught:
        loading.resolve("someone/model")
    assert len(str(caught.value)) < 400


def test_single_files_say_what_they_are(toy_folder: Path, tmp_path: Path) -> None:
    for source, message in ((WEIGHTS, "a UNet alone"), ("toy_4step_lora.safetensors", "a LoRA")):
        with pytest.raises(ModelError, match=message):
            _load(toy_folder / source)
    whole = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1)}, whole, metadata={"modelspec.title": "SDXL-Turbo"})
    with pytest.raises(ModelError, match="text_encoder: 196 tensors are missing"):
        _load(whole)
    save_file({"transformer.x": torch.zeros(1)}, whole)
    with pytest.raises(ModelError, match="not an SDXL checkpoint, UNet or LoRA"):
        _load(whole)
    _truncate(toy_file := shutil.copy(toy_folder / WEIGHTS, tmp_path / "short.safetensors"))
    with pytest.raises(ModelError, match="truncated"):
        _load(Path(toy_file))


def test_guidance_embeddings_are_refused(copy_of_toy: Path) -> None:
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(copy_of_toy, subfolder="unet"), time_cond_proj_dim=8
    )
    unet.save_pretrained(copy_of_toy / "unet")
    with pytest.raises(ModelError, match="guidance embedding"):
        _load(copy_of_toy)


def test_the_libraries_progress_bars_keep_their_setting(toy_folder: Path) -> None:
    from diffusers.utils import logging

    for enabled in (True, False):
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        _load(toy_folder)
        assert logging.is_progress_bar_enabled() is enabled
    logging.enable_progress_bar()


def test_check_returns_the_header(toy_folder: Path) -> None:
    header = check_safetensors(toy_folder / WEIGHTS)
    assert header["conv_in.weight"]["dtype"] == "F32"
    assert json.dumps(header)
