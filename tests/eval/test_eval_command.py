# SPDX-License-Identifier: Apache-2.0
"""`sdxl-fast eval --prompts`: what draws, what is drawn again, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sdxl_fast import cli
from sdxl_fast.cli_eval import feature_network
from sdxl_fast.eval import prompt_set
from sdxl_fast.eval.prompt_set import read_picture
from sdxl_fast.eval.report import model_digest
from sdxl_fast.files import file_sha256
from sdxl_fast.models.facts import TRAILING_EULER
from sdxl_fast.testing.toy import toy_pipeline


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
    assert list(report["rows"]) == ["32 steps, guidance 5", "4 steps", "1 step"]
    pictures = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("0*.png")}
    assert len(pictures) == 12
    assert all(row["content_diversity"] >= 0 and row["layout_diversity"] > 0 for row in report["rows"].values())
    settings = json.loads((tmp_path / "out" / "pictures-32" / "settings.json").read_text())
    assert (settings["source"], settings["guidance"]) == ("undistilled", 5.0)
    assert report["rows"]["32 steps, guidance 5"]["settings"].items() <= settings.items()
    inputs, digest = report["inputs"], file_sha256(tmp_path / "prompts.txt")
    assert (inputs["prompts_file"], inputs["prompts_sha256"]) == (str(tmp_path / "prompts.txt"), digest)
    weights = f"toy (sha256 {model_digest(toy_folder)[:12]})"
    text = (tmp_path / "out" / "report.md").read_text()
    for line in (
        f"- 32 steps, guidance 5: {weights}, undistilled, guidance 5, {TRAILING_EULER}, float32 on cpu, 32 x 32 px",
        f"- 1 step: {weights}, student, no guidance, EulerDiscreteScheduler, timesteps 999, float32 on cpu, 32 x 32 px",
        f"- 4 steps: {weights}, student, no guidance, {TRAILING_EULER}, float32 on cpu, 32 x 32 px",
        f"2 prompts of {tmp_path / 'prompts.txt'} (sha256 {digest[:12]}), seed 0.",
    ):
        assert line in text
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


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (("--features", "inceptionn"), "--features is 'inceptionn'; allowed"),
        (("--features", "inception:none.pth"), "none.pth"),
        (("--features", "inception"), "is missing; pip install"),
        (("--clip", "no/such/folder"), "no/such/folder"),
        (("--reference", "no-folder"), "no-folder"),
        (("--patch-from", 64), "--patch-from is 64; allowed: the patch's 288 px or more"),
        (("--device", "gpu"), "device"),
        (("--batch", 0), "--batch is 0; allowed: 1 or more"),
        (("--num-images", 0), "--num-images is 0; allowed: 1 or more"),
        (("--steps", 0), "--steps is 0; allowed: 1 or more"),
        (("--guidance", -1), "--guidance is -1; allowed: 0, which leaves it out, or more"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(
    mistake: tuple[object, ...],
    message: str,
    toy_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    if mistake[1] == "inception:none.pth":
        _stand_in(monkeypatch)
    elif mistake[1] == "inception":
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "prompts.txt").write_text("red square\ngreen disc\n")
    given = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", "--model", toy_folder, "--steps", 1)
    assert message in _refused(capsys, *given, *mistake)
    assert not (tmp_path / "out").exists()


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch-fidelity that can be imported."""
    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = ModuleType(name)
    module.FeatureExtractorInceptionV3 = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, module)
