"""Another VAE in `OneStepPipeline`: AutoencoderTiny, which runs as it is, or a VAE of the pipeline's own kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from sdxl_fast import OneStepPipeline, cli
from sdxl_fast.errors import ModelError
from sdxl_fast.models import loading


def test_a_tiny_vae_decodes_and_encodes(toy_folder: Path, tiny_vae: Path) -> None:
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu", vae=tiny_vae)
    assert isinstance(pipe.vae, AutoencoderTiny) and pipe.vae_scale_factor == 4
    latents = pipe("cat", seed=1, output_type="latent").images
    picture = pipe("cat", seed=1, output_type="pt").images
    with torch.no_grad():
        wanted = AutoencoderTiny.from_pretrained(tiny_vae).decode(latents).sample
    assert torch.allclose(picture, (wanted / 2 + 0.5).clamp(0, 1), atol=1e-5)
    again = pipe("cat", seed=1, image=picture, strength=0.5, output_type="np").images
    assert np.isfinite(again).all() and again.shape == (1, 32, 32, 3)
    assert set(pipe.report) == {"unet", "text_encoder", "text_encoder_2"}
    assert pipe.memory_report()["vae"] == sum(p.nbytes for p in pipe.vae.parameters())


def test_a_vae_of_the_same_kind_is_packed(toy_folder: Path, tmp_path: Path) -> None:
    own = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    vae = AutoencoderKL.from_pretrained(toy_folder, subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.5)
    vae.save_pretrained(tmp_path / "brighter", safe_serialization=True)
    other = OneStepPipeline.from_pretrained(toy_folder, device="cpu", vae=tmp_path / "brighter")
    assert other.report["vae"].packed
    draw = {"seed": 1, "output_type": "pt"}
    same = OneStepPipeline.from_pretrained(toy_folder, device="cpu", vae=toy_folder)  # a pipeline's folder will do
    assert torch.equal(same("cat", **draw).images, own("cat", **draw).images)
    assert other("cat", **draw).images.mean() > own("cat", **draw).images.mean() + 0.1


def test_the_own_vae_is_not_loaded_beside_another(
    toy_folder: Path, tiny_vae: Path, tmp_path: Path, networks_read: list[str]
) -> None:
    other = Path(shutil.copytree(tiny_vae, tmp_path / "text_tiny"))  # no text encoder, whatever it is called
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu", vae=other)
    assert sorted(networks_read) == ["text_encoder", "text_encoder_2", "text_tiny", "unet"]
    assert isinstance(pipe.vae, AutoencoderTiny)


def test_what_is_no_vae_is_refused_before_weights_are_read(
    toy_folder: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_load_network", lambda *_, **__: pytest.fail("weights were read"))
    wide = Path(shutil.copytree(tiny_vae, tmp_path / "wide"))
    config = wide / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 16}))
    for given, message in (
        (toy_folder / "unet", "a VAE is an"),
        (tmp_path, "not the folder of a VAE"),
        (wide, "has 16 latent channels; this pipeline's has 4"),
    ):
        with pytest.raises(ModelError, match=message):
            OneStepPipeline.from_pretrained(toy_folder, device="cpu", vae=given)


def test_the_command_line_takes_it(toy_folder: Path, tiny_vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    given = ("generate", "cat", "--seed", 1, "--device", "cpu", "--model", toy_folder, "--vae", tiny_vae, "--out", out)
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in given])
    assert not ended.value.code
    assert json.loads(Image.open(out).text["settings"])["vae"] == "taesdxl"
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu", vae=tiny_vae)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(pipe("cat", seed=1).images[0]))
