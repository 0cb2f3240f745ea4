# SPDX-License-Identifier: Apache-2.0
"""Pictures of a prompt file: drawn once, measured whole and in the middle, reported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sdxl_fast import cli, cli_eval_rows
from sdxl_fast.cli_eval import PromptOptions, feature_network
from sdxl_fast.errors import DataError
from sdxl_fast.eval import prompt_set
from sdxl_fast.eval.clip_score import Clip, clip_scores
from sdxl_fast.eval.prompt_report import Measured, compare, measure, write_report
from sdxl_fast.eval.prompt_set import batches, centre_patch, draw_set, pictures_of, read_picture, read_prompts
from sdxl_fast.eval.report import model_digest
from sdxl_fast.eval.sheets import to_pil
from sdxl_fast.eval.sources import Teacher
from sdxl_fast.files import file_sha256
from sdxl_fast.testing.toy import toy_pipeline

PROMPTS = [f"prompt {k}" for k in range(11)]


class Painter:
    """Draws noise by the seed and counts what it was asked for."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.stop_after = stop_after

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += prompts
        pictures = [torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(pictures)


def test_a_stopped_set_goes_on_with_the_same_pictures(tmp_path: Path) -> None:
    whole = draw_set(tmp_path / "whole", PROMPTS, Painter(), batch=4)
    first, second = Painter(stop_after=4), Painter()
    with pytest.raises(KeyboardInterrupt):
        draw_set(tmp_path / "halves", PROMPTS, first, batch=4)
    halves = draw_set(tmp_path / "halves", PROMPTS, second, batch=3)
    assert first.asked + second.asked == PROMPTS
    assert [file.read_bytes() for file in halves] == [file.read_bytes() for file in whole]
    assert len({file.read_bytes() for file in whole}) == len(PROMPTS), "each prompt has a seed of its own"
    third = Painter()
    assert draw_set(tmp_path / "halves", PROMPTS, third) == halves and third.asked == []


def test_pictures_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    draw_set(tmp_path, PROMPTS, Painter(), settings={"steps": 1})
    with pytest.raises(DataError, match="other steps"):
        draw_set(tmp_path, PROMPTS, Painter(), settings={"steps": 2})
    with pytest.raises(DataError, match="other prompts"):
        draw_set(tmp_path, PROMPTS[::-1], Painter(), settings={"steps": 1})


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \nthree\n")
    assert read_prompts(tmp_path / "a.txt", 2) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": 3}\n')
    assert read_prompts(tmp_path / "b.jsonl") == ["one", "two"]
    (tmp_path / "c.jsonl").write_text('{"caption": "one"}\n')
    (tmp_path / "d.txt").write_text("\n")
    for name in ("c.jsonl", "d.txt", "none.txt"):
        with pytest.raises(DataError, match=name):
            read_prompts(tmp_path / name)


def test_the_patch_is_the_middle_at_native_resolution() -> None:
    images = torch.arange(400 * 301, dtype=torch.float32).reshape(1, 1, 400, 301).expand(1, 3, -1, -1)
    patch = centre_patch(images)
    assert patch.shape == (1, 3, 299, 299)
    assert torch.equal(patch, images[:, :, 50:349, 1:300])
    assert torch.equal(centre_patch(images[..., :200, :200]), images[..., :200, :200])


def test_batches_hold_one_size_and_keep_the_order(tmp_path: Path) -> None:
    sizes = [8, 8, 16, 16, 16, 8]
    for index, side in enumerate(sizes):
        to_pil(torch.full((1, 3, side, side), index / 10))[0].save(tmp_path / f"{index}.png")
    found = list(batches(pictures_of(tmp_path), 2))
    assert [tuple(part.shape[::3]) for part in found] == [(2, 8), (2, 16), (1, 16), (1, 8)]
    order = torch.cat([part[:, 0, 0, 0] for part in found])
    torch.testing.assert_close(order, torch.arange(6) / 10, atol=1 / 255, rtol=0)
    with pytest.raises(DataError, match="no pictures"):
        (tmp_path / "empty").mkdir()
        pictures_of(tmp_path / "empty")


def test_blur_shows_in_the_patch_and_in_sharpness(tmp_path: Path, colour_grid: Any) -> None:
    draw = torch.Generator().manual_seed(0)

    def write(name: str, blur: bool) -> list[Path]:
        (tmp_path / name).mkdir()
        for index in range(60):
            picture = torch.rand(1, 3, 24, 24, generator=draw)
            picture = functional.avg_pool2d(picture, 3, 1, 1) if blur else picture
            to_pil(picture)[0].save(tmp_path / name / f"{index:02d}.png")
        return pictures_of(tmp_path / name)

    extract = Mean(colour_grid)
    real = measure(write("real", False), extract)
    same, blurred = (compare(measure(write(n, b), extract), real, None) for n, b in (("same", False), ("soft", True)))
    assert 0.8 < same["sharpness"] < 1.2 and blurred["sharpness"] < 0.3
    assert blurred["fid_whole"] > 3 * same["fid_whole"] > 0
    assert same["clip_score"] is None
    few = compare(measure(pictures_of(tmp_path / "same")[:5], extract), real, None)
    assert few["fid_whole"] is None and few["kid_whole"] is not None


class Mean:
    """Six features: fewer than pictures."""

    def __init__(self, grid: Any) -> None:
        self.grid = grid

    def __call__(self, images: Tensor) -> Tensor:
        edges = images.diff(dim=-1).abs().mean((2, 3))
        return torch.cat([images.mean((2, 3)), edges], dim=1)

    def provenance(self) -> dict[str, str | int]:
        return {"network": "means"}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights."""
    from transformers import CLIPConfig, CLIPModel

    from sdxl_fast.models.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["red square", "green disc"], vocab_size=520, max_tokens=16)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    model.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(tokenizer, folder)
    return folder


def test_clip_embeds_like_transformers(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), batch_size=2)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prompts = ["red square", "green disc", "a red disc that is much longer than sixteen tokens can be by any measure"]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    tokens = clip.tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        whole = clip.model(pixel_values=(images - mean) / std, **tokens)
    cosines = (whole.image_embeds * whole.text_embeds).sum(1)
    found = clip_scores(clip(images), clip.texts(prompts))
    torch.testing.assert_close(found.float(), 100 * cosines.clamp_min(0), rtol=1e-4, atol=1e-3)
    assert clip(torch.rand(1, 3, 40, 64)).shape == (1, 24)
    with pytest.raises(ValueError, match="allowed"):
        clip_scores(torch.zeros(2, 3), torch.zeros(3, 3))


def test_the_report_says_what_it_measured(tmp_path: Path, colour_grid: Any, clip_folder: Path) -> None:
    sets = {"1 step": draw_set(tmp_path / "one", PROMPTS, Painter())}
    reference = draw_set(tmp_path / "real", PROMPTS, Painter(), seed=7)
    clip = Clip(str(clip_folder))
    report = write_report(tmp_path / "out", sets, PROMPTS, extract=Mean(colour_grid), reference=reference, clip=clip)
    row = report["rows"]["1 step"]
    assert row["images"] == 11 and row["clip_score"] is not None and row["fid_patch"] is not None
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 step | 11 |" in text and "11 prompts" in text and str(clip_folder) in text
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_retrieval_and_diversity_within_a_prompt() -> None:
    """Two prompts of two pictures: one of the four is nearer to the other prompt, and one pair is twice the same."""
    texts = torch.eye(3)[[0, 0, 1, 1]]
    clip = torch.tensor([[1.0, 0.1, 0.0], [0.2, 0.9, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    layouts = torch.zeros(4, 3, 16, 16)
    layouts[0] = 0.5
    whole = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    found = Measured(whole, whole, clip, torch.ones(4), layouts)
    row = compare(found, None, texts, torch.tensor([0, 0, 1, 1]))
    assert row["retrieval"] == 0.75
    assert row["content_diversity"] == pytest.approx(0.5) and row["layout_diversity"] == pytest.approx(0.25)
    once = compare(found, None, texts, torch.tensor([0, 1, 2, 3]))
    assert once["content_diversity"] is None, "of one picture a prompt nothing can be said"
    assert compare(found, None, texts, torch.zeros(4, dtype=torch.int64))["retrieval"] is None


def test_the_command_draws_measures_and_goes_on(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    (tmp_path / "prompts.txt").write_text("red square\ngreen disc\nblue ring\n")
    arguments = ["eval", "--prompts", str(tmp_path / "prompts.txt"), "--model", str(toy_folder), "--device", "cpu"]
    arguments += [
        "--steps",
        "1",
        "--steps",
        "4",
        "--steps",
        "32",
        "--num-images",
        "4",
        "--per-prompt",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["rows"]) == ["32 steps", "4 steps", "1 step"]
    pictures = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("0*.png")}
    assert len(pictures) == 12
    assert all(row["content_diversity"] >= 0 and row["layout_diversity"] > 0 for row in report["rows"].values())
    settings = json.loads((tmp_path / "out" / "pictures-32" / "settings.json").read_text())
    assert (settings["source"], settings["guidance"]) == ("undistilled", 5.0)
    monkeypatch.setattr(prompt_set, "to_pil", None)  # nothing is drawn again
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("0*.png")} == pictures
    assert read_picture(next(iter(pictures))).shape == (3, 32, 32)


@pytest.mark.parametrize("extra", [[], ["--data", "x", "--prompts", "y"]])
def test_one_source_of_prompts_is_asked_for(
    extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--out", str(tmp_path), *extra])
    assert stopped.value.code == 2 and "one of them" in capsys.readouterr().err


def test_an_unknown_feature_network_is_refused() -> None:
    with pytest.raises(ValueError, match="inception:FILE"):
        feature_network("vgg", "cpu")


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--device", "cpu", "--num-images", "2", *map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_student_is_not_drawn_with_guidance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its UNet is no teacher: only an undistilled one draws in any number of steps."""
    (tmp_path / "prompts.txt").write_text("red square\ngreen disc\n")
    student = toy_pipeline(tmp_path / "student", few_steps=())
    given = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", "--model", student)
    error = _refused(capsys, *given, "--steps", 1, "--steps", 32)
    assert "--steps 32: student draws in 1; other step counts need an undistilled UNet" in error
    student.rename(tmp_path / "sdxl_lightning_4step")
    config = tmp_path / "sdxl_lightning_4step" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"trailing"', '"leading"'))
    assert "its scheduler config is" in _refused(capsys, *given[:-1], tmp_path / "sdxl_lightning_4step", "--steps", 32)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undistilled pipeline, whose scheduler says so."""
    folder = toy_pipeline(tmp_path_factory.mktemp("plain") / "plain", few_steps=(), prediction_type="epsilon")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"trailing"', '"leading"'))
    return folder


def _options(tmp_path: Path, **given: Any) -> PromptOptions:
    (tmp_path / "prompts.txt").write_text("red square\ngreen disc\nblue ring\n")
    some = {"prompts": tmp_path / "prompts.txt", "out": tmp_path / "out", "model": None, "steps": (), "device": "cpu"}
    some |= {"reference": None, "features": "efficientnet-lite0", "clip": None, "num_images": 2, "per_prompt": 1}
    return PromptOptions(**{**some, "seed": 0, "guidance": 5.0, "batch": 2, **given})


def test_all_step_counts_share_one_teacher(plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    class Counted(Teacher):
        def __init__(self, *arguments: Any, **others: Any) -> None:
            loaded.append(self)
            super().__init__(*arguments, **others)

    monkeypatch.setattr(cli_eval_rows, "Teacher", Counted)
    rows, device = cli_eval_rows.find_rows(_options(tmp_path, model=str(plain_folder), steps=(1, 2, 1)))
    assert ([row.name for row in rows], device, loaded) == (["2 steps", "1 step"], "cpu", [])
    two, one = (row.generate(["red square"], [3]) for row in rows)
    assert len(loaded) == 1 and (two - one).abs().max() > 0.01


def test_pictures_of_a_model_that_has_changed_are_not_taken_for_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same folder, same settings, other weights; what else lies in the folder, such as the report, is no part of it."""
    student = toy_pipeline(tmp_path / "student", few_steps=())
    (tmp_path / "prompts.txt").write_text("red square\ngreen disc\n")
    given = ("--prompts", tmp_path / "prompts.txt", "--out", student / "report", "--model", student, "--steps", 1)
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["eval", "--device", "cpu", "--num-images", "2", *map(str, given)])
        assert stopped.value.code == 0, capsys.readouterr().err
    settings = json.loads((student / "report" / "pictures-1" / "settings.json").read_text())
    assert (settings["dtype"], settings["device"], settings["model"]) == ("float32", "cpu", "student")
    weights = student / "unet" / "diffusion_pytorch_model.safetensors"
    facts = weights.stat()
    other = toy_pipeline(tmp_path / "other", seed=1, few_steps=())
    weights.write_bytes((other / "unet" / weights.name).read_bytes())
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert weights.stat().st_size == facts.st_size, "size and time say nothing"
    assert "holds pictures with other weights_sha256" in _refused(capsys, *given)


def test_a_models_digest_is_of_what_it_is_loaded_from(tmp_path: Path, toy_folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(toy_folder, copy)
    digest = model_digest(copy)
    assert digest == model_digest(toy_folder) and len(digest) == 64
    (copy / "README.md").write_text("x")
    (copy / "samples.json").write_text("{}")
    assert model_digest(copy) == digest
    for name in ("unet_base/config.json", "tokenizer/vocab.json", "toy_4step_lora.safetensors", "model_index.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        assert model_digest(copy) != digest, name
        (copy / name).write_bytes(content)
    assert model_digest(copy / "toy_4step_lora.safetensors") == file_sha256(copy / "toy_4step_lora.safetensors")
    assert model_digest(copy / "unet") != model_digest(copy / "unet_base")
