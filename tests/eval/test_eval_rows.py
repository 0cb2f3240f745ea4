# SPDX-License-Identifier: Apache-2.0
"""Any SDXL pipeline draws the rows of `sdxl-fast eval --prompts`, from whatever `generate` takes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from sdxl_fast import cli, cli_eval_rows
from sdxl_fast.cli_eval import PromptOptions
from sdxl_fast.cli_eval_rows import Row, find_rows
from sdxl_fast.errors import ModelError, NotFewStepError
from sdxl_fast.eval.prompt_set import draw_set
from sdxl_fast.eval.report import model_digest
from sdxl_fast.eval.sources import Teacher
from sdxl_fast.inference import OneStepPipeline
from sdxl_fast.models import loading
from sdxl_fast.models.export import export_single_file
from sdxl_fast.models.lora import target_modules, write_lora
from sdxl_fast.models.source import open_model

PROMPT, SEED = ["red square"], [3]


@pytest.fixture(scope="module")
def style(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose name says nothing of steps."""
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    unet = OneStepPipeline.from_pretrained(plain_folder, preset="lcm", device="cpu").unet
    draw = torch.Generator().manual_seed(0)
    pairs = {}
    for name in target_modules(unet):
        weight = unet.get_submodule(name).weight
        down = torch.randn(2, *weight.shape[1:], generator=draw) / weight[0].numel() ** 0.5
        pairs[name] = (down, torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=draw))
    write_lora(path, pairs, alpha=2.0, num_inference_steps=1, prediction_type="epsilon")
    return path


def _rows(tmp_path: Path, model: object, **given: Any) -> list[Row]:
    options: dict[str, Any] = dict.fromkeys(field.name for field in fields(PromptOptions))
    options |= {"out": tmp_path / "out", "steps": (), "loras": (), "guidance": 5.0, "model": str(model)}
    return find_rows(PromptOptions(**options | given), torch.device("cpu"))


def _drawn(tmp_path: Path, model: object, **given: Any) -> Tensor:
    (row,) = _rows(tmp_path, model, **given)
    return row.generate(PROMPT, SEED)


def test_all_step_counts_share_one_teacher(plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    class Counted(Teacher):
        def __init__(self, *arguments: Any, **others: Any) -> None:
            loaded.append(self)
            super().__init__(*arguments, **others)

    monkeypatch.setattr(cli_eval_rows, "Teacher", Counted)
    rows = _rows(tmp_path, plain_folder, steps=(1, 2, 1))
    assert ([row.name for row in rows], loaded) == (["2 steps, guidance 5", "1 step, guidance 5"], [])
    two, one = (row.generate(["red square"], [3]) for row in rows)
    assert len(loaded) == 1 and (two - one).abs().max() > 0.01


def test_a_plain_single_file_is_drawn_as_its_folder(plain_folder: Path, tmp_path: Path) -> None:
    file = export_single_file(open_model(plain_folder), tmp_path / "plain.safetensors", dtype=None)
    expected = Teacher(plain_folder, guidance_scale=5.0, num_steps=2)(PROMPT, SEED)
    for model in (plain_folder, file):
        assert torch.equal(_drawn(tmp_path, model, steps=(2,)), expected)
    (row,) = _rows(tmp_path, file)
    assert (row.settings["steps"], row.settings["guidance"]) == (32, 5.0)
    with pytest.raises(NotFewStepError, match="needs a --guidance above 0"):
        _rows(tmp_path, plain_folder, guidance=0.0)


def test_a_lora_file_and_a_unet_are_drawn_on_their_base(toy_folder: Path, tmp_path: Path) -> None:
    lora = toy_folder / "toy_4step_lora.safetensors"
    whole = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    expected = whole(PROMPT, seed=SEED, num_inference_steps=4, output_type="pt").images
    (row,) = _rows(tmp_path, lora, base=str(toy_folder))
    assert (row.name, row.settings["base"]) == ("4 steps", "toy")
    assert row.settings["scheduler"] == "EulerDiscreteScheduler, timesteps 999 749 499 249"
    assert sorted(row.settings["weights_sha256"]) == ["base", "model"]
    torch.testing.assert_close(row.generate(PROMPT, SEED), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"--steps 32: toy_4step_lora\.safetensors draws in 4; other"):
        _rows(tmp_path, lora, base=str(toy_folder), steps=(32,))
    with pytest.raises(ModelError, match="--base"):
        _rows(tmp_path, lora)
    unet = _drawn(tmp_path, toy_folder / "unet", base=str(toy_folder), steps=(1,))
    torch.testing.assert_close(unet, _drawn(tmp_path, toy_folder, steps=(1,)))


def test_loras_and_presets_reach_what_draws(plain_folder: Path, style: Path, tmp_path: Path) -> None:
    """A student's pipeline and an undistilled UNet alike; strength 0 is none."""
    file = str(style)
    for given in ({"preset": "lcm", "steps": (2,)}, {"steps": (2,)}):
        without, half, none = (
            _drawn(tmp_path, plain_folder, **given, loras=loras) for loras in ((), ((file, 0.5),), ((file, 0.0),))
        )
        assert torch.equal(without, none) and (without - half).abs().max() > 0.01
    (row,) = _rows(tmp_path, plain_folder, preset="lcm", steps=(2,), loras=((file, 0.5),))
    assert (row.settings["source"], row.settings["loras"]) == ("student", {"style.safetensors": 0.5})
    assert "LoRA style.safetensors" in row.settings["weights_sha256"]
    with pytest.raises(ModelError, match=r"none\.safetensors"):
        _rows(tmp_path, plain_folder, loras=((str(tmp_path / "none.safetensors"), 1.0),))


def test_another_vae_decodes_a_students_and_an_undistilled_models_pictures(
    plain_folder: Path, toy_folder: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu", vae=tiny_vae)
    expected = pipe(PROMPT, seed=SEED, num_inference_steps=1, output_type="pt").images
    assert torch.equal(_drawn(tmp_path, toy_folder, steps=(1,), vae=tiny_vae), expected)
    teacher = Teacher(plain_folder, guidance_scale=5.0, num_steps=2)
    teacher.parts.vae = AutoencoderTiny.from_pretrained(tiny_vae)
    assert torch.equal(_drawn(tmp_path, plain_folder, steps=(2,), vae=tiny_vae), teacher(PROMPT, SEED))
    (row,) = _rows(tmp_path, plain_folder, vae=tiny_vae)
    assert (row.settings["vae"], row.settings["weights_sha256"]["VAE"]) == ("taesdxl", model_digest(tiny_vae))
    (row,) = _rows(tmp_path, plain_folder, vae=toy_folder)  # a pipeline's folder will do, whatever else is in it
    assert row.settings["weights_sha256"]["VAE"] == model_digest(toy_folder / "vae")
    with pytest.raises(ModelError, match="nowhere: not the folder of a VAE"):
        _rows(tmp_path, toy_folder, vae=tmp_path / "nowhere")


def test_size_and_precision_are_asked_for(plain_folder: Path, toy_folder: Path, tmp_path: Path) -> None:
    for model, count in ((plain_folder, 2), (toy_folder, 1), (toy_folder, 3)):
        drawn = _drawn(tmp_path, model, steps=(count,), height=48, width=64, dtype="bfloat16")
        assert drawn.shape == (1, 3, 48, 64)
        full = _drawn(tmp_path, model, steps=(count,), height=48, width=64)
        assert 0 < (drawn.float() - full).abs().mean() < 0.03
    (row,) = _rows(tmp_path, plain_folder, height=48, dtype="bfloat16")
    assert [row.settings[key] for key in ("height", "width", "dtype")] == [48, None, "bfloat16"]
    with pytest.raises(ValueError, match="height is 50"):
        _rows(tmp_path, toy_folder, steps=(1,), height=50)


def test_a_size_that_cannot_be_drawn_leaves_nothing_behind(plain_folder: Path, tmp_path: Path) -> None:
    """An undistilled model is loaded when it first draws: what failed then does not bar the folder."""
    for height in (50, 48):
        (row,) = _rows(tmp_path, plain_folder, steps=(1,), height=height)
        if height == 50:
            with pytest.raises(ValueError, match="height is 50"):
                draw_set(tmp_path / "set", PROMPT, row.generate, settings=row.settings)
        else:
            assert draw_set(tmp_path / "set", PROMPT, row.generate, settings=row.settings)[0].is_file()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--lora", "x"), ("--vae", "x"), ("--features", "inception"), ("--resize", "tf1"), ("--per-prompt", "2")],
)
def test_what_is_of_prompts_is_refused_with_data(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--data", str(tmp_path), "--out", str(tmp_path / "out"), option, value])
    assert stopped.value.code == 2 and f"{option} is of --prompts" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["folder", "single file"])
def test_an_undistilled_models_weights_are_read_once(
    form: str, plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That nothing says how it is sampled in a few steps is found out without them."""
    read: list[str] = []

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **others: Any) -> Any:
            read.append(next(name for name in arguments if isinstance(name, str)))
            return function(*arguments, **others)

        return call

    model = plain_folder
    if form == "single file":
        model = export_single_file(open_model(plain_folder), tmp_path / "plain.safetensors", dtype=None)
    for name in ("_load_network", "filled"):
        monkeypatch.setattr(loading, name, counted(getattr(loading, name)))
    rows = _rows(tmp_path, model, steps=(2, 1))
    assert read == []
    for row in rows:
        row.generate(PROMPT, SEED)
    assert sorted(read) == sorted(loading.NETWORKS)
