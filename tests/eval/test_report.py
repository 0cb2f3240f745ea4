# SPDX-License-Identifier: Apache-2.0
"""The report: rows that must come out as they were made, any kind of source, what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_fast.data.emoji import load_metadata
from sdxl_fast.data.render import load_art, render
from sdxl_fast.errors import DataError
from sdxl_fast.eval import report, sources, tables
from sdxl_fast.eval.dataset import Questions, emoji_questions
from sdxl_fast.eval.sheets import to_pil
from sdxl_fast.eval.tables import REAL, RECONSTRUCTIONS, TEACHER
from sdxl_fast.testing.toy import toy_pipeline

COUNT = 120


@pytest.fixture(scope="module")
def questions(picture_set: Path) -> Questions:
    return emoji_questions(picture_set, num_images=COUNT, resolution=32)


@pytest.fixture(scope="module")
def draw(picture_set: Path) -> sources.Generate:
    """A perfect model: real pictures of the prompt, placed by the seed."""
    rows = load_metadata(picture_set, split="train")
    art = load_art(picture_set, rows, 64)
    index = {row["text"]: i for i, row in enumerate(rows)}

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        one = [
            render(art[index[prompt]][None], 32, torch.Generator().manual_seed(seed % 2**31))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return (torch.cat(one) + 1.0) / 2.0

    return generate


def _blur(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def test_rows_come_out_as_made(questions: Questions, draw: sources.Generate, colour_grid: Any) -> None:
    collapsed = torch.cat([draw([prompt], [1]) for prompt in questions.prompts])
    wrong = draw([questions.prompts[i - 1] for i in range(COUNT)], questions.seeds)
    rows: dict[str, sources.Source] = {
        TEACHER: draw,
        "4 steps": lambda prompts, seeds: _blur(_blur(draw(prompts, seeds))),
        "2 steps": collapsed,
        "1 step": wrong,
    }
    found = report.evaluate(rows, questions, reconstruct=_blur, extractor=colour_grid)
    measured = found["rows"]
    assert list(measured) == [REAL, RECONSTRUCTIONS, TEACHER, "4 steps", "2 steps", "1 step"]
    assert found["baseline"] == RECONSTRUCTIONS
    teacher, blunt, copies, mistaken = (measured[name] for name in (TEACHER, "4 steps", "2 steps", "1 step"))
    assert teacher["top5_of_teacher"] == teacher["diversity"] == 1.0
    assert measured[RECONSTRUCTIONS]["sharpness"] == 1.0
    assert measured[RECONSTRUCTIONS]["kid_excess"] is None
    assert blunt["sharpness"] < 0.5 < 1.5 < teacher["sharpness"]
    assert copies["diversity"] == pytest.approx(0.0, abs=1e-6)
    assert copies["top5"] > 0.5
    assert mistaken["top5"] < 0.75 * teacher["top5"]
    assert teacher["kid_excess"] == pytest.approx(teacher["kid"] - measured[RECONSTRUCTIONS]["kid"])
    assert abs(teacher["kid"]) < 4 * teacher["kid_error"]
    met = {(target["row"], target["quantity"]): target["met"] for target in found["targets"]}
    assert met[("4 steps", "sharpness")] is False
    assert met[("4 steps", "diversity")] is True
    assert met[("1 step", "top5_of_teacher")] is False
    assert not any(row == "2 steps" for row, _ in met)


def test_source_kinds_agree(questions: Questions, draw: sources.Generate, colour_grid: Any, tmp_path: Path) -> None:
    images = draw(questions.prompts, questions.seeds)
    lines = []
    for i in reversed(range(COUNT)):  # the order is the metadata's, not the directory's
        to_pil(images[i][None])[0].save(tmp_path / f"{COUNT - i:03d}.png")
        lines.insert(0, json.dumps({"file_name": f"{COUNT - i:03d}.png", "text": questions.prompts[i]}) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    rows: dict[str, sources.Source] = {"function": draw, "tensor": images, "folder": tmp_path}
    found = report.evaluate(rows, questions, extractor=colour_grid)["rows"]
    for row in found.values():
        row.pop("seconds")
    assert found["function"] == found["tensor"] == found["folder"]
    assert found["function"]["sha256"] != found[REAL]["sha256"]
    (tmp_path / "metadata.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(DataError, match="another prompt"):
        report.evaluate({"folder": tmp_path}, questions, extractor=colour_grid)


def test_without_teacher_or_repeats(questions: Questions, draw: sources.Generate, colour_grid: Any) -> None:
    single = report.first_of_each(questions.targets, 12)
    few = replace(
        questions,
        prompts=[questions.prompts[i] for i in single.tolist()],
        seeds=[questions.seeds[i] for i in single.tolist()],
        targets=questions.targets[single],
        placed=questions.placed[single],
    )
    found = report.evaluate({"1 step": draw}, few, extractor=colour_grid)
    row = found["rows"]["1 step"]
    assert (row["diversity"], row["top5_of_teacher"]) == (None, None)
    assert [target["quantity"] for target in found["targets"]] == ["sharpness"]
    line = tables.to_markdown(found).splitlines()[3]
    assert line.startswith("| 1 step |")
    assert line.endswith("| – |")


def test_first_of_each_takes_different_prompts() -> None:
    targets = torch.tensor([4, 4, 2, 4, 0, 2, 1])
    assert report.first_of_each(targets, 3).tolist() == [0, 2, 4]
    assert report.first_of_each(targets, 9).tolist() == [0, 2, 4, 6]


def test_target_bounds() -> None:
    def row(**given: float | None) -> dict[str, Any]:
        base: dict[str, Any] = {"top5": 0.9, "kid_excess": 0.01, "kid_excess_error": 0.002, "sharpness": 1.0}
        return {**base, "top5_of_teacher": 0.9, "diversity": 0.8, **given}

    rows = {RECONSTRUCTIONS: row(top5=0.94), TEACHER: row(), "4 steps": row(kid_excess=0.021), "1 step": row()}
    found = {(target.row, target.quantity): target for target in tables.targets(rows)}
    assert not found[(RECONSTRUCTIONS, "top5")].met
    assert found[(TEACHER, "top5")].met
    assert not found[("4 steps", "kid_excess")].met
    assert found[("4 steps", "kid_excess")].high == pytest.approx(0.02)
    assert not found[("4 steps", "top5_of_teacher")].met  # 0.9 < 0.95
    assert found[("1 step", "top5_of_teacher")].met
    unclear = tables.targets({TEACHER: row(kid_excess=-0.001), "1 step": row(kid_excess=0.0039)})
    assert {target.quantity: target.met for target in unclear if target.row == "1 step"}["kid_excess"]
    assert [target.quantity for target in tables.targets({"1 step": row(sharpness=1.16)})] == ["sharpness"]
    assert not tables.targets({"1 step": row(sharpness=1.16)})[0].met


def test_refusals(questions: Questions, draw: sources.Generate, colour_grid: Any, tmp_path: Path) -> None:
    images = draw(questions.prompts, questions.seeds)
    with pytest.raises(ValueError, match=f"1 step: {COUNT - 1} pictures for {COUNT} prompts"):
        report.evaluate({"1 step": images[1:]}, questions, extractor=colour_grid)
    with pytest.raises(ValueError, match="allowed: the same size"):
        report.evaluate({"1 step": images[..., :16, :16]}, questions, extractor=colour_grid)
    with pytest.raises(ValueError, match="1 step spans"):
        report.evaluate({"1 step": images * 2 - 1}, questions, extractor=colour_grid)
    with pytest.raises(DataError, match=f"0 pictures for {COUNT} prompts"):
        report.evaluate({"1 step": tmp_path}, questions, extractor=colour_grid)


def test_run_writes_the_report(picture_set: Path, toy_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is missing (extra `eval`)")
    teacher = sources.Teacher(toy_folder, guidance_scale=3.0, num_steps=2)
    students = {steps: sources.Teacher(toy_folder, guidance_scale=1.0, num_steps=steps) for steps in (1, 2)}
    asked: list[int] = []

    def generate(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> torch.Tensor:
        asked.append(steps)
        return students[steps](prompts, seeds)

    found = report.run(
        toy_folder, picture_set, tmp_path, generate=generate, num_images=20, steps=(1, 2), seed=5, teacher=teacher
    )
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(found))
    assert asked == [2, 1]
    assert list(written["rows"]) == [REAL, RECONSTRUCTIONS, TEACHER, "2 steps", "1 step"]
    assert written["settings"] == {"num_images": 20, "names": 12, "seed": 5}
    files = written["inputs"]["model_files_sha256"]
    assert len(files["unet/diffusion_pytorch_model.safetensors"]) == 64
    table = (tmp_path / "report.md").read_text()
    assert "| teacher, 2 steps, guidance 3 |" in table
    assert "\n| 1 step |" in table
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.height > sheet.width / 4


def test_teacher_noise_is_the_seeds_alone(toy_folder: Path) -> None:
    """The same prompt and seed draw the same picture in any batch; guidance changes it."""
    teacher = sources.Teacher(toy_folder, guidance_scale=4.0, num_steps=2)
    both = teacher(["cat", "red apple"], [3, 2**40 + 1])
    assert torch.allclose(teacher(["red apple"], [2**40 + 1]), both[1:], atol=1e-4)
    plain = sources.Teacher(toy_folder, guidance_scale=1.0, num_steps=2)(["cat", "red apple"], [3, 2**40 + 1])
    assert (plain - both).abs().max() > 0.01


def test_teacher_is_stock_diffusers(toy_folder: Path) -> None:
    """The base UNet in diffusers' own pipeline, from the same latents, draws the same picture."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    from sdxl_fast.diffusion.sampling import pure_noise

    teacher = sources.Teacher(toy_folder, guidance_scale=4.0, num_steps=3)
    pipe = StableDiffusionXLPipeline.from_pretrained(toy_folder)
    pipe.unet = UNet2DConditionModel.from_pretrained(toy_folder, subfolder="unet_base")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    latents = pure_noise((pipe.unet.config.in_channels, side, side), torch.tensor([7]))
    stock = pipe("cat", num_inference_steps=3, guidance_scale=4.0, latents=latents, output_type="pt").images
    assert (teacher(["cat"], [7]) - stock).abs().max() < 2 / 255


def test_teachers_of_several_step_counts_share_their_networks(toy_folder: Path, networks_read: list[str]) -> None:
    """And the student's UNet is not loaded where the base lies beside it."""
    teacher = sources.Teacher(toy_folder, guidance_scale=2.0, num_steps=2)
    other = teacher.in_steps(1)
    assert sorted(networks_read) == ["text_encoder", "text_encoder_2", "unet_base", "vae"]
    assert (other.label, teacher.label) == ("teacher, 1 step, guidance 2", "teacher, 2 steps, guidance 2")
    alone = sources.Teacher(toy_folder, guidance_scale=2.0, num_steps=1)
    assert torch.equal(other(["cat"], [3]), alone(["cat"], [3]))
    assert other.unet is teacher.unet


def test_teacher_knows_what_its_base_predicts(toy_folder: Path, tmp_path: Path) -> None:
    """The folder's scheduler speaks of the student; the LoRAs speak of the base they belong to."""
    assert json.loads((toy_folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "sample"
    assert sources.Teacher(toy_folder, guidance_scale=1.0).prediction_type == "epsilon"
    plain = toy_pipeline(tmp_path / "v", prediction_type="v_prediction", few_steps=())
    assert sources.Teacher(plain, guidance_scale=1.0).prediction_type == "v_prediction"


def test_reconstruction_is_stock_diffusers(toy_folder: Path, tmp_path: Path) -> None:
    """Also where the VAE scales its latents, as SDXL's does: encoder and decoder must undo one another."""
    from diffusers import AutoencoderKL

    shutil.copytree(toy_folder / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    side = sources.native_size(toy_folder)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    with torch.no_grad():
        stock = (vae(images * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(sources.Reconstruction(tmp_path)(images), stock, atol=1e-5)
