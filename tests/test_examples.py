"""The examples run, at small sizes, and do what they say; what their guide names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_fast import examples
from sdxl_fast.examples import bench_one_op, fuse_a_unet, use_one_op
from sdxl_fast.testing.toy import toy_pipeline

FOLDER = Path(examples.__file__).parent
ROOT = Path(__file__).parent.parent


def test_one_op_is_timed_on_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    times = bench_one_op.main(
        ["--shape", "1", "32", "4", "4", "--dtype", "float32", "--device", "cpu", "--min-time", "0.01"]
    )
    assert {"stock PyTorch", "cpu", "eager"} <= set(times) and all(t > 0 for t in times.values())
    said = capsys.readouterr().out
    errors = [float(e) for e in re.findall(r"largest error (\S+)", said)]
    assert len(errors) == len(times) and max(errors) < 1e-4
    with pytest.raises(SystemExit):
        bench_one_op.main(["--shape", "1", "33", "4", "4"])
    assert "C is 33" in capsys.readouterr().err


def test_a_module_on_single_ops_learns() -> None:
    losses = use_one_op.main(["--steps", "30", "--device", "cpu"])
    assert losses[-1] < 0.5 * losses[0]


def test_a_fused_unet_trains_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = toy_pipeline(tmp_path / "toy"), tmp_path / "lora.safetensors"
    arguments = ["--model", str(folder), "--steps", "2", "--device", "cpu", "--out", str(file)]
    report = fuse_a_unet.main(arguments)
    assert not report.kept and "step 1: loss" in capsys.readouterr().out
    learned = [t for name, t in load_file(file).items() if "lora_B" in name]
    assert learned and all(bool(t.isfinite().all()) and torch.count_nonzero(t) for t in learned)


def test_the_guide_names_what_exists() -> None:
    """With `layer_norm`, the neighbour it tells to read, in the place of X."""
    text = (FOLDER / "add_an_op.md").read_text()
    paths = re.findall(r"`([\w./]+/[\w./]+\.(?:py|cpp|cu|h|md|json))`", text)
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / path.replace("X.", "layer_norm.").replace("_X", "_layer_norm")).is_file(), path
    for command in re.findall(r"`pytest ([\w/.]+)`", text):
        assert (ROOT / command.replace("X", "layer_norm")).is_file()


def test_every_example_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for path in FOLDER.iterdir():
        if path.suffix in (".py", ".md") and path.stem != "__init__":
            assert f"(sdxl_fast/examples/{path.name})" in text, path.name
