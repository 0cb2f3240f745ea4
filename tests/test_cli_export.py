"""`sdxl-fast export`: every format from the command line; a mistake is one line, exit code 2 and no file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_fast import cli
from sdxl_fast.diffusion.sampling import pure_noise
from sdxl_fast.models.loading import EMBEDDED
from sdxl_fast.models.lora_file import read_lora_file
from sdxl_fast.models.safetensors_check import check_safetensors


def _run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_every_format_gets_its_name(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, name in (
        (("unet", toy_folder), "toy_1step_x0_unet.safetensors"),
        (("unet", toy_folder, "--steps", 4, "--name", "mine"), "mine_4step_unet.safetensors"),
        (("single-file", toy_folder), "toy_1step_x0.safetensors"),
        (("single-file", toy_folder, "--steps", 8, "--dtype", "bfloat16"), "toy_8step.safetensors"),
        (("lora", toy_folder, "--steps", 2, "--format", "kohya"), "toy_2step_lora.safetensors"),
    ):
        code, out, err = _run(capsys, *arguments, "--out", tmp_path)
        assert (code, err) == (0, "")
        assert f"wrote {tmp_path / name} ({(tmp_path / name).stat().st_size:,} bytes" in out
        wanted = torch.bfloat16 if "--dtype" in arguments else torch.float16
        floats = [t for key, t in load_file(tmp_path / name).items() if not key.endswith("position_ids")]
        assert {tensor.dtype for tensor in floats} == {wanted}
    assert len(os.listdir(tmp_path)) == 5
    assert "__metadata__" not in check_safetensors(tmp_path / "toy_1step_x0_unet.safetensors")


def test_folder_with_card_and_pictures(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(
        capsys, "folder", toy_folder, "--out", tmp_path / "f", "--steps", 2, "--license", "mit", "--title", "Two",
        "--samples", 2, "--prompt", "cat", "--device", "cpu",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "2 steps, predicts epsilon" in out
    card = (tmp_path / "f" / "README.md").read_text()
    assert "# Two" in card and "license: mit" in card and "| cat | 1 | ![](card/sample-1.png) |" in card
    assert sorted(os.listdir(tmp_path / "f" / "card")) == ["sample-0.png", "sample-1.png"]
    assert os.listdir(tmp_path) == ["f"]
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "f")
    assert pipe.scheduler.config.prediction_type == "epsilon"
    code, _, _ = _run(capsys, "folder", toy_folder, "--out", tmp_path / "f", "--samples", 0)
    assert code == 0
    assert len(list((tmp_path / "f").glob("*_lora.safetensors"))) == 3
    assert not (tmp_path / "f" / "card").exists()
    (tmp_path / "f" / "README.md").write_text("# Mine")
    code, _, err = _run(capsys, "folder", toy_folder, "--out", tmp_path / "f", "--samples", 0)
    assert code == 2 and "README.md: not as an export left it" in err
    assert (tmp_path / "f" / "README.md").read_text() == "# Mine"


@pytest.mark.parametrize("kind", ["unet", "lora", "single-file"])
def test_a_file_with_card_and_pictures(
    kind: str, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the card tells to run draws the picture that it shows."""
    base = Path(shutil.copytree(toy_folder, tmp_path / "base"))
    shutil.rmtree(base / "unet")
    (base / "unet_base").rename(base / "unet")  # what the LoRAs are for, as SDXL's own folder has it
    out, card = tmp_path / "upload", tmp_path / "upload" / "README.md"
    given = [
        kind,
        toy_folder,
        "--out",
        out,
        "--steps",
        4,
        "--dtype",
        "float32",
        *["--format", "peft"] * (kind == "lora"),
    ]
    given += ["--card", card, "--license", "mit", "--base-model", base, "--device", "cpu"]
    given += ["--samples", 2, "--prompt", "cat", "--prompt", "red apple"]
    for _ in range(2):  # a card of ours is written anew
        code, text, err = _run(capsys, *given)
        assert (code, err) == (0, "") and f"wrote {card}" in text
    (file,) = out.glob("*.safetensors")
    assert sorted(os.listdir(out / "card")) == [f"{file.stem}-0.png", f"{file.stem}-1.png"]
    page = card.read_text()
    assert "license: mit" in page and f"base_model_relation: {'adapter' if kind == 'lora' else 'finetune'}" in page
    assert f"| red apple | 1 | ![](card/{file.stem}-1.png) |" in page and "Draws 32 px pictures in 4 steps" in page
    monkeypatch.chdir(out)
    code = page.split("```python\n")[1].split("```")[0]
    latents = pure_noise((4, 8, 8), torch.tensor([0]))
    names: dict[str, Any] = {"latents": latents}
    exec(code.replace("num_inference_steps", "latents=latents, num_inference_steps"), names)
    shown = np.asarray(Image.open(out / "card" / f"{file.stem}-0.png")).astype(int)
    assert np.abs(np.asarray(names["image"]).astype(int) - shown).max() <= 2
    card.write_text("# Mine")
    code, _, err = _run(capsys, *given)
    assert code == 2 and "not as an export left it" in err and card.read_text() == "# Mine"


def test_a_file_that_cannot_be_drawn_with_gets_a_card_without_pictures(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, card = toy_folder / "toy_4step_lora.safetensors", tmp_path / "card.md"
    given = ("lora", lora, "--format", "kohya", "--out", tmp_path, "--card", card, "--device", "cpu")
    code, text, err = _run(capsys, *given)
    assert (code, err) == (0, "") and "note: no sample pictures, for it could not be drawn with" in text
    assert "--base" in text and "## Pictures" not in card.read_text() and not (tmp_path / "card").exists()
    code, text, _ = _run(capsys, *given, "--base", toy_folder, "--samples", 1)
    assert code == 0 and "## Pictures" in card.read_text() and "note" not in text


def test_a_lora_goes_round_and_is_merged(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = toy_folder / "toy_4step_lora.safetensors"
    step = original
    for dialect in ("kohya", "diffusers", "peft"):
        out = tmp_path / f"{dialect}_4step_lora.safetensors"
        assert _run(capsys, "lora", step, "--format", dialect, "--dtype", "keep", "--out", out)[0] == 0
        step = out
    first, last = read_lora_file(original), read_lora_file(step)
    assert first.pairs.keys() == last.pairs.keys()
    for name, pair in first.pairs.items():
        assert torch.equal(pair.down.read(), last.pairs[name].down.read())
        assert torch.equal(pair.up.read(), last.pairs[name].up.read())
    merged, direct = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert _run(capsys, "unet", step, "--base", toy_folder, "--out", merged)[0] == 0
    assert _run(capsys, "unet", toy_folder, "--steps", 4, "--out", direct)[0] == 0
    assert merged.read_bytes() == direct.read_bytes()


def test_a_unet_says_what_it_leaves_out(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both, stem = tmp_path / "both.safetensors", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    pairs = {f"{stem}.lora_A.weight": torch.zeros(2, 32), f"{stem}.lora_B.weight": torch.zeros(128, 2)}
    save_file(load_file(toy_folder / "toy_4step_lora.safetensors") | pairs, both)
    for lora, noted in ((both, True), (toy_folder / "toy_4step_lora.safetensors", False)):
        for kind in ("unet", "single-file"):
            out = tmp_path / f"{kind}.safetensors"
            code, text, _ = _run(capsys, kind, lora, "--base", toy_folder, "--out", out)
            assert code == 0
            assert ("the LoRA changes text_encoder_2 too" in text) == (noted and kind == "unet")


def test_alpha_of_a_silent_file(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = tmp_path / "silent.safetensors"
    save_file(load_file(toy_folder / "toy_4step_lora.safetensors"), silent)
    out = tmp_path / "k.safetensors"
    assert _run(capsys, "lora", silent, "--format", "kohya", "--alpha", 8, "--out", out)[0] == 0
    assert {float(t) for key, t in load_file(out).items() if key.endswith(".alpha")} == {8.0}
    assert "__metadata__" not in check_safetensors(out)  # nothing is known to say
    code, text, _ = _run(capsys, "lora", out, "--format", "peft", "--out", tmp_path / "p.safetensors")
    assert code == 0
    assert "alpha is in the metadata" in text
    assert {pair.alpha for pair in read_lora_file(tmp_path / "p.safetensors").pairs.values()} == {8.0}


def test_licence_author_and_size_are_said(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, said = toy_folder / "toy_4step_lora.safetensors", ("--license", "MIT", "--author", "A. N. Author")
    for number, (arguments, side) in enumerate((
        (("single-file", toy_folder), "32x32"),
        (("lora", toy_folder, "--steps", 4, "--format", "peft"), "32x32"),
        (("lora", lora, "--format", "kohya"), None),
        (("extract-lora", toy_folder, "--steps", 4, "--base", toy_folder, "--rank", 2), "32x32"),
    )):  # fmt: skip
        out = tmp_path / f"{number}.safetensors"
        assert _run(capsys, *arguments, *said, "--out", out)[0] == 0
        metadata = check_safetensors(out)["__metadata__"]
        assert (metadata["modelspec.license"], metadata["modelspec.author"]) == ("MIT", "A. N. Author")
        assert metadata.get("modelspec.resolution") == side


def test_metadata_can_be_left_out(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for more in ((), ("--no-metadata",)):
        out = tmp_path / f"{len(more)}.safetensors"
        code, _, _ = _run(capsys, "lora", toy_folder, "--steps", 4, "--format", "kohya", "--out", out, *more)
        assert code == 0
        sizes.append(out.stat().st_size)
        assert ("__metadata__" in check_safetensors(out)) == (not more)
    assert sizes[0] > sizes[1]


def test_extracting_and_merging_comes_back(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = tmp_path / "student_4step_unet.safetensors"
    assert _run(capsys, "unet", toy_folder, "--steps", 4, "--dtype", "float32", "--out", unet)[0] == 0
    lora = tmp_path / "made.safetensors"
    code, out, _ = _run(
        capsys, "extract-lora", unet, "--base", toy_folder, "--rank", 4, "--dtype", "float32", "--out", lora
    )
    assert code == 0
    assert "leaves out 0.00% of the whole difference" in out
    again = tmp_path / "again.safetensors"
    assert _run(capsys, "unet", lora, "--base", toy_folder, "--dtype", "float32", "--out", again)[0] == 0
    found, wanted = load_file(again), load_file(unet)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_students_rounding_is_not_extracted(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a float16 base and a LoRA of rank 4, the LoRA is all there is."""
    half, lora = tmp_path / "toy", tmp_path / "made.safetensors"
    assert _run(capsys, "folder", toy_folder, "--out", half, "--samples", 0)[0] == 0
    code, out, _ = _run(capsys, "extract-lora", half, "--steps", 4, "--base", half, "--rank", 4, "--out", lora)
    assert code == 0
    # its halves are rounded to float16 each, to 2⁻¹² on average
    (share,) = re.findall(r"leaves out ([\d.]+)% of the whole difference", out)
    assert float(share) < 0.05


def test_the_embedded_pipeline_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "single-file", "embedded", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "tells the text encoders apart by width" in out
    (path,) = tmp_path.iterdir()
    assert path.name == "emoji_1step_x0.safetensors"
    assert path.stat().st_size < sum(f.stat().st_size for f in EMBEDDED.rglob("*.safetensors"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "red apple", "--model", str(path), "--device", "cpu", "--out", str(tmp_path / "a.png")])
    assert not caught.value.code


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such thing": (["unet", "/nowhere"], "no such folder or file"),
    "no model": (["unet", "/"], "not a diffusers pipeline folder"),
    "dtype": (["unet", "TOY", "--dtype", "fp8"], "allowed: float16, bfloat16, float32, keep"),
    "no such student": (["unet", "TOY", "--steps", "5"], "no student of 5 steps"),
    "lora without base": (["unet", "LORA"], "needs a base model: give --base"),
    "unet without base": (["single-file", "TOY/unet"], "give --base"),
    "no lora": (["lora", "TOY/unet", "--format", "kohya"], "no LoRA"),
    "no step count": (["lora", "TOY", "--format", "kohya"], "choose with --steps"),
    "dialect": (["lora", "LORA", "--format", "comfy"], "allowed: kohya, diffusers, peft"),
    "another alpha": (["lora", "KOHYA", "--format", "peft", "--alpha", "7"], "alpha is given as 7"),
    "pickle": (["unet", "PICKLE"], "pickled"),
    "truncated": (["lora", "SHORT", "--format", "kohya"], "truncated"),
    "foreign lora": (["lora", "FOREIGN", "--format", "kohya"], "transformer.blocks.0.to_q.lora_A.weight"),
    "equal": (["extract-lora", "TOY/unet", "--base", "TOY/unet", "--rank", "2", "--steps", "4"], "equal UNets"),
    "rank": (["extract-lora", "TOY", "--base", "TOY", "--rank", "1000"], "rank is 1000"),
    "device": (["extract-lora", "TOY", "--base", "TOY", "--rank", "2", "--device", "toaster"], "device is 'toaster'"),
    "keep": (["extract-lora", "TOY", "--base", "TOY", "--rank", "2", "--dtype", "keep"], "--dtype is keep"),
    "prediction": (["unet", "TOY", "--prediction-type", "x0"], "prediction_type is 'x0'"),
    "no place": (
        ["lora", "LORA", "--format", "kohya", "--license", "mit", "--no-metadata"],
        "--license and --author go",
    ),
    "samples": (["folder", "TOY", "--samples", "-1"], "--samples is -1"),
    "no card": (["unet", "TOY", "--prompt", "cat"], "--prompt is of a model card: give --card, too"),
    "no place for a card": (["unet", "TOY", "--card", "in"], "in: no place for a model card"),
    "device of a card": (["folder", "TOY", "--device", "toaster"], "device is 'toaster'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, message = MISTAKES[case]
    lora = toy_folder / "toy_2step_lora.safetensors"
    inputs = tmp_path / "in"
    inputs.mkdir()
    paths = {"TOY": toy_folder, "TOY/unet": toy_folder / "unet", "LORA": lora}
    if "KOHYA" in arguments:
        assert _run(capsys, "lora", lora, "--format", "kohya", "--out", inputs / "k.safetensors")[0] == 0
    torch.save({}, inputs / "p.safetensors")
    (inputs / "s.safetensors").write_bytes(lora.read_bytes()[:-9])
    save_file({"transformer.blocks.0.to_q.lora_A.weight": torch.zeros(2, 2)}, inputs / "f.safetensors")
    paths |= {name: inputs / f"{name[0].lower()}.safetensors" for name in ("KOHYA", "PICKLE", "SHORT", "FOREIGN")}
    out = tmp_path / "out"
    code, _, err = _run(capsys, *[paths.get(word, word) for word in arguments], "--out", out)
    assert code == 2
    assert err.startswith("sdxl-fast: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_help_names_the_formats_and_needs_no_torch() -> None:
    code = (
        "import sys\nfrom sdxl_fast import cli\n"
        "try:\n    cli.main(['export', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    for word in ("unet", "folder", "single-file", "lora", "extract-lora"):
        assert word in done.stdout
    assert done.stdout.rstrip().endswith("False")
