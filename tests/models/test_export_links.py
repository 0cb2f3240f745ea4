"""Files reached through links, as all in the hub's cache are: the link's name counts, not that of its target."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sdxl_fast import OneStepPipeline, cli
from sdxl_fast.models import export
from sdxl_fast.models.facts import place_name
from sdxl_fast.models.source import open_model


def _cached(cache: Path, name: str, blob: Path) -> Path:
    """The link that the hub's client would leave: named, to a file that is named by its hash."""
    snapshot = cache / "models--ByteDance--SDXL-Lightning" / "snapshots" / "c9a24f48e1c025556787b0c58dd67a091ece2e44"
    snapshot.mkdir(parents=True, exist_ok=True)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    target = blobs / f"6adefdd7a5c9{len(list(blobs.iterdir()))}"
    shutil.move(blob, target)
    (snapshot / name).symlink_to(Path("../../blobs") / target.name)
    return snapshot / name


@pytest.fixture
def lora(toy_folder: Path, tmp_path: Path) -> Path:
    """A Lightning LoRA whose name is all that tells how to sample it."""
    save_file(load_file(toy_folder / "toy_4step_lora.safetensors"), tmp_path / "l")
    return _cached(tmp_path, "sdxl_lightning_4step_lora.safetensors", tmp_path / "l")


def test_a_linked_lora_keeps_its_name(toy_folder: Path, lora: Path) -> None:
    facts = open_model(lora, base=toy_folder).facts
    assert (facts.name, facts.num_steps) == ("sdxl_lightning", 4)
    pipe = OneStepPipeline.from_pretrained(lora, base=toy_folder, device="cpu")
    assert (pipe.preset.name, pipe.num_inference_steps) == ("SDXL-Lightning 4-step", (4,))


def test_a_linked_lora_is_exported_under_its_name(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "lora", str(lora), "--format", "kohya", "--out", str(tmp_path / "out")])
    assert not caught.value.code
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sdxl_lightning_4step_lora.safetensors"]


def test_linked_files_and_unets_keep_their_names(toy_folder: Path, tmp_path: Path) -> None:
    whole = export.export_single_file(open_model(toy_folder, steps=4), tmp_path / "w.safetensors", dtype=None)
    link = _cached(tmp_path, "sdxl_lightning_4step.safetensors", whole)
    assert OneStepPipeline.from_single_file(link, device="cpu").preset.name == "SDXL-Lightning 4-step"
    unet = export.export_unet(open_model(toy_folder), tmp_path / "u.safetensors", dtype=None)
    facts = open_model(_cached(tmp_path, "sdxl_lightning_1step_unet_x0.safetensors", unet), base=toy_folder).facts
    assert (facts.name, facts.num_steps, facts.prediction_type) == ("sdxl_lightning", 1, "sample")


def test_a_snapshot_is_called_as_its_repository(toy_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--my-turbo" / "snapshots" / "71153311d3dbb46851df1931d3ca6e939de83304"
    shutil.copytree(toy_folder, snapshot, ignore=shutil.ignore_patterns("unet_base", "*_lora.safetensors"))
    assert open_model(snapshot).facts.name == "my-turbo"
    assert open_model(snapshot / "unet").facts.name == "my-turbo"
    link = tmp_path / "student"
    link.symlink_to(snapshot)
    assert open_model(link).facts.name == place_name(link / "unet" / "..") == "student"
    assert cli.model_name(str(snapshot)) == "my-turbo"
