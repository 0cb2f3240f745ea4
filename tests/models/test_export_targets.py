"""Where exports go: what lies there already, and what names are taken for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sdxl_fast.models import export
from sdxl_fast.models.source import open_model


def test_a_folder_of_other_things_is_not_replaced(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a pipeline folder, which would be replaced"):
        export.export_folder(open_model(toy_folder), tmp_path)
    with pytest.raises(ValueError, match="is not a pipeline folder"):
        export.export_folder(open_model(toy_folder), tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match=r"exists and is no \.safetensors file"):
        export.export_unet(open_model(toy_folder), tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_what_lies_beside_a_pipeline_is_not_deleted(toy_folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(toy_folder, tmp_path / "clone"))
    (target / ".git").mkdir()
    for name in ("thesis.txt", "README.md"):
        (target / name).touch()
    before = sorted(target.rglob("*"))
    with pytest.raises(ValueError, match=r"no part of an exported pipeline: \.git, thesis\.txt; move that away"):
        export.export_folder(open_model(toy_folder), target)
    assert sorted(target.rglob("*")) == before
    (target / ".git").rmdir()
    (target / "thesis.txt").unlink()
    export.export_folder(open_model(toy_folder), target)
    assert not (target / "README.md").exists()


@pytest.mark.parametrize("name", ["x.ckpt", "x.pth", "x.SAFETENSORS", "x.gguf"])
def test_a_file_of_another_kind_is_no_folder(toy_folder: Path, tmp_path: Path, name: str) -> None:
    model = open_model(toy_folder)
    with pytest.raises(ValueError, match=f"{name}: looks like a file, and .* is not written; allowed: a "):
        export.export_unet(model, tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir()
    assert export.export_unet(model, tmp_path / name).parent == tmp_path / name


def test_folders_may_have_versions_and_files_are_no_folders(toy_folder: Path, tmp_path: Path) -> None:
    model = open_model(toy_folder)
    assert export.export_unet(model, tmp_path / "toy-v1.5").name == "toy_1step_x0_unet.safetensors"
    with pytest.raises(ValueError, match="looks like a file, and a folder is written; for a file use single-file"):
        export.export_folder(model, tmp_path / "x.safetensors")
