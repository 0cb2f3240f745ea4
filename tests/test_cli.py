"""The command line: files appear whole, every mistake is one line on stderr with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_fast import OneStepPipeline, cli
from sdxl_fast.demo import PROMPTS


def _run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_generate_writes_what_the_pipeline_draws(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run(
        capsys, "generate", "red apple", "cat", "--model", toy_folder, "--seed", 5, "--num-images", 2,
        "--out", tmp_path / "made", "--device", "cpu",
    )  # fmt: skip
    assert (code, err) == (0, "")
    names = ["cat_5.png", "cat_6.png", "red-apple_5.png", "red-apple_6.png"]
    assert sorted(os.listdir(tmp_path / "made")) == names
    for name in names:
        assert name in out
    assert "unet" in out
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    wanted = pipe(["red apple", "cat"], seed=5, num_images_per_prompt=2).images
    for name, image in zip(names[2:] + names[:2], wanted, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "made" / name)), np.asarray(image))


def test_one_file_with_every_option(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(
        capsys, "generate", "cat", "--model", toy_folder, "--seed", 1, "--steps", 4, "--height", 40, "--width", 24,
        "--dtype", "bf16", "--device", "cpu", "--out", tmp_path / "cat.webp",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert os.listdir(tmp_path) == ["cat.webp"]
    assert Image.open(tmp_path / "cat.webp").size == (24, 40)


def test_a_png_says_how_it_was_made(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = next(toy_folder.glob("*4step_lora.safetensors"))
    start = tmp_path / "start.png"
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(start)
    code, out, err = _run(
        capsys, "generate", "a cät", "--model", toy_folder, "--seed", 3, "--steps", 2, "--device", "cpu", "--lora",
        f"{lora}=0.25", "--image", start, "--strength", 0.75, "--bench", 2, "--out", tmp_path / "made.png",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "2 calls, 1 pictures each" in out
    assert [line.split()[0] for line in out.splitlines()[-5:]] == ["text", "vae", "unet", "post", "total"]
    made = Image.open(tmp_path / "made.png")
    assert (made.text["prompt"], made.text["seed"], made.text["model"]) == ("a cät", "3", toy_folder.name)
    settings = json.loads(made.text["settings"])
    assert settings["loras"] == {lora.name.removesuffix(".safetensors"): 0.25}
    assert (settings["steps"], settings["strength"], settings["size"]) == (2, 0.75, [32, 32])
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu", lora={lora: 0.25})
    again = pipe("a cät", seed=3, num_inference_steps=2, image=Image.open(start), strength=0.75).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(made))


def test_loras_on_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.safetensors"
    odd.touch()
    assert cli.parse_loras(["x.safetensors", "y=0.5", str(odd)]) == [
        ("x.safetensors", 1.0),
        ("y", 0.5),
        (str(odd), 1.0),
    ]
    with pytest.raises(ValueError, match="'much' is no number"):
        cli.parse_loras(["x=much"])


def test_files_are_named_without_collisions(tmp_path: Path) -> None:
    names = [f.name for f in cli.picture_files(tmp_path, ["a/b", "a b", "a/b", "🍎", "../x"], [1, 1, 2, 3, 4])]
    assert names == ["a-b_1.png", "a-b_1_2.png", "a-b_2.png", "picture_3.png", "x_4.png"]
    assert cli.picture_files(Path("x.png"), ["a", "b"], [1, 2]) == [Path("x-1.png"), Path("x-2.png")]


def test_demo_says_where_how_and_how_long(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out_file = tmp_path / "demo.png"
    code, out, err = _run(capsys, "demo", "--model", toy_folder, "--out", out_file, "--device", "cpu")
    assert (code, err) == (0, "")
    assert f"{out_file}: {len(PROMPTS)} prompts, 1 step each" in out
    for op in ("group_norm_silu", "geglu", "forward_diffusion"):
        assert any(line.split()[:2] in ([op, "cpu"], [op, "eager"]) for line in out.splitlines())
    for stage in ("text encoders", "unet", "vae", "total"):
        assert f"{stage} " in out
    assert Image.open(out_file).size[0] > 6 * 128


def test_scales_are_calibrated_and_used(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, scales, picture = (tmp_path / name for name in ("prompts.txt", "scales.safetensors", "cat.png"))
    prompts.write_text("cat\n\n  guitar \n")
    there = ("--model", toy_folder, "--device", "cpu")
    code, out, err = _run(capsys, "calibrate", prompts, "--out", scales, "--max-error", "1", *there)
    assert (code, err) == (0, "")
    assert "calibrated on 2 prompts" in out
    assert "PSNR" in out
    draw = ("generate", "cat", "--quantization", "fp8", "--scales", scales, "--out", picture, *there)
    code, _, err = _run(capsys, *draw)
    assert (code, err) == (0, "")
    assert json.loads(Image.open(picture).text["settings"])["quantization"] == "fp8"


WRONG_PROMPTS: dict[str, tuple[str | None, str, str]] = {
    "no file": (None, "s.safetensors", "No such file"),
    "no prompts": (" \n", "s.safetensors", "holds no prompts"),
    "another file": ("cat", "s.pt", ".safetensors file"),
}


@pytest.mark.parametrize(("text", "name", "message"), WRONG_PROMPTS.values(), ids=WRONG_PROMPTS)
def test_calibration_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, name: str, message: str
) -> None:
    if text is not None:
        (tmp_path / "prompts.txt").write_text(text)
    code, _, err = _run(capsys, "calibrate", tmp_path / "prompts.txt", "--out", tmp_path / name)
    assert code == 2
    assert message in err
    assert not (tmp_path / name).exists()


def _broken(toy_folder: Path, tmp_path: Path, damage: str) -> Path:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "broken"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    if damage == "pickled":
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:5000])
    return folder


MISTAKES: dict[str, tuple[list[str], str]] = {
    "wrong path": (["cat", "--model", "/nowhere/at/all"], "/nowhere/at/all: no such folder or file"),
    "unknown step count": (["cat", "--model", "TOY", "--steps", "3"], "num_inference_steps is 3"),
    "no prompt": ([], "no prompt given"),
    "blank prompt": (["cat", " "], "no prompt given"),
    "impossible size": (["cat", "--model", "TOY", "--height", "33"], "multiples of 4"),
    "truncated weights": (["cat", "--model", "truncated"], "truncated"),
    "pickled weights": (["cat", "--model", "pickled"], "pickled"),
    "not a model": (["cat", "--model", "/"], "not a diffusers pipeline folder"),
    "no images": (["cat", "--num-images", "0"], "num_images_per_prompt is 0"),
    "negative seed": (["cat", "--seed", "-1"], "seed is -1"),
    "dtype": (["cat", "--dtype", "fp8"], "float32, bfloat16"),
    "device": (["cat", "--device", "toaster"], "device is 'toaster'"),
    "preset": (["cat", "--model", "TOY", "--preset", "fast"], "preset is 'fast'; allowed: lightning-1step-x0"),
    "quantization": (["cat", "--quantization", "fp8"], "needs scales"),
    "LoRA": (["cat", "--model", "TOY", "--lora", "/nowhere.safetensors"], "no such file"),
    "strength alone": (["cat", "--strength", "0.5"], "give one"),
    "picture": (["cat", "--image", "/nowhere.png"], "nowhere.png"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, message = MISTAKES[case]
    model = {"TOY": toy_folder} | {d: _broken(toy_folder, tmp_path, d) for d in ("truncated", "pickled") if d in case}
    out = tmp_path / "out"
    code, _, err = _run(capsys, "generate", *[model.get(a, a) for a in arguments], "--out", out)
    assert code == 2
    assert err.startswith("sdxl-fast: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_output_paths_are_checked_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "load_pipeline", lambda *_: pytest.fail("the model was loaded first"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for command, out, message in (
        ("generate", tmp_path / "file", "exists and is no picture"),
        ("generate", tmp_path / "file" / "x", "is a file, not a folder"),
        ("generate", tmp_path / "file" / "x.png", "is a file, not a folder"),
        ("demo", tmp_path / "demo.gif", "ends in one of"),
        ("demo", tmp_path / "folder.png", "is a folder"),
    ):
        code, _, err = _run(capsys, command, *(["cat"] if command == "generate" else []), "--out", out)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_failed_write_leaves_the_old_picture(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: Image.Image, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    (tmp_path / "cat.png").write_bytes(b"old")
    code, _, err = _run(capsys, "generate", "cat", "--model", toy_folder, "--out", tmp_path / "cat.png")
    assert code == 2
    assert "no space left" in err
    assert os.listdir(tmp_path) == ["cat.png"]
    assert (tmp_path / "cat.png").read_bytes() == b"old"


def test_the_other_commands_pass_their_arguments_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_fast import train
    from sdxl_fast.data import emoji

    calls: list[Any] = []
    monkeypatch.setattr(train, "run", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(emoji, "build", lambda out, *, packages: calls.append((out, packages)))
    assert _run(capsys, "data", "emoji", "--out", tmp_path, "--packages", "here")[0] == 0
    arguments = ["train", "vae.yaml", "--set", "a.b=1", "--set", "c=2", "--resume", "latest", "--dry-run"]
    assert _run(capsys, *arguments, "--processes", "8")[0] == 0
    told = {"resume": "latest", "dry_run": True, "processes": 8}
    assert calls == [(tmp_path, Path("here")), (("vae.yaml", ["a.b=1", "c=2"]), told)]


def test_eval_measures_every_step_count_of_the_model(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_fast.eval import report

    found: dict[str, Any] = {}

    def run(folder: Path, data: Path, out: Path, *, generate: Any, **settings: Any) -> None:
        images = generate(("cat", "red apple"), (1, 2), 4)
        found.update(settings, folder=folder, data=data, shape=tuple(images.shape), lowest=float(images.min()))

    monkeypatch.setattr(report, "run", run)
    code, out, err = _run(
        capsys, "eval", "--model", toy_folder, "--data", tmp_path, "--out", tmp_path / "r", "--num-images", 4
    )
    assert (code, err) == (0, "")
    assert found["steps"] == [1, 2, 4, 8]
    assert (found["teacher"].num_steps, found["teacher"].prediction_type) == (32, "epsilon")
    assert (found["folder"], found["data"], found["num_images"]) == (toy_folder, tmp_path, 4)
    assert found["shape"] == (2, 3, 32, 32)
    assert found["lowest"] >= 0
    assert "report.md" in out


def test_eval_refuses_step_counts_of_others_before_it_draws(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("eval", "--model", toy_folder, "--data", tmp_path, "--out", tmp_path / "r", "--steps", 1, "--steps", 3)
    code, _, err = _run(capsys, *given)
    assert code == 2
    assert "--steps 3: toy draws in 1, 2, 4, 8" in err


def test_eval_needs_a_folder(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = toy_folder / "unet" / "diffusion_pytorch_model.safetensors"
    code, _, err = _run(capsys, "eval", "--model", weights, "--data", tmp_path, "--out", tmp_path / "r")
    assert code == 2
    assert "needs the folder" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "cat", "--bench", -1), "--bench is -1; allowed: 0 or more"),
        (("card", "m", "--report", "r", "--data", "d", "--title", "t", "--run", "x"), "--run x: names no folder; give"),
    ],
)
def test_wrong_values_are_one_line(
    arguments: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _run(capsys, *arguments)
    assert (code, err.count("\n")) == (2, 1) and message in err


def test_help_says_what_a_value_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "eval", "--help")
    text = " ".join(out.split())
    assert code == 0 and "Network of the distances; or inception[:FILE], or clip:FOLDER." in text
    assert "in 32 steps where --steps has none for it; 0: none." in text


def test_unknown_commands_and_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "bogus")[0] == 2
    assert _run(capsys, "generate", "cat", "--bogus")[0] == 2


def test_env_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "env")
    assert code == 0
    assert torch.__version__ in out
    assert "group_norm_silu" in out


@pytest.mark.parametrize(("cutlass", "said"), [("4.2.0", "with CUTLASS 4.2.0"), (None, "no matrix kernels")])
def test_env_says_what_a_cuda_build_lacks(cutlass: str | None, said: str) -> None:
    from sdxl_fast import env

    facts = {**env._native(), "cuda": "13.0.88", "cuda_archs": ["90a"], "cutlass": cutlass}
    assert f"CUDA 13.0.88 for 90a, {said}" in "\n".join(env._native_lines(facts))


def test_help_needs_no_torch() -> None:
    """Everything heavy is imported by the command that needs it."""
    code = "import sys, sdxl_fast.cli; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
